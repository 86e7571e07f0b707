//! Readings of one row that arrive in several messages.

use serde_json::{Value, json};

use crate::common::mosquitto::wait_until;
use crate::common::postgres::Postgres;
use crate::common::worker::Chain;

/// 2026-05-04T03:02:01.5Z, in milliseconds since 1970.
const TS: u64 = 1_777_863_721_500;

const CONFLICTS: &str = "SELECT count(*) FROM fleetwright.dead_letter WHERE reason = 'Conflict'";

/// Line, axis, temperature, humidity.
type Row = (String, String, Option<f64>, Option<f64>);

async fn chain(on_conflict: &str) -> Chain {
    let decode = json!({
        "time": {"pointer": "/ts"},
        "fields": [
            {"name": "temperature", "type": "Float64"},
            {"name": "axis", "type": "Text", "required": true, "key": true},
            {"name": "humidity", "type": "Float64"},
        ],
    });
    let mut chain = Chain::start("{line}/{device}", &decode, Postgres::shared().await).await;
    chain.configure("onConflict", on_conflict.into());
    chain.start_worker(None);
    chain.worker.wait_ready();
    chain
}

fn reading(ts: u64, axis: &str, mut values: Value) -> String {
    values["ts"] = ts.into();
    values["axis"] = axis.into();
    values.to_string()
}

fn metric(chain: &Chain, name: &str) -> f64 {
    chain.worker.metric(&format!(r#"fleetwright_ingest_{name}{{gateway="plant-1"}}"#))
}

async fn rows(chain: &Chain) -> Vec<Row> {
    let query = "SELECT line, axis, temperature, humidity FROM vibration WHERE time = to_timestamp($1::float8 / 1000) ORDER BY line, axis";
    #[allow(clippy::cast_precision_loss, reason = "below 2^53")]
    let rows = chain.client.query(query, &[&(TS as f64)]).await.unwrap();
    rows.iter().map(|row| (row.get(0), row.get(1), row.get(2), row.get(3))).collect()
}

fn row(line: &str, axis: &str, temperature: Option<f64>, humidity: Option<f64>) -> Row {
    (line.to_owned(), axis.to_owned(), temperature, humidity)
}

#[tokio::test]
async fn readings_of_one_row_are_merged_and_contradictions_are_resolved() {
    for (on_conflict, temperature, dead_letters) in [("DeadLetter", 1.0, 1), ("Keep", 1.0, 0), ("Replace", 9.0, 0)] {
        let chain = chain(on_conflict).await;
        let mut published = 0.0;
        for (line, axis, values) in [
            ("a", "x", json!({"temperature": 1})),
            ("a", "x", json!({"humidity": 2})),
            ("a", "x", json!({"temperature": 1, "humidity": 2})),
            ("a", "y", json!({"temperature": 5})),
            ("b", "x", json!({"humidity": 6})),
            ("a", "x", json!({"temperature": 9})),
        ] {
            chain.publish(&format!("{line}/press-1"), &reading(TS, axis, values));
            published += 1.0;
            wait_until("the message is stored", || {
                metric(&chain, "messages_total") >= published && metric(&chain, "unacknowledged_messages") < 1.0
            });
        }
        let expected = [row("a", "x", Some(temperature), Some(2.0)), row("a", "y", Some(5.0), None), row("b", "x", None, Some(6.0))];
        assert_eq!(rows(&chain).await, expected, "{on_conflict}");
        assert_eq!(chain.count(CONFLICTS).await, dead_letters, "{on_conflict}");
        let resolved = metric(&chain, "resolved_conflicts_total");
        assert!((resolved - if dead_letters > 0 { 0.0 } else { 1.0 }).abs() < f64::EPSILON, "{on_conflict}: {resolved}");
        let merged = metric(&chain, "merged_readings_total");
        assert!((merged - if on_conflict == "Replace" { 2.0 } else { 1.0 }).abs() < f64::EPSILON, "{on_conflict}: {merged}");
        assert!((metric(&chain, "rows_total") - 3.0).abs() < f64::EPSILON, "{on_conflict}");
    }
}

/// Messages that wait for the database are in one batch, and become one row before the database sees them.
#[tokio::test]
async fn only_the_message_that_contradicts_a_row_is_refused() {
    let mut chain = chain("DeadLetter").await;
    chain.publish("a/press-1", &reading(TS, "x", json!({"temperature": 1})));
    chain.wait_for("SELECT count(*) FROM vibration", 1).await;
    let mut other = chain.postgres.client(&chain.database).await;
    let transaction = other.transaction().await.unwrap();
    transaction.batch_execute("LOCK TABLE vibration IN EXCLUSIVE MODE").await.unwrap();
    // Each writer waits with a batch.
    for ts in 1..=2 {
        chain.publish("a/press-1", &reading(TS + ts, "x", json!({"temperature": 1})));
        chain.wait_for("SELECT count(*) FROM pg_locks WHERE NOT granted", i64::try_from(ts).unwrap()).await;
    }
    for values in [json!({"humidity": 2}), json!({"temperature": 9}), json!({"temperature": 1})] {
        chain.publish("a/press-1", &reading(TS, "x", values));
    }
    wait_until("all messages", || metric(&chain, "messages_total") >= 6.0);
    transaction.rollback().await.unwrap();
    chain.wait_for(CONFLICTS, 1).await;
    assert_eq!(rows(&chain).await, [row("a", "x", Some(1.0), Some(2.0))]);

    // A replay merges as the worker does.
    chain.configure("onConflict", "Replace".into());
    let replay = chain.replay(&chain.decode(), &[]).wait_with_output().unwrap();
    assert!(replay.status.success(), "{replay:?}");
    assert_eq!(rows(&chain).await, [row("a", "x", Some(9.0), Some(2.0))]);
    assert_eq!(chain.count(CONFLICTS).await, 0);
}

/// An earlier version indexed time and device only.
#[tokio::test]
async fn the_key_of_an_existing_table_changes() {
    let mut chain = chain("DeadLetter").await;
    chain.execute("INSERT INTO vibration (time, device_id, line, axis, temperature) VALUES (now(), 1, 'a', 'x', 1)").await;
    let key = "SELECT count(*) FROM pg_index WHERE indrelid = 'vibration'::regclass AND indisunique AND indnatts =";
    let mut earlier = chain.desired.clone();
    earlier.table.key.truncate(2);
    std::mem::swap(&mut chain.desired, &mut earlier);
    chain.apply().await;
    assert_eq!((chain.count(&format!("{key} 2")).await, chain.count(&format!("{key} 4")).await), (1, 0));
    std::mem::swap(&mut chain.desired, &mut earlier);
    chain.apply().await;
    assert_eq!((chain.count(&format!("{key} 2")).await, chain.count(&format!("{key} 4")).await), (0, 1));

    // Rows that differ only in the capture forbid the shorter key.
    chain.execute("INSERT INTO vibration SELECT time, device_id, 'b', temperature, axis FROM vibration").await;
    let error = fleetwright::sink::timescale::execute::apply(&mut chain.client, &earlier).await.unwrap_err();
    assert_eq!(error.reason().as_str(), "KeyConflict", "{error}");
}
