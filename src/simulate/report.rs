//! The acknowledged readings: the progress line, and the report that tests compare with rows.

use std::collections::BTreeMap;
use std::io::{self, IsTerminal, Write};
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use serde::Serialize;
use tokio_util::sync::CancellationToken;

/// How often the progress line is printed if the output is not a terminal.
const LOG_INTERVAL: Duration = Duration::from_secs(10);

/// The acknowledged readings of a device.
#[derive(Clone, Debug, Default, Eq, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct DeviceReport {
    /// Acknowledged messages.
    pub messages: u64,
    /// Readings of the acknowledged messages: the table must have as many rows.
    pub readings: u64,
    /// Time of the first acknowledged reading, in milliseconds since 1970-01-01T00:00:00Z.
    pub first_timestamp: Option<i64>,
    /// Time of the last acknowledged reading, in the same unit.
    pub last_timestamp: Option<i64>,
    /// Readings without an acknowledgement at the end. The table may or may not have their rows.
    pub unacknowledged_readings: u64,
}

/// The counts of all devices. Clones share them.
#[derive(Clone, Debug, Default)]
pub struct Tally {
    shared: Arc<Shared>,
}

#[derive(Debug, Default)]
struct Shared {
    devices: Mutex<BTreeMap<String, DeviceReport>>,
    readings: AtomicU64,
    connected: AtomicU64,
    known: AtomicU64,
}

#[derive(Serialize)]
struct Report<'a> {
    messages: u64,
    readings: u64,
    devices: &'a BTreeMap<String, DeviceReport>,
}

impl Tally {
    /// A message of this device was acknowledged.
    pub fn acknowledge(&self, device: &str, readings: u64, first: i64, last: i64) {
        self.shared.readings.fetch_add(readings, Ordering::Relaxed);
        self.update(device, |report| {
            report.messages += 1;
            report.readings += readings;
            report.first_timestamp = Some(report.first_timestamp.map_or(first, |known| known.min(first)));
            report.last_timestamp = Some(report.last_timestamp.map_or(last, |known| known.max(last)));
        });
    }

    /// These readings have no acknowledgement at the end.
    pub fn give_up(&self, device: &str, readings: u64) {
        self.update(device, |report| report.unacknowledged_readings += readings);
    }

    fn update(&self, device: &str, change: impl FnOnce(&mut DeviceReport)) {
        let mut devices = self.shared.devices.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(report) = devices.get_mut(device) {
            change(report);
        } else {
            change(devices.entry(device.to_owned()).or_default());
        }
    }

    /// A device has logged in.
    pub fn connected(&self) {
        self.shared.connected.fetch_add(1, Ordering::Relaxed);
    }

    /// A device's connection has ended.
    pub fn disconnected(&self) {
        self.shared.connected.fetch_sub(1, Ordering::Relaxed);
    }

    /// Sets the number of simulated devices.
    pub fn set_known(&self, devices: usize) {
        self.shared.known.store(devices as u64, Ordering::Relaxed);
    }

    /// Prints the progress line until `stop`: every second on a terminal, otherwise every ten seconds.
    pub async fn show(self, stop: CancellationToken) {
        let terminal = io::stdout().is_terminal();
        let interval = if terminal { Duration::from_secs(1) } else { LOG_INTERVAL };
        let (mut last, mut last_total) = (Instant::now(), 0);
        loop {
            tokio::select! {
                () = stop.cancelled() => break,
                () = tokio::time::sleep(interval) => {}
            }
            let total = self.shared.readings.load(Ordering::Relaxed);
            #[allow(clippy::cast_precision_loss, reason = "a rate for people")]
            let rate = (total - last_total) as f64 / last.elapsed().as_secs_f64();
            let (connected, known) = (self.shared.connected.load(Ordering::Relaxed), self.shared.known.load(Ordering::Relaxed));
            let line = format!("{rate:>9.0} readings/s acknowledged   {total:>12} in total   {connected} of {known} devices connected");
            let (before, after) = if terminal { ("\r", "") } else { ("", "\n") };
            print(&format!("{before}{line}{after}"));
            (last, last_total) = (Instant::now(), total);
        }
        if terminal {
            print("\n");
        }
    }

    /// Writes the report to a file, or to standard output for `-`.
    ///
    /// # Errors
    /// If the file cannot be written.
    pub fn write(&self, file: &Path) -> io::Result<()> {
        let devices = self.shared.devices.lock().unwrap_or_else(PoisonError::into_inner);
        let report = Report {
            messages: devices.values().map(|device| device.messages).sum(),
            readings: devices.values().map(|device| device.readings).sum(),
            devices: &devices,
        };
        let text = serde_json::to_string(&report)? + "\n";
        if file == Path::new("-") {
            print(&text);
            return Ok(());
        }
        std::fs::write(file, text)
    }
}

fn print(text: &str) {
    let mut output = io::stdout().lock();
    // A closed output does not stop the simulation.
    let _ = output.write_all(text.as_bytes()).and_then(|()| output.flush());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_report_counts_acknowledged_readings_per_device() {
        let tally = Tally::default();
        tally.acknowledge("press-1", 2, 10, 11);
        tally.acknowledge("press-1", 1, 5, 5);
        tally.give_up("press-2", 3);
        let file = tempfile::NamedTempFile::new().unwrap();
        tally.write(file.path()).unwrap();
        let report: serde_json::Value = serde_json::from_slice(&std::fs::read(file.path()).unwrap()).unwrap();
        assert_eq!((&report["messages"], &report["readings"]), (&2.into(), &3.into()));
        let press = &report["devices"]["press-1"];
        assert_eq!((&press["readings"], &press["firstTimestamp"], &press["lastTimestamp"]), (&3.into(), &5.into(), &11.into()));
        assert_eq!(report["devices"]["press-2"]["unacknowledgedReadings"], 3);
    }
}
