//! Follows the broker's log from the start of the broker, across restarts of the agent, and rotates it.
//!
//! Mosquitto writes each line at once (line buffering), and reopens its file on a reload. The agent therefore renames a log that is
//! too long and reloads the broker. When a file with the old name exists again, the renamed file is complete: the agent reads it to
//! its end, writes the resulting state to a snapshot file, and removes the renamed file. The agent resumes any interrupted step.

use std::fs::{self, File};
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::time::{Instant, MissedTickBehavior, interval};
use tokio_util::sync::CancellationToken;
use tracing::{debug, info, warn};

use super::metrics::PresenceMetrics;
use super::{Presence, epoch, now};
use crate::agent::files::write;
use crate::agent::process;
use crate::broker::log::line;
use crate::broker::log::tracker::{Tracker, TrackerSnapshot};
use crate::configuration::agent::LOG_FILE;
use crate::runtime::error::chain;

/// Interval between reads of new lines: a compromise between latency (people do not notice a tenth of a second) and the cost of
/// an idle broker (ten small reads a second).
const POLL_INTERVAL: Duration = Duration::from_millis(100);

/// Interval between checks that the broker's process runs.
const PROCESS_POLL_INTERVAL: Duration = Duration::from_secs(1);

/// The agent rotates a log that is longer: about 25,000 connections, read in a tenth of a second. Each rotation needs a reload, which
/// blocks a broker with 15,000 clients for 60 ms.
pub const MAX_LOG_BYTES: u64 = 8 << 20;

/// Minimum time between rotations, unless the log is longer still: a flood of refused clients must not make a broker reload
/// all the time.
const MIN_LOG_AGE: Duration = Duration::from_mins(1);
const MAX_LOG_BYTES_EARLY: u64 = 128 << 20;

/// The agent repeats the reload if the broker has not reopened its log after this long.
const RELOAD_RETRY: Duration = Duration::from_secs(5);

/// Size of one read.
const READ_BYTES: usize = 256 << 10;

/// Mosquitto does not write a line with more bytes than this.
const MAX_PARTIAL_LINE_BYTES: usize = 64 << 10;

/// File beside the log with the state from the logs that were removed.
const SNAPSHOT_FILE: &str = "presence.json";

/// [`SNAPSHOT_FILE`].
#[derive(Debug, Deserialize, Serialize)]
struct SavedPresence {
    /// Number of the last log that it includes.
    rotations: u64,
    /// Whether the log contains the line that the broker runs.
    running: bool,
    snapshot: TrackerSnapshot,
}

/// The log that is being read.
#[derive(Debug)]
struct OpenLog {
    file: File,
    /// Whether it was renamed.
    renamed: bool,
    bytes: u64,
    partial: Vec<u8>,
}

/// Follows the log of one broker.
#[derive(Debug)]
pub struct LogFollower {
    folder: PathBuf,
    configuration: PathBuf,
    presence: Presence,
    metrics: PresenceMetrics,
    max_log_bytes: u64,
    min_log_age: Duration,
    rotated_at: Option<Instant>,
    /// The tracker includes logs up to this number, and they are removed.
    rotations: u64,
    reading: Option<OpenLog>,
    /// Whether the log contains the line that the broker runs: a broker that is starting does not handle the signal yet.
    running: bool,
    reloaded_at: Option<Instant>,
    caught_up: bool,
    grown: bool,
}

impl LogFollower {
    /// A follower of the log in `folder`, of the broker with this `configuration`. Resumes from the snapshot of an earlier follower.
    #[must_use]
    pub fn new(folder: &Path, configuration: &Path, presence: Presence, metrics: PresenceMetrics) -> Self {
        let saved = saved(&folder.join(SNAPSHOT_FILE));
        let (rotations, running) = saved.as_ref().map_or((0, false), |saved| (saved.rotations, saved.running));
        if let Some(saved) = saved {
            *presence.lock() = Tracker::restore(epoch(), saved.snapshot);
        }
        Self {
            folder: folder.to_owned(),
            configuration: configuration.to_owned(),
            presence,
            metrics,
            max_log_bytes: MAX_LOG_BYTES,
            min_log_age: MIN_LOG_AGE,
            rotated_at: None,
            rotations,
            reading: None,
            running,
            reloaded_at: None,
            caught_up: false,
            grown: false,
        }
    }

    /// Rotates the log at another length, without the minimum time; for tests.
    #[must_use]
    pub fn with_max_log_bytes(mut self, bytes: u64) -> Self {
        (self.max_log_bytes, self.min_log_age) = (bytes, Duration::ZERO);
        self
    }

    /// Runs until `shutdown` is cancelled. Retries a file that it cannot read.
    pub async fn run(mut self, shutdown: CancellationToken) {
        let mut lines = interval(POLL_INTERVAL);
        let mut processes = interval(PROCESS_POLL_INTERVAL);
        lines.set_missed_tick_behavior(MissedTickBehavior::Delay);
        processes.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut failing = false;
        loop {
            let result = tokio::select! {
                () = shutdown.cancelled() => return,
                _ = lines.tick() => self.poll(),
                _ = processes.tick() => self.poll_process(),
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

    /// Reads new lines, and rotates the log if it is too long.
    fn poll(&mut self) -> io::Result<()> {
        loop {
            let live = self.folder.join(LOG_FILE);
            // This check comes first: once a new log exists, the broker writes nothing more to the renamed log.
            let live_exists = live.exists();
            if self.reading.is_none() && !self.open(&live)? {
                break;
            }
            self.read()?;
            let Some(reading) = &self.reading else { break };
            if reading.renamed && live_exists {
                self.finish_rotation()?;
                continue;
            }
            if reading.renamed {
                self.reload();
            } else if self.is_too_long(reading.bytes) && self.running {
                fs::rename(&live, self.rotated_path())?;
                if let Some(reading) = &mut self.reading {
                    reading.renamed = true;
                }
                self.reloaded_at = None;
                self.rotated_at = Some(Instant::now());
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
        let old = self.rotated_at.is_none_or(|at| at.elapsed() >= self.min_log_age);
        bytes > if old { self.max_log_bytes } else { MAX_LOG_BYTES_EARLY }
    }

    /// Opens the next log: a renamed log that is not finished yet, else the current one. Returns whether a log exists.
    fn open(&mut self, live: &Path) -> io::Result<bool> {
        remove(&self.folder.join(format!("{LOG_FILE}.{}", self.rotations)))?;
        for (path, renamed) in [(self.rotated_path().as_path(), true), (live, false)] {
            match File::open(path) {
                Ok(file) => {
                    self.reading = Some(OpenLog { file, renamed, bytes: 0, partial: Vec::new() });
                    return Ok(true);
                }
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(error),
            }
        }
        Ok(false)
    }

    fn rotated_path(&self) -> PathBuf {
        self.folder.join(format!("{LOG_FILE}.{}", self.rotations + 1))
    }

    /// Reads to the present end.
    fn read(&mut self) -> io::Result<()> {
        let Some(reading) = &mut self.reading else { return Ok(()) };
        let mut tracker = self.presence.lock();
        let mut chunk = vec![0; READ_BYTES];
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
                let outcome = tracker.observe(&line, now());
                if self.caught_up {
                    self.metrics.count(outcome);
                }
            }
            reading.partial.drain(..whole);
            if reading.partial.len() > MAX_PARTIAL_LINE_BYTES {
                reading.partial.clear();
            }
        }
    }

    /// Saves the state from a renamed log, and removes the log.
    fn finish_rotation(&mut self) -> io::Result<()> {
        let saved = SavedPresence { rotations: self.rotations + 1, running: self.running, snapshot: self.presence.lock().snapshot() };
        let text = serde_json::to_vec(&saved).map_err(io::Error::other)?;
        write(&self.folder.join(SNAPSHOT_FILE), &text).map_err(|error| error.source)?;
        self.rotations += 1;
        self.reading = None;
        self.metrics.rotations.inc();
        info!(logs = self.rotations, "rotated the broker's log");
        Ok(())
    }

    fn reload(&mut self) {
        if !self.running || self.reloaded_at.is_some_and(|at| at.elapsed() < RELOAD_RETRY) {
            return;
        }
        self.reloaded_at = Some(Instant::now());
        if let Err(error) = process::reload(&self.configuration) {
            warn!("{}", chain(&error));
        }
    }

    /// A killed broker does not write its end to the log.
    fn poll_process(&mut self) -> io::Result<()> {
        let found = process::runs_with(&self.configuration);
        self.grown = false;
        self.poll()?;
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

fn saved(path: &Path) -> Option<SavedPresence> {
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
