//! The messages of a session that are not acknowledged: those that are batched, those that are written, and those that may be
//! acknowledged. Does no input or output.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use tokio::sync::{OwnedSemaphorePermit, mpsc};
use tokio_util::sync::CancellationToken;
use tracing::debug;

use super::RECEIVE_MAXIMUM;
use crate::decode::time::Time;
use crate::ingest::metrics::SessionMetrics;
use crate::ingest::processor::{InboundMessage, PendingDevice, Processor};
use crate::mqtt::frame::Publish;
use crate::mqtt::window::Window;
use crate::sink::batch::Batch;
use crate::sink::batch::policy::{BatchPolicy, MAX_BYTES, is_full};
use crate::sink::job::{Done, Job};
use crate::sink::timescale::copy::Rows;
use crate::sink::timescale::writers::WRITERS;
use crate::state::redelivery::{Acknowledged, RedeliveryEntry, RedeliveryLog};
use crate::state::registry::follow::DeviceRegistry;
use crate::state::session::SessionKey;

/// The maximum number of messages that wait until the registry has looked up their device. The session does not read beyond it.
const MAX_PARKED: usize = 1_000;

/// The unacknowledged messages of a session.
pub struct InFlight {
    processor: Processor,
    registry: Arc<DeviceRegistry>,
    metrics: SessionMetrics,
    key: Arc<SessionKey>,
    window: Window,
    redelivery: RedeliveryLog,
    open: Batch,
    sealed: VecDeque<Batch>,
    /// Buffers of written batches, for reuse.
    spare: Vec<Rows>,
    parked: Vec<InboundMessage>,
    /// The batches that are being written: number, and arrival of the oldest message.
    writing: Vec<(i64, Option<Time>)>,
    writing_bytes: usize,
    next_number: i64,
    policy: BatchPolicy,
    last_submitted: Instant,
    /// Acknowledged messages with redelivery entries that no PINGREQ has followed yet.
    acknowledged: Vec<Acknowledged>,
    /// The PINGREQs without an answer.
    fences: VecDeque<Fence>,
}

/// Each generation of a session has 2^40 batch numbers: enough for a century at 300 batches per second.
const BATCH_BITS: u32 = 40;

/// A PINGREQ, and what its answer proves.
#[derive(Debug)]
enum Fence {
    /// The first PINGREQ of a connection: before its answer, most brokers have sent all unacknowledged messages again.
    Login,
    /// The broker has processed these acknowledgements before the answer.
    Acknowledged(Vec<Acknowledged>),
    /// The same. The login was so long ago that every broker has sent all unacknowledged messages again.
    Regular(Vec<Acknowledged>),
}

impl InFlight {
    /// A session with its entries in the database.
    pub fn new(
        processor: Processor,
        registry: Arc<DeviceRegistry>,
        metrics: SessionMetrics,
        key: SessionKey,
        entries: Vec<(i64, Vec<RedeliveryEntry>)>,
    ) -> Self {
        // Larger than the numbers of all earlier processes: the database may still execute a transaction of a killed process, whose batch
        // must not have the number of a batch of this process.
        let next_number = key.generation << BATCH_BITS;
        let mut redelivery = RedeliveryLog::default();
        for (batch, entries) in entries {
            redelivery.commit(batch, entries);
        }
        Self {
            processor,
            registry,
            metrics,
            key: Arc::new(key),
            window: Window::default(),
            redelivery,
            open: Batch::default(),
            sealed: VecDeque::new(),
            spare: Vec::new(),
            parked: Vec::new(),
            writing: Vec::new(),
            writing_bytes: 0,
            next_number,
            policy: BatchPolicy::default(),
            last_submitted: Instant::now(),
            acknowledged: Vec::new(),
            fences: VecDeque::new(),
        }
    }

    /// The session's key.
    pub fn key(&self) -> &SessionKey {
        &self.key
    }

    /// Takes the messages of a block. Redeliveries are settled immediately.
    pub fn take(&mut self, block: &Bytes, messages: &[Publish]) {
        if messages.is_empty() {
            return;
        }
        let registry = self.registry.clone();
        let devices = registry.read();
        let arrival = Time::now();
        self.open.add_block(block.clone(), arrival);
        for publish in messages {
            self.metrics.bytes.inc_by((publish.payload.end - publish.topic.start) as u64);
            let place = self.window.arrive(publish.packet_id);
            if self.is_redelivery(block, publish) {
                self.metrics.redelivered.inc();
                self.window.settle(place);
                continue;
            }
            let mut message = InboundMessage { block: block.clone(), publish: publish.clone(), place, arrival, is_observed: false };
            if let Err(PendingDevice(name)) = self.processor.process(&message, &devices, &mut self.open) {
                debug!(name, "a message waits for the lookup of its device");
                registry.ask(name);
                message.is_observed = true;
                self.parked.push(message);
            }
        }
        self.metrics.sequence_gaps.inc_by(self.processor.stream.take_gaps());
        self.metrics.messages.inc_by(messages.len() as u64);
        if is_full(self.open.rows.len(), self.open.size()) {
            self.seal();
        }
    }

    fn is_redelivery(&mut self, block: &Bytes, publish: &Publish) -> bool {
        let hash = || RedeliveryEntry::new(publish.packet_id, &block[publish.topic.clone()], &block[publish.payload.clone()]).hash;
        self.redelivery.holds(publish.packet_id, publish.duplicate, hash)
    }

    /// Takes the messages whose device lookup is complete.
    pub fn take_parked(&mut self) {
        if self.parked.is_empty() {
            return;
        }
        let registry = self.registry.clone();
        let devices = registry.read();
        for message in std::mem::take(&mut self.parked) {
            self.open.add_block(message.block.clone(), message.arrival);
            if let Err(PendingDevice(name)) = self.processor.process(&message, &devices, &mut self.open) {
                registry.ask(name);
                self.parked.push(message);
            }
        }
    }

    /// Whether the session may read more messages.
    pub fn has_room(&self, max_bytes: usize) -> bool {
        self.parked.len() < MAX_PARKED && self.held() < max_bytes
    }

    /// The used share of the memory limit, of the parked messages or of the receive maximum, whichever is largest: from 0 to 1.
    #[allow(clippy::cast_precision_loss, reason = "megabytes, and thousands of messages")]
    fn pressure(&self, max_bytes: usize) -> f64 {
        let share = |used: usize, max: usize| used as f64 / max as f64;
        let window = share(self.window.len(), RECEIVE_MAXIMUM.into());
        share(self.parked.len(), MAX_PARKED).max(share(self.held(), max_bytes)).max(window).min(1.0)
    }

    fn held(&self) -> usize {
        self.writing_bytes + self.open.size() + self.sealed.iter().map(Batch::size).sum::<usize>()
    }

    /// When the next batch is due. `None` if there is no batch.
    pub fn due(&self) -> Option<Instant> {
        if !self.sealed.is_empty() {
            return Some(self.last_submitted);
        }
        (!self.open.is_empty()).then(|| self.last_submitted + self.policy.interval())
    }

    /// The next batch, as a job.
    pub fn next_job(&mut self, slot: OwnedSemaphorePermit, done: mpsc::UnboundedSender<Done>, lost: CancellationToken) -> Option<Job> {
        if self.sealed.is_empty() {
            self.seal();
        }
        let mut batch = self.sealed.pop_front()?;
        self.metrics.redelivered.inc_by(batch.arrange());
        let holds_all_entries = self.processor.stream.takes_arrival_time();
        let entries = if holds_all_entries {
            (0..u32::try_from(batch.len()).unwrap_or(u32::MAX)).filter_map(|number| batch.entry(number)).collect()
        } else {
            batch.dead_letters.keys().filter_map(|number| batch.entry(*number)).collect()
        };
        let number = self.next_number;
        self.next_number += 1;
        self.writing.push((number, batch.arrival()));
        self.writing_bytes += batch.size();
        self.last_submitted = Instant::now();
        let expired = self.redelivery.take_expired();
        Some(Job { batch, session: self.key.clone(), number, entries, holds_all_entries, expired, slot, done, lost })
    }

    fn seal(&mut self) {
        if !self.open.is_empty() {
            let next = Batch::reusing(self.spare.pop().unwrap_or_default());
            self.sealed.push_back(std::mem::replace(&mut self.open, next));
        }
    }

    /// A batch is committed: its messages may be acknowledged.
    pub fn committed(&mut self, done: Done) {
        self.writing.retain(|(number, _)| *number != done.number);
        self.writing_bytes = self.writing_bytes.saturating_sub(done.batch.size());
        self.policy.committed(done.took);
        for place in done.batch.places() {
            self.window.settle(place);
        }
        self.observe(&done);
        self.redelivery.commit(done.number, done.written.entries);
        // Reuse avoids fragmentation by buffers that grow to a megabyte each time. A buffer that large messages have enlarged is freed.
        if self.spare.len() < WRITERS && done.batch.rows.size() <= MAX_BYTES {
            self.spare.push(done.batch.rows);
        }
    }

    fn observe(&self, done: &Done) {
        let metrics = &self.metrics;
        metrics.batches.inc();
        metrics.rows.inc_by(done.written.rows);
        metrics.redelivered.inc_by(done.written.redelivered);
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

    /// The next message to acknowledge.
    pub fn next_acknowledgement(&mut self) -> Option<u16> {
        let packet_id = self.window.next_settled()?;
        self.acknowledged.extend(self.redelivery.acknowledge(packet_id));
        Some(packet_id)
    }

    /// The topics of the rebirth commands to publish.
    pub fn take_rebirths(&mut self) -> Vec<String> {
        let topics = self.processor.stream.take_rebirths();
        self.metrics.rebirths.inc_by(topics.len() as u64);
        topics
    }

    /// Whether a PINGREQ should follow the acknowledgements.
    pub fn wants_fence(&self) -> bool {
        !self.acknowledged.is_empty()
    }

    /// A PINGREQ is sent after acknowledgements.
    pub fn fence(&mut self) {
        self.fences.push_back(Fence::Acknowledged(std::mem::take(&mut self.acknowledged)));
    }

    /// A keep alive PINGREQ is sent, some seconds after the login or the previous one.
    pub fn regular_fence(&mut self) {
        self.fences.push_back(Fence::Regular(std::mem::take(&mut self.acknowledged)));
    }

    /// A PINGREQ is answered: the broker has processed the packets before it.
    pub fn fence_answered(&mut self) {
        match self.fences.pop_front() {
            Some(Fence::Login) => self.redelivery.expect_marked(),
            Some(Fence::Acknowledged(acknowledged)) => self.confirm(acknowledged),
            Some(Fence::Regular(acknowledged)) => {
                self.confirm(acknowledged);
                self.redelivery.end_resending();
            }
            None => {}
        }
    }

    fn confirm(&mut self, acknowledged: Vec<Acknowledged>) {
        for acknowledged in acknowledged {
            self.redelivery.confirm(acknowledged);
        }
    }

    /// The connection has ended.
    pub fn disconnected(&mut self) {
        self.window.reset();
        self.acknowledged.clear();
        self.fences.clear();
    }

    /// A connection begins, and its first PINGREQ is sent. `present`: the broker has kept the session.
    pub fn connected(&mut self, present: bool) {
        if present {
            self.redelivery.resume();
        } else {
            self.redelivery.clear();
        }
        self.fences.push_back(Fence::Login);
    }

    /// Whether everything that was read is committed.
    pub fn is_settled(&self) -> bool {
        self.writing.is_empty() && self.open.is_empty() && self.sealed.is_empty() && self.parked.is_empty()
    }

    /// Whether everything that was read is committed and acknowledged.
    pub fn is_idle(&self) -> bool {
        self.is_settled() && self.window.is_empty()
    }

    /// The number of PINGREQs without an answer.
    pub fn pings(&self) -> usize {
        self.fences.len()
    }

    /// Drops the messages that wait for the registry. The broker keeps them.
    pub fn drop_parked(&mut self) {
        self.parked.clear();
    }

    /// Updates the gauges.
    pub fn update_gauges(&self, max_bytes: usize) {
        self.metrics.back_pressure.set(self.pressure(max_bytes));
        self.metrics.unacknowledged.set(i64::try_from(self.window.len()).unwrap_or(i64::MAX));
        self.metrics.held_bytes.set(i64::try_from(self.held()).unwrap_or(i64::MAX));
        self.metrics.lag.set(self.oldest().map_or(0.0, |oldest| seconds(oldest, Time::now())));
    }

    /// The arrival of the oldest message that is not stored.
    fn oldest(&self) -> Option<Time> {
        let writing = self.writing.iter().filter_map(|(_, arrival)| *arrival);
        let gathered = self.sealed.iter().chain([&self.open]).filter_map(Batch::arrival);
        writing.chain(gathered).chain(self.parked.iter().map(|message| message.arrival)).min()
    }
}

fn seconds(from: Time, to: Time) -> f64 {
    Duration::from_micros(u64::try_from(to.0.saturating_sub(from.0)).unwrap_or(0)).as_secs_f64()
}

#[cfg(test)]
#[path = "in_flight_tests.rs"]
mod tests;
