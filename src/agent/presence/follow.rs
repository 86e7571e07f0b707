//! Follows the broker's log, from the beginning of the broker's life, through restarts of the agent, and keeps it short.
//!
//! Mosquitto writes each line at once (line buffering), and opens its file anew when it is told to reload. So a log that has
//! grown too long is renamed, the broker reloads, and when the file of the old name is there again the renamed one is whole:
//! it is read to its end, what it told is written to a file of its own, and it goes. Whatever of these steps is interrupted
//! goes on where it was.

use std::fs::{self, File};
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::time::{Instant, MissedTickBehavior, interval};
use tokio_util::sync::CancellationToken;
use tracing::{debug, info, warn};

use super::metrics::Metrics;
use super::{Presence, epoch, now};
use crate::agent::files::write;
use crate::agent::process;
use crate::broker::log::line;
use crate::broker::log::tracker::{Memory, Tracker};
use crate::configuration::agent::LOG_FILE;
use crate::runtime::error::chain;

/// How often is looked for new lines: a compromise of speed (a tenth of a second is at once, for people) and of what an idle
/// broker costs (ten small reads a second).
const INTERVAL: Duration = Duration::from_millis(100);

/// How often is looked whether the broker's process is there.
const PROCESS_INTERVAL: Duration = Duration::from_secs(1);

/// A log that is longer is put aside: some 25,000 connections, read in a tenth of a second. Each time is a reload, which
/// holds a broker of 15,000 clients for 60 ms.
pub const LONGEST_LOG: u64 = 8 << 20;

/// But not sooner than this after the last one, unless it is longer still: a flood of refused clients must not make a
/// broker reload all the time.
const SHORTEST_LIFE: Duration = Duration::from_mins(1);
const LONGEST_LOG_OF_ALL: u64 = 128 << 20;

/// A broker that has not opened its log anew is told again after this long.
const RELOAD_AGAIN: Duration = Duration::from_secs(5);

/// What is read at once.
const CHUNK: usize = 256 << 10;

/// A line that has no end after this many bytes is none of Mosquitto's.
const LONGEST_PARTIAL: usize = 64 << 10;

/// File beside the log with what the logs told that are gone.
const MEMORY_FILE: &str = "presence.json";

/// [`MEMORY_FILE`].
#[derive(Debug, Deserialize, Serialize)]
struct Remembered {
    /// Number of the last log that is in it.
    covers: u64,
    /// Whether the broker has said that it runs.
    running: bool,
    memory: Memory,
}

/// The log that is being read.
#[derive(Debug)]
struct Reading {
    file: File,
    /// Whether it has been put aside.
    renamed: bool,
    bytes: u64,
    partial: Vec<u8>,
}

/// Follows the log of one broker.
#[derive(Debug)]
pub struct Follower {
    folder: PathBuf,
    configuration: PathBuf,
    presence: Presence,
    metrics: Metrics,
    longest_log: u64,
    shortest_life: Duration,
    put_aside: Option<Instant>,
    /// Logs up to this number are in the tracker, and gone.
    covers: u64,
    reading: Option<Reading>,
    /// Whether the broker has said that it runs: one that starts does not know the signal yet.
    running: bool,
    reloaded_at: Option<Instant>,
    caught_up: bool,
    grown: bool,
}

impl Follower {
    /// A follower of the log in `folder`, of the broker with this `configuration`. Goes on from what an earlier one knew.
    #[must_use]
    pub fn new(folder: &Path, configuration: &Path, presence: Presence, metrics: Metrics) -> Self {
        let remembered = remembered(&folder.join(MEMORY_FILE));
        let (covers, running) = remembered.as_ref().map_or((0, false), |remembered| (remembered.covers, remembered.running));
        if let Some(remembered) = remembered {
            *presence.lock() = Tracker::resume(epoch(), remembered.memory);
        }
        Self {
            folder: folder.to_owned(),
            configuration: configuration.to_owned(),
            presence,
            metrics,
            longest_log: LONGEST_LOG,
            shortest_life: SHORTEST_LIFE,
            put_aside: None,
            covers,
            reading: None,
            running,
            reloaded_at: None,
            caught_up: false,
            grown: false,
        }
    }

    /// Puts the log aside at another length, however soon; for tests.
    #[must_use]
    pub fn with_longest_log(mut self, bytes: u64) -> Self {
        (self.longest_log, self.shortest_life) = (bytes, Duration::ZERO);
        self
    }

    /// Runs until `shutdown` is cancelled. A file that cannot be read is tried again.
    pub async fn run(mut self, shutdown: CancellationToken) {
        let mut lines = interval(INTERVAL);
        let mut processes = interval(PROCESS_INTERVAL);
        lines.set_missed_tick_behavior(MissedTickBehavior::Delay);
        processes.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut failing = false;
        loop {
            let result = tokio::select! {
                () = shutdown.cancelled() => return,
                _ = lines.tick() => self.look(),
                _ = processes.tick() => self.look_for_process(),
            };
            match result {
                Ok(()) => failing = false,
                Err(error) if !failing => {
                    warn!(folder = %self.folder.display(), %error, "failed to follow the broker's log: trying again");
                    failing = true;
                }
                Err(error) => debug!(%error, "failed to follow the broker's log"),
            }
        }
    }

    /// Reads what is new, and puts the log aside where it is too long.
    fn look(&mut self) -> io::Result<()> {
        loop {
            let live = self.folder.join(LOG_FILE);
            // Asked first: once there is another, nothing more comes to a log that was put aside.
            let live_exists = live.exists();
            if self.reading.is_none() && !self.open(&live)? {
                break;
            }
            self.read()?;
            let Some(reading) = &self.reading else { break };
            if reading.renamed && live_exists {
                self.finish()?;
                continue;
            }
            if reading.renamed {
                self.reload();
            } else if self.is_too_long(reading.bytes) && self.running {
                fs::rename(&live, self.aside())?;
                if let Some(reading) = &mut self.reading {
                    reading.renamed = true;
                }
                self.reloaded_at = None;
                self.put_aside = Some(Instant::now());
                self.reload();
            }
            break;
        }
        self.caught_up = true;
        self.metrics.connected.set(i64::try_from(self.presence.lock().connected()).unwrap_or(i64::MAX));
        self.presence.publish();
        Ok(())
    }

    fn is_too_long(&self, bytes: u64) -> bool {
        let old = self.put_aside.is_none_or(|at| at.elapsed() >= self.shortest_life);
        bytes > if old { self.longest_log } else { LONGEST_LOG_OF_ALL }
    }

    /// Opens the log to be read: one that was put aside and is not done with yet, else the live one. Returns whether there is
    /// one.
    fn open(&mut self, live: &Path) -> io::Result<bool> {
        remove(&self.folder.join(format!("{LOG_FILE}.{}", self.covers)))?;
        for (path, renamed) in [(self.aside().as_path(), true), (live, false)] {
            match File::open(path) {
                Ok(file) => {
                    self.reading = Some(Reading { file, renamed, bytes: 0, partial: Vec::new() });
                    return Ok(true);
                }
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(error),
            }
        }
        Ok(false)
    }

    fn aside(&self) -> PathBuf {
        self.folder.join(format!("{LOG_FILE}.{}", self.covers + 1))
    }

    /// Reads to the present end.
    fn read(&mut self) -> io::Result<()> {
        let Some(reading) = &mut self.reading else { return Ok(()) };
        let mut tracker = self.presence.lock();
        let mut chunk = vec![0; CHUNK];
        loop {
            let length = reading.file.read(&mut chunk)?;
            if length == 0 {
                return Ok(());
            }
            self.grown = true;
            reading.bytes += length as u64;
            reading.partial.extend_from_slice(&chunk[..length]);
            let whole = reading.partial.iter().rposition(|byte| *byte == b'\n').map_or(0, |end| end + 1);
            for text in reading.partial[..whole].split(|byte| *byte == b'\n') {
                let text = String::from_utf8_lossy(text);
                let Some(line) = line::parse(&text) else { continue };
                match line.event {
                    line::Event::BrokerRunning => self.running = true,
                    line::Event::BrokerStarting | line::Event::BrokerStopping => self.running = false,
                    _ => {}
                }
                let meaning = tracker.observe(&line, now());
                if self.caught_up {
                    self.metrics.count(meaning);
                }
            }
            reading.partial.drain(..whole);
            if reading.partial.len() > LONGEST_PARTIAL {
                reading.partial.clear();
            }
        }
    }

    /// Remembers what a log told that was put aside, and removes it.
    fn finish(&mut self) -> io::Result<()> {
        let remembered = Remembered { covers: self.covers + 1, running: self.running, memory: self.presence.lock().memory() };
        let text = serde_json::to_vec(&remembered).map_err(io::Error::other)?;
        write(&self.folder.join(MEMORY_FILE), &text).map_err(|error| error.source)?;
        self.covers += 1;
        self.reading = None;
        self.metrics.rotations.inc();
        info!(logs = self.covers, "the broker's log was put aside, and a new one begun");
        Ok(())
    }

    fn reload(&mut self) {
        if !self.running || self.reloaded_at.is_some_and(|at| at.elapsed() < RELOAD_AGAIN) {
            return;
        }
        self.reloaded_at = Some(Instant::now());
        if let Err(error) = process::reload(&self.configuration) {
            warn!("{}", chain(&error));
        }
    }

    /// A broker that was killed says nothing more in its log.
    fn look_for_process(&mut self) -> io::Result<()> {
        let found = process::runs_with(&self.configuration);
        self.grown = false;
        self.look()?;
        if !found && !self.grown {
            self.running = false;
            let mut tracker = self.presence.lock();
            if tracker.connected() > 0 {
                info!(connected = tracker.connected(), "the broker's process is gone, and its clients with it");
            }
            tracker.broker_down(now());
            drop(tracker);
            self.presence.publish();
        }
        Ok(())
    }
}

fn remembered(path: &Path) -> Option<Remembered> {
    let text = match fs::read(path) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return None,
        Err(error) => {
            warn!(path = %path.display(), %error, "failed to read who was connected: clients show when they connect again");
            return None;
        }
    };
    let warn = |error: &serde_json::Error| warn!(path = %path.display(), %error, "failed to read who was connected: clients show when they connect again");
    serde_json::from_slice(&text).inspect_err(warn).ok()
}

fn remove(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}
