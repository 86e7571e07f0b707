//! The store of a session against models of a broker and a database: whatever happens in whatever order, nothing is lost, nothing
//! is stored twice, and nothing is acknowledged before its commit, out of order or on another connection.

use std::collections::HashSet;

use proptest::prelude::*;
use serde_json::{Value, json};
use tokio::sync::Semaphore;

use self::store_model::{Broker, Database, Down, Published, Up};
use super::*;
use crate::api::pipeline::Format;
use crate::api::topic::TopicPattern;
use crate::decode::Decoder;
use crate::decode::stream::Stream;
use crate::ingest::metrics::Metrics;
use crate::sink::timescale::writers::WRITERS;
use crate::state::registry::follow::Device;

mod store_model;

const GATEWAY: &str = "plant-1";

/// Devices that the registry has no answer for at first.
const LATE: usize = 3;

/// What may happen next.
#[derive(Clone, Debug)]
enum Step {
    /// A device publishes: one that is known, nobody's, or one that the registry has no answer for yet; a reading, or nonsense.
    Publish { device: usize, good: bool },
    /// The broker sends so many messages.
    Send(usize),
    /// The worker reads so many packets, as one block.
    Read(usize),
    /// The worker hands a batch over.
    Submit,
    /// The database commits one of the batches; its answer may be lost on its way, and then the batch is tried again.
    Commit { index: usize, answered: bool },
    /// The worker acknowledges what it may.
    Acknowledge,
    /// The broker reads so many packets.
    Receive(usize),
    /// The registry answers for a device.
    Declare(usize),
    /// The connection breaks, after so many packets each way; the broker may have forgotten the session.
    Break { read: usize, received: usize, present: bool },
    /// The worker is killed, and another process comes in its place; what it left running is tried still.
    Crash { received: usize, present: bool },
}

fn step() -> impl Strategy<Value = Step> {
    let present = prop::bool::weighted(0.9);
    prop_oneof![
        8 => (0..LATE + 2, prop::bool::weighted(0.7)).prop_map(|(device, good)| Step::Publish { device, good }),
        4 => (1_usize..6).prop_map(Step::Send),
        6 => (1_usize..6).prop_map(Step::Read),
        5 => Just(Step::Submit),
        5 => (any::<usize>(), prop::bool::weighted(0.8)).prop_map(|(index, answered)| Step::Commit { index, answered }),
        5 => Just(Step::Acknowledge),
        5 => (1_usize..6).prop_map(Step::Receive),
        1 => (0..LATE).prop_map(Step::Declare),
        1 => (0_usize..4, 0_usize..4, present).prop_map(|(read, received, present)| Step::Break { read, received, present }),
        1 => (0_usize..4, present).prop_map(|(received, present)| Step::Crash { received, present }),
    ]
}

struct Model {
    decode: Value,
    store: Store,
    registry: Arc<DeviceRegistry>,
    metrics: SessionMetrics,
    slots: Arc<Semaphore>,
    broker: Broker,
    database: Database,
    jobs: Vec<Job>,
    /// Of workers that were killed.
    zombies: Vec<Job>,
    published: Vec<Published>,
    /// What a broker has forgotten with the session.
    forgotten: HashSet<usize>,
}

fn device(id: i32) -> Device {
    Device { id, gateway: GATEWAY.into(), enabled: true }
}

fn store(decode: &Value, registry: &Arc<DeviceRegistry>, metrics: &SessionMetrics, database: &mut Database) -> Store {
    let topic = TopicPattern::compile("devices/{device}", Format::Json).unwrap();
    let decoder = Decoder::compile(&serde_json::from_value(decode.clone()).unwrap(), None).unwrap();
    let processor = Processor { gateway: GATEWAY.to_owned(), stream: Stream::new(Arc::new(topic), Arc::new(decoder)) };
    database.generation += 1;
    let key = SessionKey { name: "plant/p/plant-1".to_owned(), gateway: GATEWAY.to_owned(), generation: database.generation };
    let entries = database.acknowledgements.iter().map(|(batch, entries)| (*batch, entries.clone())).collect();
    Store::new(processor, registry.clone(), metrics.clone(), key, entries)
}

impl Model {
    fn new(decode: Value, resends_late: bool) -> Self {
        let registry = Arc::new(DeviceRegistry::new(Duration::from_secs(1)));
        registry.answer("known", Some(device(1)));
        registry.answer("nobody", None);
        let metrics = Metrics::register(&prometheus::Registry::new()).unwrap().session(GATEWAY);
        let mut database = Database::default();
        let store = store(&decode, &registry, &metrics, &mut database);
        let slots = Arc::new(Semaphore::new(WRITERS));
        let mut model = Self {
            decode,
            store,
            registry,
            metrics,
            slots,
            broker: Broker::new(resends_late),
            database,
            jobs: Vec::new(),
            zombies: Vec::new(),
            published: Vec::new(),
            forgotten: HashSet::new(),
        };
        model.connect(false);
        model
    }

    fn take_step(&mut self, step: &Step) -> Result<(), TestCaseError> {
        match *step {
            Step::Publish { device, good } => self.publish(device, good),
            Step::Send(count) => (0..count).for_each(|_| self.broker.send()),
            Step::Read(count) => self.read(count),
            Step::Submit => self.submit(),
            Step::Commit { index, answered } => self.commit(index, answered),
            Step::Acknowledge => self.acknowledge(),
            Step::Receive(count) => self.receive(count)?,
            Step::Declare(late) => self.declare(late),
            Step::Break { read, received, present } => {
                self.receive(received)?;
                self.read(read);
                self.settle();
                self.store.disconnected();
                self.connect(present);
            }
            Step::Crash { received, present } => {
                self.receive(received)?;
                self.zombies.append(&mut self.jobs);
                self.slots = Arc::new(Semaphore::new(WRITERS));
                self.store = store(&self.decode, &self.registry, &self.metrics, &mut self.database);
                self.connect(present);
            }
        }
        Ok(())
    }

    fn publish(&mut self, device: usize, good: bool) {
        let message = self.published.len();
        let name = match device.checked_sub(2) {
            Some(late) => format!("late-{late}"),
            None => ["known", "nobody"][device].to_owned(),
        };
        // The only digits are those of the time, which no other message has.
        let payload = json!({"ts": 1_777_863_000_000_u64 + message as u64, "n": if good { json!(true) } else { json!("x") }}).to_string();
        self.published.push(Published { topic: format!("devices/{name}"), payload, is_row: good && name != "nobody" });
        self.broker.queue.push_back(message);
    }

    fn read(&mut self, count: usize) {
        let (mut block, mut messages) = (Vec::new(), Vec::new());
        for _ in 0..count {
            match self.broker.down.pop_front() {
                Some(Down::Publish { packet_id, duplicate, message }) => {
                    let Published { topic, payload, .. } = &self.published[message];
                    let (start, middle) = (block.len(), block.len() + topic.len());
                    block.extend_from_slice(topic.as_bytes());
                    block.extend_from_slice(payload.as_bytes());
                    messages.push(Publish { packet_id, duplicate, topic: start..middle, payload: middle..block.len() });
                }
                Some(Down::Pong) => {
                    self.store.take(&Bytes::from(std::mem::take(&mut block)), &std::mem::take(&mut messages));
                    self.store.fence_answered();
                }
                None => break,
            }
        }
        self.store.take(&Bytes::from(block), &messages);
    }

    fn submit(&mut self) {
        if self.store.due().is_none() {
            return;
        }
        let Ok(slot) = self.slots.clone().try_acquire_owned() else { return };
        self.jobs.extend(self.store.next_job(slot, mpsc::unbounded_channel().0, CancellationToken::new()));
    }

    fn commit(&mut self, index: usize, answered: bool) {
        if !self.zombies.is_empty() && index.is_multiple_of(3) {
            let zombie = self.zombies.swap_remove(index % self.zombies.len());
            self.database.write(&zombie);
        }
        if self.jobs.is_empty() {
            return;
        }
        let index = index % self.jobs.len();
        let written = self.database.write(&self.jobs[index]).expect("nobody has taken the session over");
        if answered {
            let job = self.jobs.remove(index);
            self.store.committed(Done { batch: job.batch, number: job.number, written, took: Duration::ZERO });
        }
    }

    fn acknowledge(&mut self) {
        while let Some(packet_id) = self.store.next_acknowledgement() {
            self.broker.up.push_back(Up::Acknowledgement(packet_id));
        }
        if self.store.wants_fence() {
            self.broker.up.push_back(Up::Ping);
            self.store.fence();
        }
    }

    fn pulse(&mut self) {
        self.broker.up.push_back(Up::Ping);
        self.store.pulse();
    }

    fn receive(&mut self, count: usize) -> Result<(), TestCaseError> {
        (0..count).try_for_each(|_| self.broker.receive(&self.database))
    }

    fn declare(&mut self, late: usize) {
        self.registry.answer(&format!("late-{late}"), Some(device(10 + i32::try_from(late).unwrap())));
        self.store.take_parked();
    }

    /// As a session does before it connects again.
    fn settle(&mut self) {
        (0..LATE).for_each(|late| self.declare(late));
        while !self.store.is_settled() {
            self.submit();
            self.commit(1, true);
        }
    }

    fn connect(&mut self, present: bool) {
        self.store.connected(present);
        self.forgotten.extend(self.broker.connect(present));
    }

    /// Lets everything come to its end.
    fn finish(&mut self) -> Result<(), TestCaseError> {
        while !self.broker.is_idle() {
            self.broker.send();
            self.read(usize::MAX);
            self.settle();
            self.acknowledge();
            self.receive(self.broker.up.len())?;
        }
        for zombie in self.zombies.drain(..) {
            self.database.write(&zombie);
        }
        Ok(())
    }

    fn judge(&self) -> Result<(), TestCaseError> {
        for (message, published) in self.published.iter().enumerate() {
            let (count, letters) =
                (self.database.count(message), self.database.letters.iter().filter(|letter| **letter == message).count());
            if self.forgotten.contains(&message) {
                prop_assert!(count <= 1, "message {} is stored {} times", message, count);
            } else {
                prop_assert_eq!((count, letters), (1, usize::from(!published.is_row)), "message {}", message);
            }
        }
        Ok(())
    }
}

fn holds_for(decode: Value, resends_late: bool, steps: &[Step]) -> Result<(), TestCaseError> {
    let mut model = Model::new(decode, resends_late);
    for step in steps {
        model.take_step(step)?;
    }
    model.finish()?;
    model.judge()?;
    model.pulse();
    // The ledger keeps what the last transactions wrote, and no more.
    for _ in 0..2 {
        model.publish(1, false);
        model.finish()?;
    }
    prop_assert!(model.database.acknowledgements.len() <= 2, "the ledger grows: {:?}", model.database.acknowledgements);
    Ok(())
}

/// A worker is killed while the database forgets a batch for it, and the next one has batches of its own by the time that is done.
#[test]
fn what_a_killed_worker_forgets_late_is_no_batch_of_the_next_one() {
    let decode = json!({"time": {"pointer": "/ts"}, "fields": [{"name": "n", "type": "Boolean", "required": true}]});
    let steps = [
        Step::Publish { device: 0, good: false },
        Step::Publish { device: 2, good: true },
        Step::Send(2),
        Step::Break { read: 1, received: 0, present: true },
        Step::Read(1),
        Step::Acknowledge,
        Step::Receive(3),
        Step::Read(3),
        Step::Publish { device: 1, good: false },
        Step::Send(1),
        Step::Submit,
        Step::Commit { index: 0, answered: false },
        Step::Crash { received: 0, present: true },
        Step::Break { read: 2, received: 0, present: true },
        Step::Commit { index: 0, answered: false },
        Step::Crash { received: 0, present: true },
    ];
    holds_for(decode, false, &steps).unwrap();
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 512, ..ProptestConfig::default() })]

    #[test]
    fn nothing_is_lost_or_doubled_that_is_timed_by_arrival(steps in prop::collection::vec(step(), 0..150), resends_late: bool) {
        holds_for(json!({"fields": [{"name": "n", "type": "Boolean", "required": true}]}), resends_late, &steps)?;
    }

    #[test]
    fn nothing_is_lost_or_doubled(steps in prop::collection::vec(step(), 0..150), resends_late: bool) {
        let decode = json!({"time": {"pointer": "/ts"}, "fields": [{"name": "n", "type": "Boolean", "required": true}]});
        holds_for(decode, resends_late, &steps)?;
    }
}
