//! Passes reports of devices to the index: only changes, and within a rate limit.

use std::time::Duration;

use tokio::time::Instant;

use super::metrics::TwinSyncMetrics;
use crate::api::condition::Cause;
use crate::api::device::ReportedStatus;
use crate::operator::device::index::SharedDeviceIndex;
use crate::operator::device::key::DeviceKey;
use crate::operator::device::twin::parse_report;
use crate::runtime::error::chain;
use crate::runtime::rate_limited_queue::{Limits, Rate, RateLimitedQueue};

/// Lower limit of the time between two writes of a device's reports. The latest report counts.
pub const MIN_INTERVAL: Duration = Duration::from_secs(5);

/// Default limit of report writes per second for all devices together, the same as for connection states.
pub const DEFAULT_WRITES_PER_SECOND: f64 = 50.0;

/// A message of a device, not parsed yet.
#[derive(Clone, Debug)]
pub struct Report {
    /// The device.
    pub device: DeviceKey,
    /// The message.
    pub payload: Box<[u8]>,
}

/// A queued report. A rejected one keeps only the cause.
type QueuedReport = Result<Box<[u8]>, Cause>;

/// The queue of reports.
#[derive(Debug)]
pub struct ReportQueue {
    index: SharedDeviceIndex,
    queue: RateLimitedQueue<DeviceKey, QueuedReport>,
    metrics: TwinSyncMetrics,
}

impl ReportQueue {
    /// An empty queue with at most `writes_per_second` for all devices together.
    #[must_use]
    pub fn new(index: SharedDeviceIndex, writes_per_second: f64, metrics: TwinSyncMetrics, now: Instant) -> Self {
        metrics.budget.set(writes_per_second);
        let rate = Rate { per_second: writes_per_second, burst_seconds: 1.0 };
        let limits = Limits { rate: Some(rate), min_interval: MIN_INTERVAL, ..Limits::default() };
        Self { index, queue: RateLimitedQueue::new(limits, now), metrics }
    }

    /// Queues the message of a device.
    pub fn offer(&mut self, report: Report, now: Instant) {
        let Report { device, payload } = report;
        let Some(parsed) = parse(&payload) else { return self.count("empty") };
        let Some(news) = self.index.lock().is_news(&device, &parsed) else { return self.count("unknown") };
        // It replaces a queued report with another state.
        if !news && !self.queue.contains(&device) {
            return self.count("unchanged");
        }
        self.count(if parsed.is_ok() { "accepted" } else { "refused" });
        self.queue.insert(device, parsed.map(|_| payload), now, now);
        self.metrics.waiting.set(i64::try_from(self.queue.ready() + self.queue.delayed()).unwrap_or(i64::MAX));
    }

    /// When the next report is due.
    #[must_use]
    pub fn next_due(&self) -> Option<Instant> {
        self.queue.next_due()
    }

    /// Passes the due reports to the index.
    pub fn advance(&mut self, now: Instant) {
        while let Some((device, waiting)) = self.queue.pop(now) {
            let report = match waiting {
                Ok(payload) => parse(&payload),
                Err(cause) => Some(Err(cause)),
            };
            if report.is_some_and(|report| self.pass_on(&device, report)) {
                self.queue.done(&device, now);
            } else {
                self.queue.skip(&device, now);
            }
        }
        self.metrics.waiting.set(i64::try_from(self.queue.ready() + self.queue.delayed()).unwrap_or(i64::MAX));
    }

    /// Passes a report to the index. Returns whether it differs from the last one.
    fn pass_on(&self, device: &DeviceKey, report: Result<ReportedStatus, Cause>) -> bool {
        let mut index = self.index.lock();
        let changed = index.is_news(device, &report) == Some(true);
        if changed {
            index.reported(device, report);
            drop(index);
            self.index.wake();
        }
        changed
    }

    fn count(&self, outcome: &str) {
        self.metrics.reports.with_label_values(&[outcome]).inc();
    }
}

fn parse(payload: &[u8]) -> Option<Result<ReportedStatus, Cause>> {
    parse_report(payload).map_err(|error| Cause::new(error.reason(), chain(&error))).transpose()
}
