//! Several workers with a shared subscription at one broker: each message is stored exactly once while workers start, stop and are killed.

#![allow(clippy::unwrap_used, clippy::panic, reason = "helpers of tests fail by panicking")]

mod common;

use std::time::Duration;

use common::mosquitto::wait_until;
use common::postgres::Postgres;
use common::publisher::Publisher;
use common::worker::{Chain, Worker, broker};
use fleetwright::api::name::external_session_client;
use serde_json::{Value, json};

/// Client identifier of the first session.
const CLIENT: &str = "fwi0123456789abcdef";

/// The sessions of three that share.
const SESSIONS: [&str; 3] = ["plant-1", "plant-1/1", "plant-1/2"];

fn gateway(port: u16, shared_by: Option<usize>) -> Value {
    let mut external = json!({"clientId": CLIENT, "authorities": false});
    external.as_object_mut().unwrap().extend(shared_by.map(|count| ("sharedBy".to_owned(), count.into())));
    json!({"name": "plant-1", "host": "127.0.0.1", "port": port, "tls": false, "external": external})
}

/// A chain with one worker and one session.
async fn chain() -> Chain {
    let broker = broker();
    let files = [("gateways/plant-1/username", "fleet"), ("gateways/plant-1/password", "password")];
    // Such readings have no unique key: a message that arrives twice would be stored twice.
    let decode = json!({"fields": [{"name": "count", "type": "Int64"}]});
    let gateway = gateway(broker.port, None);
    let chain = Chain::start_reading(broker, gateway, &files, "devices/{device}/telemetry", &decode, Postgres::shared().await).await;
    chain.worker.wait_ready();
    chain
}

/// Publishes continuously, some thousand messages per second; every tenth is a dead letter.
fn publish(chain: &Chain) -> Publisher {
    Publisher::start(chain.broker.port, "press-1", |number| {
        std::thread::sleep(Duration::from_micros(100));
        let n = if number % 10 == 3 { format!("\"{number}\"") } else { number.to_string() };
        (format!("devices/press-{}/telemetry", number % 9 + 1), format!(r#"{{"count":{n}}}"#))
    })
}

impl WorkerSet {
    fn share(&mut self, shared_by: Option<usize>) {
        self.chain.configure("gateways", json!([gateway(self.chain.broker.port, shared_by)]));
    }

    /// Restarts the workers in descending order, as a StatefulSet does.
    fn roll(&mut self) {
        for (ordinal, worker) in self.others.iter_mut().enumerate().rev() {
            let ordinal = i32::try_from(ordinal + 1).unwrap();
            assert!(worker.stop(), "{}", worker.log());
            self.chain.restart(worker, ordinal);
            worker.wait_ready();
        }
        assert!(self.chain.worker.stop(), "{}", self.chain.worker.log());
        self.chain.start_worker(None);
        self.chain.worker.wait_ready();
    }

    /// Waits until a worker stores further messages of this session.
    fn progress(&self, ordinal: usize, session: &str) {
        let worker = if ordinal == 0 { &self.chain.worker } else { &self.others[ordinal - 1] };
        let rows = || rows(worker, session);
        wait_until(&format!("{session} at worker {ordinal}; its log:\n{}", worker.log()), || rows() > 0.0);
        let before = rows();
        wait_until(&format!("more of {session} at worker {ordinal}; its log:\n{}", worker.log()), || rows() > before);
    }
}

/// The workers of a Pipeline, as the operator runs them.
struct WorkerSet {
    chain: Chain,
    others: Vec<Worker>,
}

fn rows(worker: &Worker, session: &str) -> f64 {
    let name = format!("fleetwright_ingest_rows_total{{gateway=\"{session}\"}}");
    if worker.get("/metrics").1.contains(&name) { worker.metric(&name) } else { 0.0 }
}

fn has_session(workers: &WorkerSet, number: i32) -> bool {
    workers.chain.broker.has_session(("fleet", "password"), &external_session_client(CLIENT, number))
}

#[tokio::test]
async fn workers_with_a_shared_subscription_store_messages_exactly_once() {
    let mut workers = WorkerSet { chain: chain().await, others: Vec::new() };
    let publisher = publish(&workers.chain);
    workers.progress(0, "plant-1");

    // Sharing begins: two more workers start, and wait until the first one shares.
    workers.share(Some(3));
    workers.chain.spread(&SESSIONS, 3).await;
    workers.others = (1..3).map(|ordinal| workers.chain.one_more_worker(ordinal)).collect();
    workers.others.iter().for_each(Worker::wait_ready);
    workers.progress(0, "plant-1");
    workers.roll();
    for (ordinal, session) in SESSIONS.into_iter().enumerate() {
        workers.progress(ordinal, session);
    }

    // One is killed.
    workers.others[0].kill();
    workers.chain.restart(&mut workers.others[0], 1);
    workers.progress(1, "plant-1/1");

    // A worker stops: another one claims its session.
    workers.chain.spread(&SESSIONS, 2).await;
    assert!(workers.others[1].stop());
    workers.others.pop();
    wait_until("the next worker of the session", || {
        [&workers.chain.worker, &workers.others[0]].into_iter().any(|worker| rows(worker, "plant-1/2") > 0.0)
    });

    // Two sessions are configured: the third one is drained and ended.
    workers.chain.spread(&SESSIONS[..2], 2).await;
    workers.share(Some(2));
    workers.roll();
    workers.chain.wait_for("SELECT count(*) FROM fleetwright.session WHERE session = 'plant/vibration/plant-1/2'", 0).await;
    assert!(!has_session(&workers, 2));
    workers.progress(1, "plant-1/1");

    // Sharing ends: the first session waits until the other one has ended.
    workers.chain.execute("UPDATE fleetwright.assignment SET worker = 1 - worker").await;
    workers.progress(1, "plant-1");
    workers.progress(0, "plant-1/1");
    workers.chain.spread(&SESSIONS[..1], 2).await;
    workers.share(None);
    workers.roll();
    workers.chain.wait_for("SELECT count(*) FROM fleetwright.session", 1).await;
    assert!(!has_session(&workers, 1));
    workers.chain.wait_for("SELECT count(*) FROM fleetwright.session WHERE topic_filters = '{devices/+/telemetry}'", 1).await;
    workers.progress(1, "plant-1");

    let outcome = publisher.finish();
    assert!(outcome.repeated.is_empty(), "the broker was available all the time");
    let (bad, good): (Vec<u64>, Vec<u64>) = outcome.acknowledged.iter().partition(|number| *number % 10 == 3);
    let chain = &mut workers.chain;
    chain.wait_for("SELECT count(DISTINCT count) FROM vibration", i64::try_from(good.len()).unwrap()).await;
    chain.wait_for("SELECT count(DISTINCT payload) FROM fleetwright.dead_letter", i64::try_from(bad.len()).unwrap()).await;
    assert!(chain.worker.stop() && workers.others[0].stop(), "{}", chain.worker.log());
    assert_eq!(chain.count("SELECT count(*) FROM vibration").await, i64::try_from(good.len()).unwrap(), "each row once");
    assert_eq!(
        chain.count("SELECT count(*) FROM fleetwright.dead_letter").await,
        i64::try_from(bad.len()).unwrap(),
        "each dead letter once"
    );
    assert_eq!(chain.count("SELECT count(*) FROM fleetwright.acknowledgement WHERE session <> 'plant/vibration/plant-1'").await, 0);
}
