//! The metrics of the messages of a session.

use std::time::Duration;

use super::InFlight;
use super::waiting::MAX_PARKED;
use crate::decode::time::Time;
use crate::ingest::session::RECEIVE_MAXIMUM;
use crate::sink::batch::Batch;
use crate::sink::job::Done;

impl InFlight {
    pub(super) fn observe(&self, done: &Done) {
        let metrics = &self.metrics;
        metrics.batches.inc();
        metrics.rows.inc_by(done.written.rows);
        metrics.redelivered.inc_by(done.written.redelivered);
        metrics.merged.inc_by(done.written.merged);
        metrics.conflicts.inc_by(done.written.resolved);
        metrics.commit.observe(done.took.as_secs_f64());
        for (number, refusal) in &done.written.dead_letters {
            metrics.refused(refusal.reason, !done.written.discarded.contains(number));
        }
        let now = Time::now();
        // Collected locally first, because each observation takes several atomic operations.
        let processing = metrics.processing.local();
        for arrival in done.batch.arrivals() {
            processing.observe(seconds(arrival, now));
        }
        processing.flush();
        if let Some((_, newest)) = done.batch.rows.span(0..done.batch.rows.len())
            && !self.processor.stream.takes_arrival_time()
        {
            metrics.latency.observe(seconds(newest, now));
        }
    }

    /// The used share of the memory limit, of the parked messages or of the receive maximum, whichever is largest: from 0 to 1.
    #[allow(clippy::cast_precision_loss, reason = "megabytes, and thousands of messages")]
    fn pressure(&self) -> f64 {
        let share = |used: usize, max: usize| used as f64 / max as f64;
        let window = share(self.window.len(), RECEIVE_MAXIMUM.into());
        // Messages of unknown devices slow nothing down while the registry answers.
        let parked = if self.registry.is_current() { 0.0 } else { share(self.parked.len(), MAX_PARKED) };
        parked.max(share(self.held(), self.max_bytes)).max(window).min(1.0)
    }

    /// Updates the gauges.
    pub fn update_gauges(&self) {
        self.metrics.back_pressure.set(self.pressure());
        self.metrics.unacknowledged.set(i64::try_from(self.window.len()).unwrap_or(i64::MAX));
        self.metrics.held_bytes.set(i64::try_from(self.held() + self.backlog.bytes()).unwrap_or(i64::MAX));
        self.metrics.lag.set(self.oldest().map_or(0.0, |oldest| seconds(oldest, Time::now())));
    }

    /// The arrival of the oldest message that is not stored.
    fn oldest(&self) -> Option<Time> {
        let writing = self.writing.iter().filter_map(|writing| writing.arrival);
        let gathered = self.sealed.iter().chain([&self.open]).filter_map(Batch::arrival);
        writing.chain(gathered).chain(self.parked.oldest()).chain(self.backlog.oldest()).min()
    }
}

fn seconds(from: Time, to: Time) -> f64 {
    Duration::from_micros(u64::try_from(to.0.saturating_sub(from.0)).unwrap_or(0)).as_secs_f64()
}
