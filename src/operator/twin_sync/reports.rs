//! Reports of devices on their way into the fleet: only what is news, and not too often.

use std::time::Duration;

use tokio::time::Instant;

use super::metrics::Metrics;
use super::pace::Pace;
use crate::api::condition::Cause;
use crate::api::device::ReportedStatus;
use crate::operator::device::fleet::SharedFleet;
use crate::operator::device::key::DeviceKey;
use crate::operator::device::twin::parse_report;
use crate::runtime::error::chain;

/// A device's reports become at most one write of its status in this time; the latest one counts.
pub const INTERVAL: Duration = Duration::from_secs(5);

/// And those of all devices together so many a second where nothing else is set, as many as connections may be written.
pub const DEFAULT_WRITES_PER_SECOND: f64 = 50.0;

/// What a device said, not yet looked at.
#[derive(Clone, Debug)]
pub struct Report {
    /// The device.
    pub device: DeviceKey,
    /// The message.
    pub payload: Box<[u8]>,
}

/// A report as it waits: what cannot be used needs not be kept.
type Waiting = Result<Box<[u8]>, Cause>;

/// Reports that wait for their turn.
#[derive(Debug)]
pub struct Reports {
    fleet: SharedFleet,
    pace: Pace<DeviceKey, Waiting>,
    metrics: Metrics,
}

impl Reports {
    /// None yet; at most `writes_per_second` of all devices together.
    #[must_use]
    pub fn new(fleet: SharedFleet, writes_per_second: f64, metrics: Metrics, now: Instant) -> Self {
        metrics.budget.set(writes_per_second);
        Self { fleet, pace: Pace::new(INTERVAL, writes_per_second, now), metrics }
    }

    /// A device said something.
    pub fn offer(&mut self, report: Report, now: Instant) {
        let Report { device, payload } = report;
        let Some(parsed) = parse(&payload) else { return self.count("empty") };
        let Some(news) = self.fleet.lock().is_news(&device, &parsed) else { return self.count("unknown") };
        // What it said before, and waits still, is worth nothing any more.
        if !news && !self.pace.is_waiting(&device) {
            return self.count("unchanged");
        }
        self.count(if parsed.is_ok() { "accepted" } else { "refused" });
        self.pace.offer(device, parsed.map(|_| payload), now);
        self.metrics.waiting.set(i64::try_from(self.pace.len()).unwrap_or(i64::MAX));
    }

    /// When the next one is due.
    #[must_use]
    pub fn next_due(&self) -> Option<Instant> {
        self.pace.next_due()
    }

    /// Hands those whose turn has come to the fleet.
    pub fn advance(&mut self, now: Instant) {
        while let Some((device, waiting)) = self.pace.take(now) {
            let report = match waiting {
                Ok(payload) => parse(&payload),
                Err(cause) => Some(Err(cause)),
            };
            let Some(report) = report else { continue };
            let mut fleet = self.fleet.lock();
            if fleet.is_news(&device, &report) == Some(true) {
                fleet.reported(&device, report);
                drop(fleet);
                self.fleet.wake();
                self.pace.used(device, now);
            }
        }
        self.metrics.waiting.set(i64::try_from(self.pace.len()).unwrap_or(i64::MAX));
    }

    fn count(&self, outcome: &str) {
        self.metrics.reports.with_label_values(&[outcome]).inc();
    }
}

fn parse(payload: &[u8]) -> Option<Result<ReportedStatus, Cause>> {
    parse_report(payload).map_err(|error| Cause::new(error.reason(), chain(&error))).transpose()
}
