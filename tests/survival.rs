//! Failures around a worker while devices publish: every acknowledged message is stored exactly once.

#![allow(clippy::unwrap_used, clippy::panic, reason = "helpers of tests fail by panicking")]
#![allow(clippy::print_stdout, reason = "the output of a failed test shows its faults")]

mod common;

use std::sync::Arc;
use std::time::Duration;

use common::mosquitto::wait_until;
use common::postgres::Postgres;
use common::proxy::{Fault, Way};
use common::publisher::{Published, Publisher};
use common::worker::{Chain, Worker};
use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use rand::{RngExt, SeedableRng};
use serde_json::{Value, json};

const TOPIC: &str = "devices/{device}/telemetry";

/// 2026-05-04T03:02:01.5Z, in milliseconds since 1970.
const TS: u64 = 1_777_863_721_500;

/// How often a worker or a database is killed.
const ROUNDS: u32 = 4;

/// How often a broker is killed.
const BROKER_KILLS: u32 = 20;

fn timed() -> Value {
    json!({
        "time": {"pointer": "/ts", "unit": "Milliseconds"},
        "fields": [{"name": "count", "type": "Int64"}, {"name": "rms", "type": "Float64"}],
    })
}

fn of_arrival() -> Value {
    json!({"fields": [{"name": "count", "type": "Int64"}, {"name": "rms", "type": "Float64"}]})
}

/// Publishes continuously; every tenth message is a dead letter.
fn publish(chain: &Chain) -> Publisher {
    publish_padded(chain, 0)
}

/// The same, with this number of additional bytes in an undeclared field.
fn publish_padded(chain: &Chain, padding: usize) -> Publisher {
    let padding = "x".repeat(padding);
    Publisher::start(chain.broker.port, "press-1", move |number| {
        let device = number % 9 + 1;
        let n = if number % 10 == 3 { format!("\"{number}\"") } else { number.to_string() };
        (format!("devices/press-{device}/telemetry"), format!(r#"{{"ts":{},"count":{n},"rms":1,"rest":"{padding}"}}"#, TS + number / 9))
    })
}

/// Waits until this number of further messages is acknowledged to the publisher.
fn more(publisher: &Publisher, number: u64) {
    let goal = publisher.acknowledged() + number;
    wait_until("progress", || publisher.acknowledged() > goal);
}

/// Checks that every acknowledged message is stored exactly once.
async fn check(mut chain: Chain, outcome: Published, arrival: bool) {
    let (bad, good): (Vec<u64>, Vec<u64>) = outcome.acknowledged.iter().partition(|number| *number % 10 == 3);
    chain.wait_for("SELECT count(DISTINCT count) FROM vibration", i64::try_from(good.len()).unwrap()).await;
    chain.wait_for("SELECT count(DISTINCT payload) FROM fleetwright.dead_letter", i64::try_from(bad.len()).unwrap()).await;
    let repeats = |of: &[u64]| i64::try_from(of.iter().filter(|number| outcome.repeated.contains(number)).count()).unwrap();
    // A message that the publisher sent twice has no unique key if its time is that of its arrival, or if it is a dead letter.
    let rows = chain.count("SELECT count(*) FROM vibration").await - i64::try_from(good.len()).unwrap();
    assert!(
        (0..=if arrival { repeats(&good) } else { 0 }).contains(&rows),
        "{rows} rows are duplicates; the publisher repeated {}",
        repeats(&good)
    );
    let letters = chain.count("SELECT count(*) FROM fleetwright.dead_letter").await - i64::try_from(bad.len()).unwrap();
    assert!((0..=repeats(&bad)).contains(&letters), "{letters} dead letters are duplicates; the publisher repeated {}", repeats(&bad));
    assert_eq!(chain.count("SELECT count(*) FROM fleetwright.dead_letter WHERE reason <> 'WrongType'").await, 0);
    assert!(chain.worker.stop(), "{}", chain.worker.log());
}

/// Publishes while `harm` is executed this number of times.
async fn survives(chain: Chain, arrival: bool, rounds: u32, mut harm: impl AsyncFnMut(&mut Chain, u32)) {
    let mut chain = chain;
    let publisher = publish(&chain);
    for round in 0..rounds {
        more(&publisher, 16_000 / u64::from(rounds));
        harm(&mut chain, round).await;
    }
    more(&publisher, 2_000);
    let outcome = publisher.finish();
    check(chain, outcome, arrival).await;
}

async fn chain(decode: &Value) -> Chain {
    Chain::start(TOPIC, decode, Postgres::shared().await).await
}

async fn chain_with_own_database(decode: &Value) -> Chain {
    Chain::start(TOPIC, decode, Arc::new(Postgres::start().await)).await
}

async fn kill_worker(chain: &mut Chain, _round: u32) {
    chain.worker.kill();
    chain.start_worker(None);
}

/// The worker may not be connected again when the broker is killed the next time.
async fn kill_broker(chain: &mut Chain, _round: u32) {
    chain.broker.kill();
    chain.broker.start_again();
}

async fn kill_database(chain: &mut Chain, round: u32) {
    if round.is_multiple_of(2) {
        chain.postgres.kill();
        chain.worker.wait_not_ready("database");
    } else {
        chain.postgres.stop();
    }
    chain.postgres.start_again().await;
    chain.reconnect().await;
}

#[tokio::test]
async fn a_killed_worker_stores_messages_exactly_once() {
    survives(chain(&timed()).await, false, ROUNDS, kill_worker).await;
}

#[tokio::test]
async fn a_killed_worker_stores_messages_timed_by_arrival_exactly_once() {
    survives(chain(&of_arrival()).await, true, ROUNDS, kill_worker).await;
}

#[tokio::test]
async fn a_broker_killed_twenty_times_delivers_messages_exactly_once() {
    survives(chain(&timed()).await, false, BROKER_KILLS, kill_broker).await;
}

#[tokio::test]
async fn a_broker_killed_twenty_times_delivers_messages_timed_by_arrival_exactly_once() {
    survives(chain(&of_arrival()).await, true, BROKER_KILLS, kill_broker).await;
}

#[tokio::test]
async fn a_killed_database_stores_messages_exactly_once() {
    survives(chain_with_own_database(&timed()).await, false, ROUNDS, kill_database).await;
}

#[tokio::test]
async fn a_killed_database_stores_messages_timed_by_arrival_exactly_once() {
    survives(chain_with_own_database(&of_arrival()).await, true, ROUNDS, kill_database).await;
}

/// The number of a worker's logins to the broker; 0 before it has claimed the session.
fn logins(worker: &Worker) -> f64 {
    const CONNECTIONS: &str = r#"fleetwright_ingest_connections_total{gateway="plant-1"}"#;
    if worker.get("/metrics").1.contains(CONNECTIONS) { worker.metric(CONNECTIONS) } else { 0.0 }
}

/// A gateway moves between two workers.
async fn survives_moves_between_workers(decode: &Value, arrival: bool) {
    let mut second = None;
    survives(chain(decode).await, arrival, ROUNDS, async |chain, round| {
        let second = second.get_or_insert_with(|| chain.one_more_worker(1));
        second.wait_ready();
        let next = i32::from(round.is_multiple_of(2));
        let before = logins(if next == 1 { second } else { &chain.worker });
        chain.assign(next).await;
        let (new, old) = if next == 1 { (&*second, &chain.worker) } else { (&chain.worker, &*second) };
        wait_until("the login of the new worker", || logins(new) > before);
        new.wait_ready();
        old.wait_ready();
    })
    .await;
    assert!(second.unwrap().stop());
}

#[tokio::test]
async fn moves_between_workers_store_messages_exactly_once() {
    survives_moves_between_workers(&timed(), false).await;
}

#[tokio::test]
async fn moves_between_workers_store_messages_timed_by_arrival_exactly_once() {
    survives_moves_between_workers(&of_arrival(), true).await;
}

/// One network fault between the worker and the broker or the database.
fn break_network(chain: &Chain, publisher: &Publisher, random: &mut StdRng) {
    let proxies = chain.proxies.as_ref().unwrap();
    let (leg, proxy) = if random.random() { ("broker", &proxies.broker) } else { ("database", &proxies.database) };
    let way = if random.random() { Way::Up } else { Way::Down };
    let kind = *["cut", "cut after", "half-close", "delay", "stall", "stall and cut", "refuse"].choose(random).unwrap();
    println!("{leg}: {kind} {way:?}");
    match kind {
        "cut after" => proxy.harm(way, Fault::CutAfter(random.random_range(0..20_000))),
        "half-close" => proxy.harm(way, Fault::HalfClose),
        "delay" => proxy.harm(way, Fault::Delay(Duration::from_millis(random.random_range(1..300)))),
        "stall" | "stall and cut" => proxy.stall(),
        "refuse" => proxy.refuse(),
        _ => proxy.cut(),
    }
    if matches!(kind, "stall" | "stall and cut" | "refuse") {
        more(publisher, random.random_range(1..2_000));
    }
    if kind == "stall and cut" {
        proxy.cut();
    }
    proxy.pass();
}

/// Random network faults between the worker and the broker or the database. `FLEETWRIGHT_SEED` repeats the faults of a failed run.
async fn survives_a_faulty_network(decode: &Value, arrival: bool) {
    const FAULTS: u32 = 40;
    let seed = std::env::var("FLEETWRIGHT_SEED").map_or_else(|_| rand::random(), |seed| seed.parse().unwrap());
    println!("FLEETWRIGHT_SEED={seed}");
    let mut random = StdRng::seed_from_u64(seed);
    let chain = Chain::start_between_proxies(TOPIC, decode, Postgres::shared().await).await;
    let publisher = publish(&chain);
    let stored = || chain.worker.metric(r#"fleetwright_ingest_batches_total{gateway="plant-1"}"#);
    for _ in 0..FAULTS {
        // The next fault meets batches in flight, and often the recovery from the last fault.
        let goal = stored() + f64::from(random.random_range(1..8));
        wait_until("the worker's progress", || stored() > goal);
        break_network(&chain, &publisher, &mut random);
    }
    chain.worker.wait_ready();
    let outcome = publisher.finish();
    check(chain, outcome, arrival).await;
}

#[tokio::test]
async fn a_faulty_network_stores_messages_exactly_once() {
    survives_a_faulty_network(&timed(), false).await;
}

#[tokio::test]
async fn a_faulty_network_stores_messages_timed_by_arrival_exactly_once() {
    survives_a_faulty_network(&of_arrival(), true).await;
}

/// The database first stops answering, then refuses connections, then recovers.
#[tokio::test]
async fn an_unavailable_database_is_reported_and_its_backlog_is_stored() {
    let chain = Chain::start_between_proxies(TOPIC, &of_arrival(), Postgres::shared().await).await;
    let database = &chain.proxies.as_ref().unwrap().database;
    let up = || chain.worker.metric("fleetwright_ingest_database_up").abs() > f64::EPSILON;
    let rows = || chain.worker.metric(r#"fleetwright_ingest_rows_total{gateway="plant-1"}"#);
    let pressure = || chain.worker.metric(r#"fleetwright_ingest_back_pressure_ratio{gateway="plant-1"}"#);
    assert!(up());
    // About ten thousand of these messages reach the memory limit.
    let publisher = publish_padded(&chain, 1_000);
    wait_until("rows", || rows() > 1_000.0);

    database.stall();
    chain.worker.wait_not_ready("database: ");
    assert!(!up());
    // The worker stops reading at its memory limit and keeps its session. The broker queues the rest.
    wait_until("back-pressure", || pressure() >= 1.0);
    let before = rows();
    more(&publisher, 1_000);
    assert!((rows() - before).abs() < f64::EPSILON && pressure() >= 1.0);

    database.refuse();
    chain.worker.wait_not_ready("database: failed to connect to 127.0.0.1");
    more(&publisher, 1_000);

    database.pass();
    chain.worker.wait_ready();
    wait_until("the metric of the database", up);
    let outcome = publisher.finish();
    wait_until("the end of back-pressure", || pressure() < 0.1);
    let connections = chain.worker.metric(r#"fleetwright_ingest_connections_total{gateway="plant-1"}"#);
    assert!((connections - 1.0).abs() < f64::EPSILON, "the worker logged in {connections} times");
    check(chain, outcome, true).await;
}
