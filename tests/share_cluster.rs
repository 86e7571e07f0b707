//! Several workers that share the subscription at a broker that is a cluster: each message that a node has acknowledged is stored, and
//! once, whichever nodes the sessions and the devices are at, and wherever a session goes next.

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

/// Nodes of the cluster, and workers that read it.
const NODES: usize = 3;

/// The sessions that share.
const SESSIONS: [&str; NODES] = ["plant-1", "plant-1/1", "plant-1/2"];

struct Fleet {
    chain: Chain<Cluster>,
    others: Vec<Worker>,
    publishers: Vec<Publisher>,
}

impl Fleet {
    async fn start() -> Self {
        let cluster = Cluster::start(NODES);
        let external = json!({"clientId": "fwi0123456789abcdef", "tls": false, "authorities": false, "sharedBy": NODES});
        let gateway = json!({"name": "plant-1", "host": "127.0.0.1", "port": cluster.balancer.port, "external": external});
        let files = [("gateways/plant-1/username", "fleet"), ("gateways/plant-1/password", "password")];
        // No key tells such readings apart: what came twice would be stored twice.
        let decode = json!({"fields": [{"name": "count", "type": "Int64"}]});
        let mut chain =
            Chain::start_reading(cluster, gateway, &files, "devices/{device}/telemetry", &decode, Postgres::shared().await).await;
        chain.worker.wait_ready();
        chain.spread(&SESSIONS, 3).await;
        let others: Vec<Worker> = (1..3).map(|ordinal| chain.one_more_worker(ordinal)).collect();
        others.iter().for_each(Worker::wait_ready);
        // One more worker, and with it one more session, is ready before it has the session.
        let fleet = Self { chain, others, publishers: Vec::new() };
        fleet.chain.wait_for("SELECT count(*) FROM fleetwright.session WHERE topic_filters[1] LIKE '$share/%'", 3).await;
        fleet
    }

    /// Devices at each node, some hundred messages a second each; every tenth is a dead letter.
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

    /// Waits until each node has acknowledged so many more.
    fn more(&self, count: u64) {
        for publisher in &self.publishers {
            let until = publisher.acknowledged() + count;
            wait_until("acknowledgements", || publisher.acknowledged() >= until);
        }
    }

    /// Waits until a worker stores more of what comes by this session.
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

    /// Ends the publishers, and holds what is stored against what was acknowledged.
    async fn judge(mut self) {
        let (mut good, mut bad) = (BTreeSet::new(), BTreeSet::new());
        for (node, publisher) in self.publishers.drain(..).enumerate() {
            let outcome = publisher.finish();
            assert!(outcome.repeated.is_empty(), "the nodes were there all the time");
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
        assert_eq!(chain.count("SELECT count(*) FROM vibration").await, good, "rows, once each");
        assert_eq!(chain.count("SELECT count(*) FROM fleetwright.dead_letter").await, bad, "letters, once each");
    }
}

/// What RMQTT 0.24 loses by itself is avoided: the message that it sends at the moment in which a connection turns out to be broken, so that
/// each connection ends in order for it; and what comes while the only session of a group that is connected moves to another node, so that
/// one of them moves at a time.
#[tokio::test]
async fn workers_share_the_nodes_of_a_cluster_and_lose_and_double_nothing() {
    let mut fleet = Fleet::start().await;
    fleet.publish();
    fleet.all_progress();

    // A worker is killed, and the next one comes by another node.
    for other in [0, 1] {
        fleet.more(200);
        fleet.others[other].kill();
        fleet.more(200);
        fleet.chain.restart(&mut fleet.others[other], i32::try_from(other + 1).unwrap());
        fleet.all_progress();
    }

    // A connection breaks.
    for _ in 0..4 {
        fleet.more(200);
        fleet.chain.broker.balancer.cut_oldest();
        fleet.all_progress();
    }

    // The database takes nothing for a while.
    let holder = fleet.chain.postgres.client(&fleet.chain.database).await;
    holder.batch_execute("BEGIN; LOCK TABLE vibration IN SHARE MODE").await.unwrap();
    fleet.more(1_000);
    holder.batch_execute("COMMIT").await.unwrap();
    fleet.all_progress();

    // A worker goes, and another reads its session on.
    fleet.chain.spread(&SESSIONS, 2).await;
    assert!(fleet.others.pop().unwrap().stop());
    fleet.more(200);
    fleet.judge().await;
}
