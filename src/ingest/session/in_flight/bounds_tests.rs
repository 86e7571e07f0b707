//! The memory of the messages of a session.

use std::collections::BTreeSet;
use std::sync::LazyLock;
use std::time::Duration;

use serde_json::json;
use tokio::sync::Semaphore;

use super::waiting::MAX_PARKED;
use super::*;
use crate::api::pipeline::{Format, OnConflict};
use crate::api::topic::TopicPattern;
use crate::decode::Decoder;
use crate::decode::dead_letter::Reason;
use crate::decode::stream::Stream;
use crate::ingest::metrics::WorkerMetrics;
use crate::sink::batch::RowOptions;
use crate::sink::written::Written;
use crate::state::registry::follow::Device;

const MAX_HELD: usize = 4 * 1024 * 1024;

struct Fixture {
    in_flight: InFlight,
    registry: Arc<DeviceRegistry>,
    next_packet: u16,
}

impl Fixture {
    fn new() -> Self {
        let registry = Arc::new(DeviceRegistry::new(Duration::from_secs(1)));
        let metrics = WorkerMetrics::register(&prometheus::Registry::new()).unwrap().session("plant-1");
        let topic = TopicPattern::compile("devices/{device}", Format::Json).unwrap();
        let decode = json!({"time": {"pointer": "/ts"}, "fields": [{"name": "n", "type": "Boolean"}]});
        let decoder = Decoder::compile(&serde_json::from_value(decode).unwrap(), None).unwrap();
        let stream = Stream::new(Arc::new(topic), Arc::new(decoder));
        let processor = Processor {
            gateway: "plant-1".to_owned(),
            stream,
            rows: RowOptions { chunk_interval: 86_400_000_000, key_fields: 0, on_conflict: OnConflict::DeadLetter },
        };
        let key = SessionKey { cluster: String::new(), name: "plant/p/plant-1".to_owned(), gateway: "plant-1".to_owned(), generation: 1 };
        let in_flight = InFlight::new(processor, registry.clone(), metrics, key, Vec::new(), MAX_HELD);
        Self { in_flight, registry, next_packet: 0 }
    }

    /// A fixture whose registry is loaded.
    fn loaded() -> Self {
        let fixture = Self::new();
        fixture.registry.answer("known", Some(Device { id: 1, gateway: "plant-1".into(), enabled: true }));
        fixture
    }

    /// The messages arrive as one block.
    fn take(&mut self, messages: &[(String, String)]) {
        let (mut block, mut publishes) = (Vec::new(), Vec::new());
        for (device, payload) in messages {
            self.next_packet += 1;
            let start = block.len();
            block.extend_from_slice(format!("devices/{device}").as_bytes());
            let middle = block.len();
            block.extend_from_slice(payload.as_bytes());
            publishes.push(Publish { packet_id: self.next_packet, duplicate: false, topic: start..middle, payload: middle..block.len() });
        }
        self.in_flight.take(&Bytes::from(block), &publishes);
    }

    /// Commits all batches; returns the number of rows, and the dead letters.
    fn commit(&mut self) -> (usize, Vec<Reason>) {
        let slots = Arc::new(Semaphore::new(1));
        let (mut rows, mut reasons) = (0, Vec::new());
        while self.in_flight.due().is_some() {
            let slot = slots.clone().try_acquire_owned().unwrap();
            let Some(job) = self.in_flight.next_job(slot, mpsc::unbounded_channel().0, CancellationToken::new()) else { break };
            rows += job.batch.rows.len();
            reasons.extend(job.batch.dead_letters.values().map(|cause| cause.reason));
            let Job { batch, number, .. } = job;
            let done = Done { batch, number, written: Written::default(), took: Duration::ZERO };
            self.in_flight.finished(Finished::Committed(done));
        }
        (rows, reasons)
    }

    fn acknowledged(&mut self) -> usize {
        std::iter::from_fn(|| self.in_flight.next_acknowledgement()).count()
    }
}

/// A reading whose time is different for each number.
fn reading(number: u64) -> String {
    static BASE: LazyLock<i64> = LazyLock::new(|| Time::now().0 / 1000);
    format!(r#"{{"ts":{}}}"#, *BASE - i64::try_from(number).unwrap())
}

/// A message that takes more memory as rows than as a payload.
fn readings(count: u64) -> String {
    format!("[{}]", (0..count).map(reading).collect::<Vec<_>>().join(","))
}

#[test]
fn the_rest_of_a_block_waits_for_memory() {
    let mut fixture = Fixture::loaded();
    let messages: Vec<_> = (0..100).map(|_| ("known".to_owned(), readings(1_000))).collect();
    fixture.take(&messages);
    let held = fixture.in_flight.held();
    assert!(!fixture.in_flight.has_room() && held > MAX_HELD && held < MAX_HELD + MAX_OVERRUN + 512 * 1024, "{held}");
    fixture.commit();
    assert!(fixture.in_flight.is_settled() && fixture.in_flight.has_room());
    assert_eq!((fixture.acknowledged(), fixture.in_flight.held()), (100, 0));
}

#[test]
fn messages_of_unknown_devices_do_not_stop_the_stream() {
    let mut fixture = Fixture::loaded();
    for number in 0..3_000 {
        fixture.take(&[(format!("nobody-{number}"), reading(0)), ("known".to_owned(), reading(number))]);
    }
    assert!(fixture.in_flight.has_room());
    let (rows, reasons) = fixture.commit();
    assert_eq!(rows, 3_000);
    assert_eq!(reasons.iter().map(|reason| reason.name()).collect::<BTreeSet<_>>(), BTreeSet::from(["UnknownDevice"]));
    let parked = 3_000 - reasons.len();
    assert!(parked > 500 && parked <= MAX_PARKED, "{parked} wait");
    for number in 0..3_000 {
        fixture.registry.answer(&format!("nobody-{number}"), None);
    }
    fixture.in_flight.take_parked();
    assert_eq!(fixture.commit().1.len(), parked);
    assert_eq!((fixture.acknowledged(), fixture.in_flight.held()), (6_000, 0));
}

#[test]
fn a_message_that_waits_does_not_block_half_of_the_window() {
    let mut fixture = Fixture::loaded();
    fixture.take(&[("nobody".to_owned(), reading(0))]);
    for _ in 0..33 {
        let messages: Vec<_> = (0..1_000).map(|number| ("known".to_owned(), reading(number))).collect();
        fixture.take(&messages);
        fixture.commit();
    }
    assert_eq!(fixture.acknowledged(), 0);
    fixture.take(&[("known".to_owned(), reading(0))]);
    assert_eq!(fixture.commit().1, [Reason::UnknownDevice]);
    assert_eq!(fixture.acknowledged(), 33_002);
}

#[test]
fn without_a_registry_every_message_waits_and_nothing_is_refused() {
    let mut fixture = Fixture::new();
    let messages: Vec<_> = (0..1_500).map(|number| (format!("late-{number}"), reading(0))).collect();
    fixture.take(&messages);
    assert!(!fixture.in_flight.has_room());
    assert_eq!(fixture.commit(), (0, Vec::new()));
    for number in 0..1_500 {
        fixture.registry.answer(&format!("late-{number}"), Some(Device { id: number, gateway: "plant-1".into(), enabled: true }));
    }
    fixture.in_flight.take_parked();
    assert_eq!(fixture.commit(), (1_500, Vec::new()));
    assert_eq!(fixture.acknowledged(), 1_500);
}
