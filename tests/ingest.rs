//! A worker between a real Mosquitto and a real TimescaleDB.

#![allow(clippy::unwrap_used, clippy::panic, reason = "helpers of tests fail by panicking")]

#[path = "ingest/bounds.rs"]
mod bounds;
mod common;
#[path = "ingest/merge.rs"]
mod merge;
#[path = "ingest/refused.rs"]
mod refused;

use common::postgres::Postgres;
use common::publisher::Publisher;
use common::worker::Chain;
use serde_json::{Value, json};

const TOPIC: &str = "devices/{device}/telemetry";

/// 2026-05-04T03:02:01.5Z, in milliseconds since 1970.
const TS: u64 = 1_777_863_721_500;

fn timed() -> Value {
    json!({
        "time": {"pointer": "/ts", "unit": "Milliseconds"},
        "fields": [
            {"name": "rms", "type": "Float64", "min": 0, "max": 200, "required": true},
            {"name": "count", "type": "Int64"},
            {"name": "running", "type": "Boolean"},
            {"name": "state", "type": "Text", "pointer": "/state/name"},
        ],
    })
}

async fn chain(decode: &Value) -> Chain {
    Chain::start(TOPIC, decode, Postgres::shared().await).await
}

async fn reasons(chain: &Chain) -> Vec<(String, String)> {
    let rows =
        chain.client.query("SELECT reason, convert_from(payload, 'UTF8') FROM fleetwright.dead_letter ORDER BY 1, 2", &[]).await.unwrap();
    rows.iter().map(|row| (row.get(0), row.get(1))).collect()
}

#[tokio::test]
async fn messages_become_rows_and_dead_letters() {
    let chain = Chain::start("{site}/devices/{device}/telemetry", &timed(), Postgres::shared().await).await;
    chain.execute("INSERT INTO fleetwright.device (namespace, name, gateway, enabled) VALUES ('plant', 'off', 'plant-1', false), ('plant', 'far', 'plant-2', true)").await;
    chain
        .publish("berlin/devices/press-1/telemetry", r#"{"ts":1777863721500,"rms":0.1,"count":7,"running":true,"state":{"name":"läuft"}}"#);
    chain.publish(
        "berlin/devices/press-2/telemetry",
        r#"[{"ts":1777863721500,"rms":1},{"ts":1777863721501,"rms":-1},{"ts":1777863721502,"rms":2.5}]"#,
    );
    for (device, payload) in [
        ("press-1", "{"),
        ("press-1", r#"{"ts":1777863721501,"rms":"1"}"#),
        ("press-1", r#"{"rms":1}"#),
        ("press-1", r#"{"ts":1777863721501}"#),
        ("press-1", r#"{"ts":1,"rms":1}"#),
        ("press-1", r#"{"ts":1777863721500,"rms":0.2}"#),
        ("nobody", r#"{"ts":1777863721500,"rms":1}"#),
        ("off", r#"{"ts":1777863721500,"rms":1}"#),
        ("far", r#"{"ts":1777863721500,"rms":1}"#),
        // A redelivery: neither a new row nor a dead letter.
        ("press-2", r#"{"ts":1777863721502,"rms":2.5}"#),
        ("press-1", r#"{"ts":1777863721600,"rms":3}"#),
    ] {
        chain.publish(&format!("berlin/devices/{device}/telemetry"), payload);
    }
    chain.wait_for("SELECT count(*) FROM fleetwright.dead_letter", 10).await;
    chain.wait_for("SELECT count(*) FROM vibration", 4).await;

    let first = chain
        .client
        .query_one("SELECT site, rms, count, running, state FROM vibration JOIN fleetwright.device ON id = device_id WHERE name = 'press-1' AND time = '2026-05-04T03:02:01.5Z'", &[])
        .await
        .unwrap();
    let values: (String, f64, i64, bool, String) = (first.get(0), first.get(1), first.get(2), first.get(3), first.get(4));
    assert_eq!(values, ("berlin".to_owned(), 0.1, 7, true, "läuft".to_owned()));
    assert_eq!(chain.count("SELECT count(*) FROM vibration WHERE state IS NULL AND running IS NULL AND count IS NULL").await, 3);

    let found: Vec<String> = reasons(&chain).await.into_iter().map(|(reason, _)| reason).collect();
    let expected = [
        "Conflict",
        "DisabledDevice",
        "Malformed",
        "MissingField",
        "MissingTime",
        "OutOfRange",
        "TimeOutOfRange",
        "UnknownDevice",
        "WrongGateway",
        "WrongType",
    ];
    assert_eq!(found, expected);
    let letter = chain
        .client
        .query_one(
            "SELECT topic, payload, detail, gateway, namespace, pipeline FROM fleetwright.dead_letter WHERE reason = 'WrongType'",
            &[],
        )
        .await
        .unwrap();
    assert_eq!(letter.get::<_, String>(0), "berlin/devices/press-1/telemetry");
    assert_eq!(letter.get::<_, Vec<u8>>(1), br#"{"ts":1777863721501,"rms":"1"}"#);
    assert!(letter.get::<_, String>(2).contains("rms"));
    assert_eq!([3, 4, 5].map(|column| letter.get::<_, String>(column)), ["plant-1", "plant", "vibration"]);
    assert!(
        (chain.worker.metric(r#"fleetwright_ingest_dead_letters_total{gateway="plant-1",reason="Malformed"}"#) - 1.0).abs() < f64::EPSILON
    );
    assert!(chain.worker.metric(r#"fleetwright_ingest_redelivered_total{gateway="plant-1"}"#) >= 1.0);
    let processed = r#"fleetwright_ingest_message_processing_seconds_count{gateway="plant-1"}"#;
    common::mosquitto::wait_until("every message to be counted", || (chain.worker.metric(processed) - 13.0).abs() < f64::EPSILON);
    let lag = r#"fleetwright_ingest_lag_seconds{gateway="plant-1"}"#;
    common::mosquitto::wait_until("the end of the lag", || chain.worker.metric(lag).abs() < f64::EPSILON);
}

#[tokio::test]
async fn messages_of_all_formats_except_protobuf_become_rows() {
    let folder = tempfile::tempdir().unwrap();
    let typed = json!([
        {"name": "at", "type": "Timestamp"}, {"name": "rest", "type": "Json"}, {"name": "rms", "type": "Float64", "scale": 2},
        {"name": "state", "type": "Text", "default": "on"},
    ]);
    let number = json!([{"name": "rms", "type": "Float64"}]);
    let birth = b"\x08\x9c\x84\xbe\x87\xdf\x33\x12\x10\x0a\x03rms\x20\x0a\x69\0\0\0\0\0\0\x0c\x40\x18\x01";
    for (format, topic, payload, fields, is_there) in [
        (
            "Json",
            "devices/press-1/telemetry",
            &br#"{"at":"2026-05-04T03:02:01.5Z","rest":{"a":[1,null]},"rms":1.75}"#[..],
            &typed,
            r#"at = '2026-05-04T03:02:01.5Z' AND rest = '{"a": [1, null]}' AND rms = 3.5 AND state = 'on'"#,
        ),
        (
            "Cbor",
            "devices/press-1/telemetry",
            b"\xa3\x62at\xc0\x742013-03-21T20:04:00Z\x64rest\x82\x07\xf6\x63rms\xf9\x3e\x00",
            &typed,
            "at = '2013-03-21T20:04:00Z' AND rest = '[7, null]' AND rms = 3 AND state = 'on'",
        ),
        (
            "SenMl",
            "devices/press-1/telemetry",
            br#"[{"n":"rms","t":1777863721.5,"v":3.5}]"#,
            &number,
            "time = '2026-05-04T03:02:01.5Z' AND rms = 3.5",
        ),
        ("SenMlCbor", "devices/press-1/telemetry", b"\x81\xa2\x00\x63rms\x02\xf9\x43\x00", &number, "rms = 3.5"),
        ("PlainText", "devices/press-1/telemetry", b" 3.5\n", &number, "rms = 3.5"),
        ("SparkplugB", "spBv1.0/g/DBIRTH/n/press-1", birth, &number, "rms = 3.5"),
    ] {
        let pattern = if format == "SparkplugB" { "spBv1.0/{line}/+/{node}/{device}" } else { TOPIC };
        let chain = Chain::start(pattern, &json!({"format": format, "fields": fields}), Postgres::shared().await).await;
        let file = folder.path().join(format);
        std::fs::write(&file, payload).unwrap();
        let output = chain.broker.publish(("device", "password"), &["-t", topic, "-f", file.to_str().unwrap()]);
        assert!(output.status.success(), "{output:?}");
        chain.wait_for("SELECT (SELECT count(*) FROM vibration) + (SELECT count(*) FROM fleetwright.dead_letter)", 1).await;
        assert_eq!(
            chain.count(&format!("SELECT count(*) FROM vibration WHERE {is_there}")).await,
            1,
            "{format}: {:?}",
            reasons(&chain).await
        );
    }
}

#[tokio::test]
async fn a_message_waits_for_the_declaration_of_its_device() {
    // The grace period is long enough for a busy machine.
    let chain = Chain::start_with(&["--device-grace-seconds", "10"], TOPIC, &timed(), Postgres::shared().await).await;
    chain.publish("devices/late/telemetry", &format!(r#"{{"ts":{TS},"rms":1}}"#));
    // Without a notification: the worker polls.
    chain.execute("INSERT INTO fleetwright.device (namespace, name, gateway, enabled) VALUES ('plant', 'late', 'plant-1', true)").await;
    chain.wait_for("SELECT count(*) FROM vibration", 1).await;
    assert_eq!(reasons(&chain).await, []);

    chain.execute("UPDATE fleetwright.device SET enabled = false WHERE name = 'late'; NOTIFY fleetwright_device, 'plant'").await;
    // Messages are accepted until the worker has loaded the change.
    let refused = r#"fleetwright_ingest_dead_letters_total{gateway="plant-1",reason="DisabledDevice"}"#;
    let mut published = 1;
    common::mosquitto::wait_until("a refusal because the device is disabled", || {
        chain.publish("devices/late/telemetry", &format!(r#"{{"ts":{},"rms":1}}"#, TS + published));
        published += 1;
        chain.worker.metric(refused) >= 1.0
    });
    let total = "SELECT (SELECT count(*) FROM vibration) + (SELECT count(*) FROM fleetwright.dead_letter)";
    chain.wait_for(total, i64::try_from(published).unwrap()).await;
    assert!(chain.count("SELECT count(*) FROM fleetwright.dead_letter WHERE reason = 'DisabledDevice' AND detail <> ''").await >= 1);
    assert_eq!(chain.count("SELECT count(*) FROM fleetwright.dead_letter WHERE reason <> 'DisabledDevice'").await, 0);
}

#[tokio::test]
async fn a_row_that_the_database_rejects_affects_no_other_row() {
    let chain = chain(&timed()).await;
    chain.execute("ALTER TABLE vibration ADD CONSTRAINT odd CHECK (rms <> 13)").await;
    let publisher = Publisher::start(chain.broker.port, "press-1", |number| {
        let rms = if number % 100 == 13 { 13 } else { 1 };
        ("devices/press-1/telemetry".to_owned(), format!(r#"{{"ts":{},"rms":{rms}}}"#, TS + number))
    });
    common::mosquitto::wait_until("some messages", || publisher.acknowledged() > 3_000);
    let outcome = publisher.finish();
    let refused = outcome.acknowledged.iter().filter(|number| **number % 100 == 13).count();
    chain.wait_for("SELECT count(*) FROM fleetwright.dead_letter WHERE reason = 'Rejected'", i64::try_from(refused).unwrap()).await;
    chain.wait_for("SELECT count(*) FROM vibration", i64::try_from(outcome.acknowledged.len() - refused).unwrap()).await;
}

#[tokio::test]
async fn a_worker_waits_until_a_dropped_table_exists_again() {
    let mut chain = chain(&timed()).await;
    chain.publish("devices/press-1/telemetry", &format!(r#"{{"ts":{TS},"rms":1}}"#));
    chain.wait_for("SELECT count(*) FROM vibration", 1).await;
    for damage in ["DROP TABLE vibration", "ALTER TABLE vibration DROP COLUMN rms", "DROP TABLE fleetwright.acknowledgement"] {
        chain.execute(damage).await;
        chain.publish("devices/press-1/telemetry", &format!(r#"{{"ts":{},"rms":1}}"#, TS + 1));
        chain.publish("devices/press-1/telemetry", "{");
        chain.worker.wait_not_ready("write");
        chain.apply().await;
        chain.wait_for("SELECT count(*) FROM vibration WHERE time = '2026-05-04T03:02:01.501Z' AND rms = 1", 1).await;
        chain.worker.wait_ready();
        chain.execute("DELETE FROM vibration").await;
    }
    chain.wait_for("SELECT count(*) FROM fleetwright.dead_letter", 3).await;
}

#[tokio::test]
async fn a_changed_topic_ends_the_old_subscription() {
    let mut chain = chain(&timed()).await;
    assert!(chain.worker.stop());
    chain.start_worker(Some("lines/{device}/telemetry"));
    chain.worker.wait_ready();
    // The worker records this after the broker has acknowledged the UNSUBSCRIBE.
    chain.wait_for("SELECT count(*) FROM fleetwright.session WHERE topic_filters = '{lines/+/telemetry}'", 1).await;
    chain.publish("devices/press-1/telemetry", &format!(r#"{{"ts":{TS},"rms":1}}"#));
    chain.publish("lines/press-1/telemetry", &format!(r#"{{"ts":{TS},"rms":2}}"#));
    chain.wait_for("SELECT count(*) FROM vibration WHERE rms = 2", 1).await;
    assert_eq!(chain.count("SELECT count(*) FROM vibration").await + chain.count("SELECT count(*) FROM fleetwright.dead_letter").await, 1);
}
