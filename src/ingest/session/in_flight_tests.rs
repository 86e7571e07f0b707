//! The in-flight messages of a session against models of a broker and a database. For every order of events, no message is lost or
//! stored twice, and none is acknowledged before its commit, out of order, or on another connection.

use std::collections::HashSet;
use std::time::Duration;

use proptest::prelude::*;
use serde_json::{Value, json};
use tokio::sync::Semaphore;

use self::in_flight_model::{Broker, Database, Down, Published, Up};
use super::*;
use crate::api::pipeline::{Format, OnConflict};
use crate::api::topic::TopicPattern;
use crate::decode::Decoder;
use crate::decode::stream::Stream;
use crate::ingest::metrics::WorkerMetrics;
use crate::sink::batch::RowOptions;
use crate::sink::timescale::writers::WRITERS;
use crate::state::registry::follow::Device;

mod in_flight_model;

const GATEWAY: &str = "plant-1";

/// The number of devices that the registry has not looked up at first.
const LATE: usize = 3;

/// An event of the model.
#[derive(Clone, Debug)]
enum ModelStep {
    /// A known, unknown or not yet looked up device publishes a reading or a malformed message.
    Publish { device: usize, good: bool },
    /// The broker sends this number of messages.
    Send(usize),
    /// The worker reads this number of packets, as one block.
    Read(usize),
    /// The worker submits a batch.
    Submit,
    /// The database commits a batch. If its answer is lost, the batch is written again.
    Commit { index: usize, answered: bool },
    /// The database refuses a batch.
    Refuse(usize),
    /// The worker acknowledges all settled messages.
    Acknowledge,
    /// The broker reads this number of packets.
    Receive(usize),
    /// The registry looks a device up.
    Declare(usize),
    /// The connection fails after this number of packets each way. The broker may have lost the session.
    Break { read: usize, received: usize, present: bool },
    /// The worker is killed and replaced. The database may still execute its transactions.
    Crash { received: usize, present: bool },
}

fn step() -> impl Strategy<Value = ModelStep> {
    let present = prop::bool::weighted(0.9);
    prop_oneof![
        8 => (0..LATE + 2, prop::bool::weighted(0.7)).prop_map(|(device, good)| ModelStep::Publish { device, good }),
        4 => (1_usize..6).prop_map(ModelStep::Send),
        6 => (1_usize..6).prop_map(ModelStep::Read),
        5 => Just(ModelStep::Submit),
        5 => (any::<usize>(), prop::bool::weighted(0.8)).prop_map(|(index, answered)| ModelStep::Commit { index, answered }),
        1 => any::<usize>().prop_map(ModelStep::Refuse),
        5 => Just(ModelStep::Acknowledge),
        5 => (1_usize..6).prop_map(ModelStep::Receive),
        1 => (0..LATE).prop_map(ModelStep::Declare),
        1 => (0_usize..4, 0_usize..4, present).prop_map(|(read, received, present)| ModelStep::Break { read, received, present }),
        1 => (0_usize..4, present).prop_map(|(received, present)| ModelStep::Crash { received, present }),
    ]
}

struct Model {
    decode: Value,
    in_flight: InFlight,
    registry: Arc<DeviceRegistry>,
    metrics: SessionMetrics,
    slots: Arc<Semaphore>,
    broker: Broker,
    database: Database,
    jobs: Vec<Job>,
    /// The transactions of killed workers.
    zombies: Vec<Job>,
    published: Vec<Published>,
    /// The messages that the broker lost with the session.
    forgotten: HashSet<usize>,
}

fn device(id: i32) -> Device {
    Device { id, gateway: GATEWAY.into(), enabled: true }
}

fn in_flight(decode: &Value, registry: &Arc<DeviceRegistry>, metrics: &SessionMetrics, database: &mut Database) -> InFlight {
    let topic = TopicPattern::compile("devices/{device}", Format::Json).unwrap();
    let decoder = Decoder::compile(&serde_json::from_value(decode.clone()).unwrap(), None).unwrap();
    let processor = Processor {
        gateway: GATEWAY.to_owned(),
        stream: Stream::new(Arc::new(topic), Arc::new(decoder)),
        rows: RowOptions { chunk_interval: 1_000_000, key_fields: 0, on_conflict: OnConflict::DeadLetter },
    };
    database.generation += 1;
    let key = SessionKey {
        cluster: "here".to_owned(),
        name: "plant/p/plant-1".to_owned(),
        gateway: GATEWAY.to_owned(),
        generation: database.generation,
    };
    let entries = database.acknowledgements.iter().map(|(batch, entries)| (*batch, entries.clone())).collect();
    InFlight::new(processor, registry.clone(), metrics.clone(), key, entries, MAX_BYTES)
}

impl Model {
    fn new(decode: Value, resends_late: bool) -> Self {
        let registry = Arc::new(DeviceRegistry::new(Duration::from_secs(1)));
        registry.answer("known", Some(device(1)));
        registry.answer("nobody", None);
        let metrics = WorkerMetrics::register(&prometheus::Registry::new()).unwrap().session(GATEWAY);
        let mut database = Database::default();
        let in_flight = in_flight(&decode, &registry, &metrics, &mut database);
        let slots = Arc::new(Semaphore::new(WRITERS));
        let mut model = Self {
            decode,
            in_flight,
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

    fn take_step(&mut self, step: &ModelStep) -> Result<(), TestCaseError> {
        match *step {
            ModelStep::Publish { device, good } => self.publish(device, good),
            ModelStep::Send(count) => (0..count).for_each(|_| self.broker.send()),
            ModelStep::Read(count) => self.read(count),
            ModelStep::Submit => self.submit(),
            ModelStep::Commit { index, answered } => self.commit(index, answered),
            ModelStep::Refuse(index) => self.refuse(index),
            ModelStep::Acknowledge => self.acknowledge(),
            ModelStep::Receive(count) => self.receive(count)?,
            ModelStep::Declare(late) => self.declare(late),
            ModelStep::Break { read, received, present } => {
                self.receive(received)?;
                self.read(read);
                self.settle();
                self.in_flight.disconnected();
                self.connect(present);
            }
            ModelStep::Crash { received, present } => {
                self.receive(received)?;
                self.zombies.append(&mut self.jobs);
                self.slots = Arc::new(Semaphore::new(WRITERS));
                self.in_flight = in_flight(&self.decode, &self.registry, &self.metrics, &mut self.database);
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
        // Its only digits are those of the time, which is unique.
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
                    self.in_flight.take(&Bytes::from(std::mem::take(&mut block)), &std::mem::take(&mut messages));
                    self.in_flight.fence_answered();
                }
                None => break,
            }
        }
        self.in_flight.take(&Bytes::from(block), &messages);
    }

    fn submit(&mut self) {
        if self.in_flight.due().is_none() {
            return;
        }
        let Ok(slot) = self.slots.clone().try_acquire_owned() else { return };
        self.jobs.extend(self.in_flight.next_job(slot, mpsc::unbounded_channel().0, CancellationToken::new()));
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
        let written = self.database.write(&self.jobs[index]).expect("no other worker has claimed the session");
        if answered {
            let job = self.jobs.remove(index);
            self.in_flight.finished(Finished::Committed(Done { batch: job.batch, number: job.number, written, took: Duration::ZERO }));
        }
    }

    /// A writer first asks whether an earlier attempt is committed.
    fn refuse(&mut self, index: usize) {
        let Some(index) = index.checked_rem(self.jobs.len()) else { return };
        if self.jobs[index].batch.len() > 1 && !self.database.acknowledgements.contains_key(&self.jobs[index].number) {
            let Job { batch, number, expired, .. } = self.jobs.remove(index);
            self.in_flight.finished(Finished::Refused(Refused { batch, number, expired }));
        }
    }

    fn acknowledge(&mut self) {
        while let Some(packet_id) = self.in_flight.next_acknowledgement() {
            self.broker.up.push_back(Up::Acknowledgement(packet_id));
        }
        if self.in_flight.wants_fence() {
            self.broker.up.push_back(Up::Ping);
            self.in_flight.fence();
        }
    }

    fn regular_ping(&mut self) {
        self.broker.up.push_back(Up::Ping);
        self.in_flight.regular_fence();
    }

    fn receive(&mut self, count: usize) -> Result<(), TestCaseError> {
        (0..count).try_for_each(|_| self.broker.receive(&self.database))
    }

    fn declare(&mut self, late: usize) {
        self.registry.answer(&format!("late-{late}"), Some(device(10 + i32::try_from(late).unwrap())));
        self.in_flight.take_parked();
    }

    /// As a session does before it reconnects.
    fn settle(&mut self) {
        (0..LATE).for_each(|late| self.declare(late));
        while !self.in_flight.is_settled() {
            self.submit();
            self.commit(1, true);
        }
    }

    fn connect(&mut self, present: bool) {
        self.in_flight.connected(present);
        self.forgotten.extend(self.broker.connect(present));
    }

    /// Delivers and commits everything.
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

    fn check(&self) -> Result<(), TestCaseError> {
        for (message, published) in self.published.iter().enumerate() {
            let (count, dead_letters) =
                (self.database.count(message), self.database.dead_letters.iter().filter(|letter| **letter == message).count());
            if self.forgotten.contains(&message) {
                prop_assert!(count <= 1, "message {} is stored {} times", message, count);
            } else {
                prop_assert_eq!((count, dead_letters), (1, usize::from(!published.is_row)), "message {}", message);
            }
        }
        Ok(())
    }
}

fn holds_for(decode: Value, resends_late: bool, steps: &[ModelStep]) -> Result<(), TestCaseError> {
    let mut model = Model::new(decode, resends_late);
    for step in steps {
        model.take_step(step)?;
    }
    model.finish()?;
    model.check()?;
    model.regular_ping();
    // The redelivery table keeps only the entries of the last transactions.
    for _ in 0..2 {
        model.publish(1, false);
        model.finish()?;
    }
    prop_assert!(model.database.acknowledgements.len() <= 2, "the redelivery table grows: {:?}", model.database.acknowledgements);
    Ok(())
}

/// A worker is killed while the database deletes the record of a batch, and the next worker has submitted batches meanwhile.
#[test]
fn a_late_deletion_by_a_killed_worker_keeps_the_records_of_the_next_worker() {
    let decode = json!({"time": {"pointer": "/ts", "maxAge": "9999d"}, "fields": [{"name": "n", "type": "Boolean", "required": true}]});
    let steps = [
        ModelStep::Publish { device: 0, good: false },
        ModelStep::Publish { device: 2, good: true },
        ModelStep::Send(2),
        ModelStep::Break { read: 1, received: 0, present: true },
        ModelStep::Read(1),
        ModelStep::Acknowledge,
        ModelStep::Receive(3),
        ModelStep::Read(3),
        ModelStep::Publish { device: 1, good: false },
        ModelStep::Send(1),
        ModelStep::Submit,
        ModelStep::Commit { index: 0, answered: false },
        ModelStep::Crash { received: 0, present: true },
        ModelStep::Break { read: 2, received: 0, present: true },
        ModelStep::Commit { index: 0, answered: false },
        ModelStep::Crash { received: 0, present: true },
    ];
    holds_for(decode, false, &steps).unwrap();
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 512, ..ProptestConfig::default() })]

    #[test]
    fn messages_timed_by_arrival_are_stored_exactly_once(steps in prop::collection::vec(step(), 0..150), resends_late: bool) {
        holds_for(json!({"fields": [{"name": "n", "type": "Boolean", "required": true}]}), resends_late, &steps)?;
    }

    #[test]
    fn messages_with_their_own_time_are_stored_exactly_once(steps in prop::collection::vec(step(), 0..150), resends_late: bool) {
        let decode = json!({"time": {"pointer": "/ts", "maxAge": "9999d"}, "fields": [{"name": "n", "type": "Boolean", "required": true}]});
        holds_for(decode, resends_late, &steps)?;
    }
}
