//! The messages of a session that are not acknowledged: those that are batched, those that are written, and those that may be
//! acknowledged. Does no input or output.

mod fences;
mod observe;
mod waiting;

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Instant;

use bytes::Bytes;
use tokio::sync::{OwnedSemaphorePermit, mpsc};
use tokio_util::sync::CancellationToken;

use self::fences::Fence;
use self::waiting::{MAX_BLOCKED, Waiting};
use crate::decode::time::Time;
use crate::ingest::metrics::SessionMetrics;
use crate::ingest::processor::{InboundMessage, PendingDevice, Processor};
use crate::mqtt::frame::Publish;
use crate::mqtt::window::Window;
use crate::sink::batch::Batch;
use crate::sink::batch::policy::{BatchPolicy, MAX_BYTES};
use crate::sink::job::{Done, Finished, Job, Refused};
use crate::sink::timescale::copy::Rows;
use crate::sink::timescale::writers::WRITERS;
use crate::state::redelivery::{Acknowledged, RedeliveryEntry, RedeliveryLog};
use crate::state::registry::follow::{DeviceRegistry, Devices};
use crate::state::session::SessionKey;

/// How far the messages of one block may exceed the memory limit before the rest of the block waits, in bytes. A block of 64 KiB
/// of ordinary messages takes less.
const MAX_OVERRUN: usize = 1024 * 1024;

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
    sealed_bytes: usize,
    /// Buffers of written batches, for reuse.
    spare: Vec<Rows>,
    /// The messages that wait until the registry has looked up their device.
    parked: Waiting,
    /// The rest of a block whose other messages reached the memory limit.
    backlog: Waiting,
    /// The maximum memory of the messages, in bytes.
    max_bytes: usize,
    /// The batches that are being written.
    writing: Vec<Writing>,
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

/// A batch that is being written.
#[derive(Debug)]
struct Writing {
    number: i64,
    /// Arrival of the oldest message.
    arrival: Option<Time>,
    bytes: usize,
}

impl InFlight {
    /// A session with its entries in the database.
    pub fn new(
        processor: Processor,
        registry: Arc<DeviceRegistry>,
        metrics: SessionMetrics,
        key: SessionKey,
        entries: Vec<(i64, Vec<RedeliveryEntry>)>,
        max_bytes: usize,
    ) -> Self {
        // Larger than the numbers of all earlier processes: the database may still execute a transaction of a killed process, whose batch
        // must not have the number of a batch of this process.
        let next_number = key.generation << BATCH_BITS;
        let mut redelivery = RedeliveryLog::default();
        for (batch, entries) in entries {
            if entries.is_empty() {
                // A batch that was divided.
                redelivery.put_back_expired(vec![batch]);
            }
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
            sealed_bytes: 0,
            spare: Vec::new(),
            parked: Waiting::default(),
            backlog: Waiting::default(),
            max_bytes,
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
        for publish in messages {
            self.metrics.bytes.inc_by((publish.payload.end - publish.topic.start) as u64);
            let place = self.window.arrive(publish.packet_id);
            if self.is_redelivery(block, publish) {
                self.metrics.redelivered.inc();
                self.window.settle(place);
                continue;
            }
            let message = InboundMessage { block: block.clone(), publish: publish.clone(), place, arrival, is_observed: false };
            if self.backlog.is_empty() && self.held() < self.max_bytes + MAX_OVERRUN {
                self.process(&message, &devices);
            } else {
                self.backlog.push(message);
            }
        }
        self.metrics.sequence_gaps.inc_by(self.processor.stream.take_gaps());
        self.metrics.messages.inc_by(messages.len() as u64);
        // Their grace period must not hold up the acknowledgements of other devices.
        if self.window.blocked() > MAX_BLOCKED && registry.is_current() {
            self.refuse_parked();
        }
    }

    /// Adds a message to the open batch, or parks it.
    fn process(&mut self, message: &InboundMessage, devices: &Devices) {
        self.add_block(message);
        if let Err(PendingDevice(name)) = self.processor.process(message, devices, &mut self.open) {
            // While the registry cannot answer, every message waits, and the session stops reading.
            if self.parked.is_full() && self.registry.is_current() {
                self.processor.refuse_unknown(message, &mut self.open);
            } else {
                self.registry.ask(name);
                self.parked.push(InboundMessage { is_observed: true, ..message.detached() });
                self.open.drop_unused_block();
            }
        }
        if self.open.is_full() {
            self.seal();
        }
    }

    fn add_block(&mut self, message: &InboundMessage) {
        if !self.open.ends_with(&message.block) {
            self.open.add_block(message.block.clone(), message.arrival);
        }
    }

    fn refuse_parked(&mut self) {
        while let Some(message) = self.parked.pop() {
            self.add_block(&message);
            self.processor.refuse_unknown(&message, &mut self.open);
            if self.open.is_full() {
                self.seal();
            }
        }
    }

    /// Takes the rest of a block, as far as there is memory.
    fn take_backlog(&mut self) {
        if self.backlog.is_empty() {
            return;
        }
        let registry = self.registry.clone();
        let devices = registry.read();
        while self.held() < self.max_bytes
            && let Some(message) = self.backlog.pop()
        {
            self.process(&message, &devices);
        }
        self.metrics.sequence_gaps.inc_by(self.processor.stream.take_gaps());
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
        let mut parked = std::mem::take(&mut self.parked);
        while let Some(message) = parked.pop() {
            match self.processor.pending_device(&message, &devices) {
                Some(name) => {
                    registry.ask(name);
                    self.parked.push(message);
                }
                None => self.process(&message, &devices),
            }
        }
    }

    /// Whether the session may read more messages.
    pub fn has_room(&self) -> bool {
        self.backlog.is_empty() && self.held() < self.max_bytes && (!self.parked.is_full() || self.registry.is_current())
    }

    fn held(&self) -> usize {
        self.writing_bytes + self.open.size() + self.sealed_bytes + self.parked.bytes()
    }

    /// Time at which the next batch is due. `None` if there is no batch.
    pub fn due(&self) -> Option<Instant> {
        if !self.sealed.is_empty() {
            return Some(self.last_submitted);
        }
        (!self.open.is_empty()).then(|| self.last_submitted + self.policy.interval())
    }

    /// The next batch, as a job.
    pub fn next_job(&mut self, slot: OwnedSemaphorePermit, done: mpsc::UnboundedSender<Finished>, lost: CancellationToken) -> Option<Job> {
        if self.sealed.is_empty() {
            self.seal();
        }
        let mut batch = self.sealed.pop_front()?;
        self.sealed_bytes -= batch.size();
        let arranged = batch.arrange(self.processor.rows.on_conflict);
        self.metrics.redelivered.inc_by(arranged.repeated);
        self.metrics.merged.inc_by(arranged.merged);
        self.metrics.conflicts.inc_by(arranged.resolved);
        let holds_all_entries = self.processor.stream.takes_arrival_time();
        let entries = batch.entries(holds_all_entries);
        let number = self.next_number;
        self.next_number += 1;
        self.writing.push(Writing { number, arrival: batch.arrival(), bytes: batch.size() });
        self.writing_bytes += batch.size();
        self.last_submitted = Instant::now();
        let expired = self.redelivery.take_expired();
        Some(Job { batch, session: self.key.clone(), number, entries, holds_all_entries, expired, slot, done, lost })
    }

    fn seal(&mut self) {
        if !self.open.is_empty() {
            let next = Batch::reusing(self.spare.pop().unwrap_or_default());
            let sealed = std::mem::replace(&mut self.open, next);
            self.sealed_bytes += sealed.size();
            self.sealed.push_back(sealed);
        }
    }

    /// A batch comes back.
    pub fn finished(&mut self, finished: Finished) {
        match finished {
            Finished::Committed(done) => self.committed(done),
            Finished::Refused(refused) => self.refused(refused),
        }
        self.take_backlog();
    }

    /// The database refuses a batch as a whole: its halves are batches of their own, until the faulty message is found.
    fn refused(&mut self, refused: Refused) {
        self.written(refused.number);
        self.redelivery.put_back_expired(refused.expired);
        let [first, second] = refused.batch.halves();
        for half in [second, first] {
            self.sealed_bytes += half.size();
            self.sealed.push_front(half);
        }
    }

    fn written(&mut self, number: i64) {
        if let Some(index) = self.writing.iter().position(|writing| writing.number == number) {
            self.writing_bytes -= self.writing.swap_remove(index).bytes;
        }
    }

    /// A batch is committed: its messages may be acknowledged.
    fn committed(&mut self, done: Done) {
        self.written(done.number);
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

    /// The topics of the rebirth commands to publish.
    pub fn take_rebirths(&mut self) -> Vec<String> {
        let topics = self.processor.stream.take_rebirths();
        self.metrics.rebirths.inc_by(topics.len() as u64);
        topics
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
        self.writing.is_empty() && self.open.is_empty() && self.sealed.is_empty() && self.parked.is_empty() && self.backlog.is_empty()
    }

    /// Whether everything that was read is committed and acknowledged.
    pub fn is_idle(&self) -> bool {
        self.is_settled() && self.window.is_empty()
    }

    /// The number of PINGREQs without an answer.
    pub fn pings(&self) -> usize {
        self.fences.len()
    }

    /// Drops the messages that wait. The broker keeps them.
    pub fn drop_waiting(&mut self) {
        self.parked = Waiting::default();
        self.backlog = Waiting::default();
    }
}

#[cfg(test)]
mod bounds_tests;
#[cfg(test)]
#[path = "in_flight_tests.rs"]
mod tests;
