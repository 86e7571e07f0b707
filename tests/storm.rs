//! Many malformed messages and few valid ones, between a real Mosquitto and a real TimescaleDB.

#![allow(clippy::unwrap_used, reason = "helpers of tests fail by panicking")]

mod common;

use common::postgres::Postgres;
use common::publisher::Publisher;
use common::worker::Chain;
use serde_json::json;

/// 95 of 100 messages are malformed, and one has no time. The worker is killed twice meanwhile.
#[tokio::test]
async fn dead_letters_are_bounded_and_counted_while_valid_messages_are_stored() {
    const BYTES_PER_HOUR: i64 = 256 * 1024;
    let decode = json!({
        "time": {"pointer": "/ts", "unit": "Milliseconds"},
        "fields": [{"name": "rms", "type": "Float64", "required": true}, {"name": "count", "type": "Int64"}],
    });
    let mut chain = Chain::start("devices/{device}/telemetry", &decode, Postgres::shared().await).await;
    assert!(chain.worker.stop());
    chain.configure("deadLetterBytesPerHour", json!(BYTES_PER_HOUR));
    chain.start_worker(None);
    chain.worker.wait_ready();
    let publisher = Publisher::start(chain.broker.port, "press-1", |number| {
        let payload = match number % 100 {
            0..4 => format!(r#"{{"ts":{},"rms":1,"count":{number}}}"#, 1_777_863_721_500 + number),
            4 => format!(r#"{{"rms":1,"count":{number}}}"#),
            _ => format!("{{{number} is no JSON, {}", "and it is long ".repeat(10)),
        };
        ("devices/press-1/telemetry".to_owned(), payload)
    });
    for round in 1..=2 {
        common::mosquitto::wait_until("progress", || publisher.acknowledged() > round * 6_000);
        chain.worker.kill();
        chain.start_worker(None);
    }
    common::mosquitto::wait_until("progress", || publisher.acknowledged() > 20_000);
    let outcome = publisher.finish();
    let of = |wanted: fn(u64) -> bool| i64::try_from(outcome.acknowledged.iter().filter(|number| wanted(**number % 100)).count()).unwrap();
    chain.wait_for("SELECT count(*) FROM vibration", of(|rest| rest < 4)).await;
    // Each dead letter is stored or counted once.
    let counted = |reason: &str| {
        format!("SELECT coalesce(sum(kept + discarded), 0)::bigint FROM fleetwright.dead_letter_count WHERE reason = '{reason}'")
    };
    chain.wait_for(&counted("Malformed"), of(|rest| rest > 4)).await;
    chain.wait_for(&counted("MissingTime"), of(|rest| rest == 4)).await;
    let kept = "SELECT sum(kept)::bigint FROM fleetwright.dead_letter_count";
    assert_eq!(chain.count(kept).await, chain.count("SELECT count(*) FROM fleetwright.dead_letter").await);
    // The rare reason has its own share of the quota, so some of its dead letters are stored.
    assert!(chain.count("SELECT count(*) FROM fleetwright.dead_letter WHERE reason = 'MissingTime'").await >= 5);
    let hours = chain.count("SELECT count(DISTINCT hour) FROM fleetwright.dead_letter_count").await;
    let bytes = chain.count("SELECT sum(kept_bytes)::bigint FROM fleetwright.dead_letter_count").await;
    // Two concurrent transactions do not see each other: each may use the remaining quota.
    assert!(bytes <= hours * 2 * BYTES_PER_HOUR, "{bytes}");
    let measured = chain
        .count("SELECT sum(octet_length(topic) + octet_length(payload) + octet_length(detail))::bigint FROM fleetwright.dead_letter")
        .await;
    assert!(measured < bytes && bytes < 3 * measured, "{bytes} bytes are counted, {measured} are there");
    let metric = |reason: &str| {
        chain.worker.metric(&format!(r#"fleetwright_ingest_dead_letters_discarded_total{{gateway="plant-1",reason="{reason}"}}"#))
    };
    assert!(metric("Malformed") > 1_000.0);
    assert!(metric("Conflict").abs() < f64::EPSILON);
}
