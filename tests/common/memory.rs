//! The memory of a process: a limit, and its peak.

use std::fs;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

/// A memory cgroup, of version 2 or 1.
pub struct MemoryLimit {
    folder: PathBuf,
}

impl MemoryLimit {
    /// A cgroup with this limit in bytes. `None` if this machine has no writable memory controller.
    pub fn new(bytes: u64) -> Option<Self> {
        let name = format!("fleetwright-bounds-{}-{:08x}", std::process::id(), rand::random::<u32>());
        for (root, file) in [("/sys/fs/cgroup", "memory.max"), ("/sys/fs/cgroup/memory", "memory.limit_in_bytes")] {
            let folder = PathBuf::from(root).join(&name);
            if fs::create_dir(&folder).is_err() {
                continue;
            }
            let limit = Self { folder };
            if limit.folder.join("cgroup.procs").exists() && fs::write(limit.folder.join(file), bytes.to_string()).is_ok() {
                return Some(limit);
            }
        }
        None
    }

    /// The file to which a process writes its id to be limited.
    pub fn processes(&self) -> PathBuf {
        self.folder.join("cgroup.procs")
    }

    /// The number of processes that the kernel has killed because of the limit.
    pub fn kills(&self) -> u64 {
        let text =
            ["memory.events", "memory.oom_control"].map(|file| fs::read_to_string(self.folder.join(file)).unwrap_or_default()).concat();
        let line = text.lines().find_map(|line| line.strip_prefix("oom_kill "));
        line.map_or(0, |count| count.trim().parse().unwrap())
    }
}

impl Drop for MemoryLimit {
    fn drop(&mut self) {
        // Fails while the last process ends; an empty cgroup takes no resources.
        let _ = fs::remove_dir(&self.folder);
    }
}

/// Samples the memory of a process that cannot be reclaimed.
pub struct MemoryPeak {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<u64>,
}

impl MemoryPeak {
    /// Starts sampling every five milliseconds.
    pub fn start(pid: u32) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = stop.clone();
        let thread = std::thread::spawn(move || {
            let mut peak = 0;
            while !stopped.load(Ordering::Relaxed) {
                peak = peak.max(anonymous(pid));
                std::thread::sleep(Duration::from_millis(5));
            }
            peak
        });
        Self { stop, thread }
    }

    /// The peak in bytes.
    pub fn finish(self) -> u64 {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().unwrap()
    }
}

/// Anonymous resident memory of a process, in bytes; 0 after its end.
fn anonymous(pid: u32) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:"));
    line.and_then(|line| line.trim().trim_end_matches(" kB").parse::<u64>().ok()).unwrap_or(0) * 1024
}
