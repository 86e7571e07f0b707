//! The messages of a session on their way into the database and back to the broker: what is gathered, what is being
//! written, what may be acknowledged.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use tokio::sync::{OwnedSemaphorePermit, mpsc};
use tokio_util::sync::CancellationToken;
use tracing::debug;

use crate::decode::time::Time;
use crate::ingest::metrics::SessionMetrics;
use crate::ingest::processor::{InboundMessage, PendingDevice, Processor};
use crate::mqtt::connection::RECEIVE_MAXIMUM;
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

/// The most messages that wait for the registry to answer for their device. Reading stops beyond it, until it has answered.
const MOST_PARKED: usize = 1_000;

/// The state of a session that does no input or output of its own.
pub struct Store {
    processor: Processor,
    registry: Arc<DeviceRegistry>,
    metrics: SessionMetrics,
    key: Arc<SessionKey>,
    window: Window,
    redelivery: RedeliveryLog,
    open: Batch,
    sealed: VecDeque<Batch>,
    /// Memory of written batches for the next ones.
    spare: Vec<Rows>,
    parked: Vec<InboundMessage>,
    /// The batches that are being written: number, and arrival of the oldest message.
    in_flight: Vec<(i64, Option<Time>)>,
    in_flight_bytes: usize,
    next_number: i64,
    policy: BatchPolicy,
    last_submitted: Instant,
    /// Acknowledged messages with redelivery entries that no PINGREQ has followed yet.
    acknowledged: Vec<Acknowledged>,
    /// The PINGREQs that are not answered.
    fences: VecDeque<Fence>,
}

/// Each generation of a session has 2^40 numbers for its batches: more than a century's, at hundreds a second.
const BATCH_BITS: u32 = 40;

/// A PINGREQ.
#[derive(Debug)]
enum Fence {
    /// The first one of a connection: most brokers have sent again before the answer what they have to send again.
    Login,
    /// The broker has processed these before the answer.
    Acknowledged(Vec<Acknowledged>),
    /// The same; and it is so long since the login that every broker has sent that again.
    Regular(Vec<Acknowledged>),
}

impl Store {
    /// A session with what the database kept of it.
    pub fn new(
        processor: Processor,
        registry: Arc<DeviceRegistry>,
        metrics: SessionMetrics,
        key: SessionKey,
        entries: Vec<(i64, Vec<RedeliveryEntry>)>,
    ) -> Self {
        // Beyond all of the processes before: what one that was killed had sent to the database may still be carried out, and is not to
        // meet a batch of this one by its number.
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
            in_flight: Vec::new(),
            in_flight_bytes: 0,
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

    /// Takes the messages of a block. Those that say nothing new are settled at once.
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
                debug!(name, "a message waits for the registry to answer for its device");
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

    /// Takes the messages whose devices the registry has answered for by now.
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

    /// Whether there is room for more.
    pub fn has_room(&self, budget: usize) -> bool {
        self.parked.len() < MOST_PARKED && self.held() < budget
    }

    /// How much of that room is taken, from 0 to 1; or of the window, beyond which the broker sends no more.
    #[allow(clippy::cast_precision_loss, reason = "some megabytes, and some thousand messages")]
    fn pressure(&self, budget: usize) -> f64 {
        let share = |of: usize, most: usize| of as f64 / most as f64;
        let window = share(self.window.len(), RECEIVE_MAXIMUM.into());
        share(self.parked.len(), MOST_PARKED).max(share(self.held(), budget)).max(window).min(1.0)
    }

    fn held(&self) -> usize {
        self.in_flight_bytes + self.open.size() + self.sealed.iter().map(Batch::size).sum::<usize>()
    }

    /// When the next batch is due; `None` while there is none.
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
        self.in_flight.push((number, batch.arrival()));
        self.in_flight_bytes += batch.size();
        self.last_submitted = Instant::now();
        let expired = self.redelivery.take_expired();
        Some(Job { batch, session: self.key.clone(), number, entries, holds_all_entries, expired, _slot: slot, done, lost })
    }

    fn seal(&mut self) {
        if !self.open.is_empty() {
            let next = Batch::reusing(self.spare.pop().unwrap_or_default());
            self.sealed.push_back(std::mem::replace(&mut self.open, next));
        }
    }

    /// A batch is committed: its messages may be acknowledged.
    pub fn committed(&mut self, done: Done) {
        self.in_flight.retain(|(number, _)| *number != done.number);
        self.in_flight_bytes = self.in_flight_bytes.saturating_sub(done.batch.size());
        self.policy.committed(done.took);
        for place in done.batch.places() {
            self.window.settle(place);
        }
        self.observe(&done);
        self.redelivery.commit(done.number, done.written.entries);
        // Buffers that grow to a megabyte again and again would leave holes of their size behind. One that large messages have
        // blown up is let go.
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
        // Gathered first: an observation of its own for every message would be several atomic operations.
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

    /// The topics of the commands by which nodes are to be asked for their births.
    pub fn take_rebirths(&mut self) -> Vec<String> {
        let topics = self.processor.stream.take_rebirths();
        self.metrics.rebirths.inc_by(topics.len() as u64);
        topics
    }

    /// Whether acknowledgements were given that a PINGREQ should follow.
    pub fn wants_fence(&self) -> bool {
        !self.acknowledged.is_empty()
    }

    /// A PINGREQ is sent behind acknowledgements.
    pub fn fence(&mut self) {
        self.fences.push_back(Fence::Acknowledged(std::mem::take(&mut self.acknowledged)));
    }

    /// A PINGREQ is sent because it is time for one: some seconds after the login or the one before.
    pub fn pulse(&mut self) {
        self.fences.push_back(Fence::Regular(std::mem::take(&mut self.acknowledged)));
    }

    /// A PINGREQ is answered: the broker has processed what was sent before it.
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

    /// A connection begins, and its first PINGREQ is sent. `present` tells whether the broker has kept the session.
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
        self.in_flight.is_empty() && self.open.is_empty() && self.sealed.is_empty() && self.parked.is_empty()
    }

    /// Whether everything that was read is committed and acknowledged.
    pub fn is_idle(&self) -> bool {
        self.is_settled() && self.window.is_empty()
    }

    /// How many PINGREQs are not answered.
    pub fn pings(&self) -> usize {
        self.fences.len()
    }

    /// Lets go of the messages that wait for the registry: the broker still has them.
    pub fn drop_parked(&mut self) {
        self.parked.clear();
    }

    /// Updates the gauges.
    pub fn gauge(&self, budget: usize) {
        self.metrics.back_pressure.set(self.pressure(budget));
        self.metrics.unacknowledged.set(i64::try_from(self.window.len()).unwrap_or(i64::MAX));
        self.metrics.held_bytes.set(i64::try_from(self.held()).unwrap_or(i64::MAX));
        self.metrics.lag.set(self.oldest().map_or(0.0, |oldest| seconds(oldest, Time::now())));
    }

    /// When the oldest message that is not stored arrived.
    fn oldest(&self) -> Option<Time> {
        let in_flight = self.in_flight.iter().filter_map(|(_, arrival)| *arrival);
        let gathered = self.sealed.iter().chain([&self.open]).filter_map(Batch::arrival);
        in_flight.chain(gathered).chain(self.parked.iter().map(|message| message.arrival)).min()
    }
}

fn seconds(from: Time, to: Time) -> f64 {
    Duration::from_micros(u64::try_from(to.0.saturating_sub(from.0)).unwrap_or(0)).as_secs_f64()
}

#[cfg(test)]
#[path = "store_tests.rs"]
mod tests;
