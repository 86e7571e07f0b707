//! Several workers with a shared subscription at a clustered broker: each message that a node has acknowledged is stored exactly once,
//! for all nodes of sessions and devices, and after sessions move between nodes.

#![allow(clippy::unwrap_used, clippy::panic, reason = "helpers of tests fail by panicking")]

mod common;

use std::collections::BTreeSet;
use std::time::Duration;

use common::cluster::Cluster;
use common::mosquitto::wait_until;
use common::postgres::Postgres;
use common::publisher::Publisher;
use common::worker::{Chain, Worker};
use serde_json::json;

/// The number of cluster nodes and of workers.
const NODES: usize = 3;

/// The sessions that share.
const SESSIONS: [&str; NODES] = ["plant-1", "plant-1/1", "plant-1/2"];

struct WorkerSet {
    chain: Chain<Cluster>,
    others: Vec<Worker>,
    publishers: Vec<Publisher>,
}

impl WorkerSet {
    async fn start() -> Self {
        let cluster = Cluster::start(NODES);
        let external = json!({"clientId": "fwi0123456789abcdef", "authorities": false, "sharedBy": NODES});
        let gateway = json!({"name": "plant-1", "host": "127.0.0.1", "port": cluster.balancer.port, "tls": false, "external": external});
        let files = [("gateways/plant-1/username", "fleet"), ("gateways/plant-1/password", "password")];
        // Such readings have no unique key: a message that arrives twice would be stored twice.
        let decode = json!({"fields": [{"name": "count", "type": "Int64"}]});
        let mut chain =
            Chain::start_reading(cluster, gateway, &files, "devices/{device}/telemetry", &decode, Postgres::shared().await).await;
        chain.worker.wait_ready();
        chain.spread(&SESSIONS, 3).await;
        let others: Vec<Worker> = (1..3).map(|ordinal| chain.one_more_worker(ordinal)).collect();
        others.iter().for_each(Worker::wait_ready);
        // A worker is ready before it has claimed its session.
        let workers = Self { chain, others, publishers: Vec::new() };
        workers.chain.wait_for("SELECT count(*) FROM fleetwright.session WHERE topic_filters[1] LIKE '$share/%'", 3).await;
        workers
    }

    /// Devices at each node, some hundred messages per second each; every tenth is a dead letter.
    fn publish(&mut self) {
        let devices = self.chain.broker.ports.iter().enumerate().map(|(node, port)| {
            Publisher::start(*port, &format!("press-{}", node + 1), move |number| {
                std::thread::sleep(Duration::from_millis(2));
                let number = number * NODES as u64 + node as u64;
                let n = if number % 10 == 3 { format!("\"{number}\"") } else { number.to_string() };
                (format!("devices/press-{}/telemetry", number % 9 + 1), format!(r#"{{"count":{n}}}"#))
            })
        });
        self.publishers = devices.collect();
    }

    /// Waits until each node has acknowledged this number of further messages.
    fn more(&self, count: u64) {
        for publisher in &self.publishers {
            let until = publisher.acknowledged() + count;
            wait_until("acknowledgements", || publisher.acknowledged() >= until);
        }
    }

    /// Waits until a worker stores further messages of this session.
    fn progress(&self, ordinal: usize, session: &str) {
        let worker = if ordinal == 0 { &self.chain.worker } else { &self.others[ordinal - 1] };
        let name = format!("fleetwright_ingest_rows_total{{gateway=\"{session}\"}}");
        let rows = || if worker.get("/metrics").1.contains(&name) { worker.metric(&name) } else { 0.0 };
        let before = rows();
        wait_until(&format!("more of {session} at worker {ordinal}; its log:\n{}", worker.log()), || rows() > before);
    }

    fn all_progress(&self) {
        for (ordinal, session) in SESSIONS.into_iter().enumerate() {
            self.progress(ordinal, session);
        }
    }

    /// Stops the publishers, and compares the stored with the acknowledged messages.
    async fn check(mut self) {
        let (mut good, mut bad) = (BTreeSet::new(), BTreeSet::new());
        for (node, publisher) in self.publishers.drain(..).enumerate() {
            let outcome = publisher.finish();
            assert!(outcome.repeated.is_empty(), "the nodes were available all the time");
            let numbers = outcome.acknowledged.into_iter().map(|number| number * NODES as u64 + node as u64);
            for number in numbers {
                if number % 10 == 3 {
                    bad.insert(number)
                } else {
                    good.insert(number)
                };
            }
        }
        let chain = &mut self.chain;
        let (good, bad) = (i64::try_from(good.len()).unwrap(), i64::try_from(bad.len()).unwrap());
        chain.wait_for("SELECT count(DISTINCT count) FROM vibration", good).await;
        chain.wait_for("SELECT count(DISTINCT payload) FROM fleetwright.dead_letter", bad).await;
        assert!(chain.worker.stop() && self.others.iter_mut().all(Worker::stop), "{}", chain.worker.log());
        assert_eq!(chain.count("SELECT count(*) FROM vibration").await, good, "each row once");
        assert_eq!(chain.count("SELECT count(*) FROM fleetwright.dead_letter").await, bad, "each dead letter once");
    }
}

/// The test avoids two cases in which RMQTT 0.24 itself loses messages: a message that it sends while it detects a broken connection (so each
/// connection ends in order), and messages that arrive while the only connected session of a group moves to another node (so one session
/// moves at a time).
#[tokio::test]
async fn workers_at_a_clustered_broker_store_messages_exactly_once() {
    let mut workers = WorkerSet::start().await;
    workers.publish();
    workers.all_progress();

    // A worker is killed, and the next one connects to another node.
    for other in [0, 1] {
        workers.more(200);
        workers.others[other].kill();
        workers.more(200);
        workers.chain.restart(&mut workers.others[other], i32::try_from(other + 1).unwrap());
        workers.all_progress();
    }

    // A connection breaks.
    for _ in 0..4 {
        workers.more(200);
        workers.chain.broker.balancer.cut_oldest();
        workers.all_progress();
    }

    // The database blocks for a while.
    let holder = workers.chain.postgres.client(&workers.chain.database).await;
    holder.batch_execute("BEGIN; LOCK TABLE vibration IN SHARE MODE").await.unwrap();
    workers.more(1_000);
    holder.batch_execute("COMMIT").await.unwrap();
    workers.all_progress();

    // A worker stops, and another one claims its session.
    workers.chain.spread(&SESSIONS, 2).await;
    assert!(workers.others.pop().unwrap().stop());
    workers.more(200);
    workers.check().await;
}
