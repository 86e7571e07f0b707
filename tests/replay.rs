//! Replays of dead letters in a real TimescaleDB while the worker runs.

#![allow(clippy::unwrap_used, reason = "helpers of tests fail by panicking")]

mod common;

use common::postgres::Postgres;
use common::worker::Chain;
use serde_json::{Value, json};

const TOPIC: &str = "devices/{device}/telemetry";
const LETTERS: &str = "SELECT count(*) FROM fleetwright.dead_letter";
const ROWS: &str = "SELECT count(*) FROM vibration";

fn timed(most: i32) -> Value {
    json!({
        "time": {"pointer": "/ts", "unit": "Milliseconds"},
        "fields": [{"name": "rms", "type": "Float64", "max": most, "required": true}],
    })
}

fn of_arrival(most: i32) -> Value {
    json!({"fields": [{"name": "rms", "type": "Float64", "max": most, "required": true}]})
}

async fn chain(decode: &Value) -> Chain {
    Chain::start(TOPIC, decode, Postgres::shared().await).await
}

/// Runs a replay to its end.
fn replay(chain: &Chain, decode: &Value, arguments: &[&str]) {
    assert!(chain.replay(decode, arguments).wait_with_output().unwrap().status.success());
}

/// Creates this many dead letters of valid messages.
async fn fill(chain: &Chain, count: i32) {
    chain
        .execute(&format!(
            "INSERT INTO fleetwright.dead_letter (time, namespace, pipeline, gateway, topic, payload, reason, detail, partial)
             SELECT '2026-05-04T04:00:00Z'::timestamptz + n * interval '1 ms', 'plant', 'vibration', 'plant-1', 'devices/press-' || n % 9 + 1 || '/telemetry',
                 convert_to(format('{{\"ts\": %s, \"rms\": 1}}', 1777863721500 + n), 'UTF8'), 'OutOfRange', '', false
             FROM generate_series(1, {count}) n"
        ))
        .await;
}

#[tokio::test]
async fn accepted_messages_become_rows_once() {
    let chain = chain(&timed(10)).await;
    for payload in [
        r#"[{"ts":1777863721500,"rms":1},{"ts":1777863721501,"rms":11},{"ts":1777863721502,"rms":2}]"#,
        r#"{"ts":1777863721503,"rms":12}"#,
        r#"{"ts":1777863721504,"rms":1000}"#,
        r#"{"ts":1777863721500,"rms":5}"#,
        "{",
    ] {
        chain.publish("devices/press-1/telemetry", payload);
    }
    chain.publish("devices/late/telemetry", r#"{"ts":1777863721505,"rms":1}"#);
    chain.wait_for(LETTERS, 6).await;
    chain.wait_for(ROWS, 2).await;
    chain.execute("INSERT INTO fleetwright.device (namespace, name, gateway, enabled) VALUES ('plant', 'late', 'plant-1', true)").await;

    replay(&chain, &timed(100), &["--dry-run"]);
    assert_eq!((chain.count(LETTERS).await, chain.count(ROWS).await), (6, 2));
    for _ in 0..2 {
        replay(&chain, &timed(100), &[]);
        let reasons = "SELECT string_agg(reason, ',' ORDER BY reason) FROM fleetwright.dead_letter";
        let reasons: String = chain.client.query_one(reasons, &[]).await.unwrap().get(0);
        assert_eq!(reasons, "Conflict,Malformed,OutOfRange");
        assert_eq!(chain.count(ROWS).await, 5);
        assert_eq!(chain.count("SELECT count(*) FROM vibration JOIN fleetwright.device ON id = device_id WHERE name = 'late'").await, 1);
    }
    replay(&chain, &timed(1000), &["--reason", "OutOfRange"]);
    assert_eq!((chain.count(LETTERS).await, chain.count(ROWS).await), (2, 6));
}

/// `maxAge` is compared with the arrival, not with the time of the replay.
#[tokio::test]
async fn a_message_that_was_young_enough_on_arrival_is_replayed() {
    let mut decode = timed(100);
    decode["time"]["maxAge"] = "30d".into();
    let chain = chain(&decode).await;
    chain
        .execute(
            "INSERT INTO fleetwright.dead_letter (time, namespace, pipeline, gateway, topic, payload, reason, detail, partial)
             SELECT now() - interval '40 days', 'plant', 'vibration', 'plant-1', 'devices/press-1/telemetry',
                 convert_to(format('{\"ts\": %s, \"rms\": 1}', (1000 * extract(epoch FROM now() - make_interval(days => age)))::bigint), 'UTF8'),
                 'OutOfRange', '', false
             FROM unnest(ARRAY[41, 69, 71]) age",
        )
        .await;
    replay(&chain, &decode, &[]);
    assert_eq!((chain.count(LETTERS).await, chain.count(ROWS).await), (1, 2));
    assert_eq!(chain.count("SELECT count(*) FROM fleetwright.dead_letter WHERE reason = 'TimeOutOfRange'").await, 1);
}

#[tokio::test]
async fn a_message_without_times_is_stored_whole_or_not_at_all() {
    let chain = chain(&of_arrival(10)).await;
    chain.execute("ALTER TABLE vibration ADD CONSTRAINT odd CHECK (rms <> 7)").await;
    for payload in [r#"[{"rms":1},{"rms":11},{"rms":2}]"#, r#"{"rms":12}"#, r#"[{"rms":3},{"rms":7}]"#, r#"{"rms":7}"#] {
        chain.publish("devices/press-1/telemetry", payload);
    }
    chain.wait_for(LETTERS, 4).await;
    chain.wait_for(ROWS, 1).await;
    assert_eq!(chain.count("SELECT count(*) FROM fleetwright.dead_letter WHERE partial").await, 1);
    chain.execute("ALTER TABLE vibration DROP CONSTRAINT odd").await;
    let arrived = "SELECT (extract(epoch FROM min(time)) * 1000000)::bigint FROM";
    let arrival = chain.count(&format!("{arrived} fleetwright.dead_letter")).await;
    for _ in 0..2 {
        replay(&chain, &of_arrival(100), &[]);
        // A message that is partly stored stays a dead letter: no key identifies the stored readings.
        assert_eq!((chain.count(LETTERS).await, chain.count(ROWS).await), (1, 6));
        let first = chain.count(&format!("{arrived} vibration")).await;
        assert!((arrival..arrival + 10).contains(&first), "{first} is not the time of arrival, {arrival}");
    }
}

#[tokio::test]
async fn a_killed_or_concurrent_replay_stores_each_row_once() {
    const COUNT: i32 = 60_000;
    let chain = chain(&timed(10)).await;
    fill(&chain, COUNT).await;
    let mut first = chain.replay(&timed(10), &[]);
    while chain.count(ROWS).await == 0 {
        assert!(first.try_wait().unwrap().is_none(), "it was done before it could be killed");
    }
    first.kill().unwrap();
    first.wait().unwrap();
    let left = chain.count(LETTERS).await;
    assert!(left > 0, "it was done before it could be killed");
    let both = [chain.replay(&timed(10), &[]), chain.replay(&timed(10), &[])];
    for replay in both {
        assert!(replay.wait_with_output().unwrap().status.success());
    }
    assert_eq!((chain.count(LETTERS).await, chain.count(ROWS).await), (0, i64::from(COUNT)));
}

#[tokio::test]
async fn filters_select_dead_letters() {
    let chain = chain(&timed(10)).await;
    fill(&chain, 90).await;
    let rows_by = |device: &str| format!("{ROWS} JOIN fleetwright.device ON id = device_id WHERE name = '{device}'");
    replay(&chain, &timed(10), &["--gateway", "plant-2"]);
    replay(&chain, &timed(10), &["--until", "2026-05-04T04:00:00Z"]);
    replay(&chain, &timed(10), &["--since", "2026-05-04T05:00:00Z"]);
    replay(&chain, &timed(10), &["--topic", "devices/+"]);
    replay(&chain, &timed(10), &["--reason", "Malformed,Conflict"]);
    assert_eq!(chain.count(ROWS).await, 0);
    replay(&chain, &timed(10), &["--device", "press-3"]);
    assert_eq!((chain.count(&rows_by("press-3")).await, chain.count(ROWS).await), (10, 10));
    replay(&chain, &timed(10), &["--topic", "devices/press-4/#"]);
    assert_eq!((chain.count(&rows_by("press-4")).await, chain.count(ROWS).await), (10, 20));
    replay(&chain, &timed(10), &["--since", "2026-05-04T04:00:00Z", "--reason", "OutOfRange", "--gateway", "plant-1"]);
    assert_eq!((chain.count(LETTERS).await, chain.count(ROWS).await), (0, 90));
}

/// Restarts the worker with this request.
fn request_replay(chain: &mut Chain, request: &Value) {
    assert!(chain.worker.stop());
    chain.configure("replay", request.clone());
    chain.start_worker(None);
    chain.worker.wait_ready();
}

#[tokio::test]
async fn a_requested_replay_runs_once() {
    let mut chain = chain(&timed(10)).await;
    fill(&chain, 90).await;
    chain.publish("devices/press-1/telemetry", "{");
    chain.wait_for(LETTERS, 91).await;
    request_replay(&mut chain, &json!({"token": "a", "reasons": ["OutOfRange"]}));
    let finished = "SELECT count(*) FROM fleetwright.pipeline_replay WHERE finished AND remaining = 0 AND refused = 0 AND stored =";
    chain.wait_for(&format!("{finished} 90"), 1).await;
    assert_eq!((chain.count(ROWS).await, chain.count(LETTERS).await), (90, 1));

    chain.execute("DELETE FROM vibration").await;
    fill(&chain, 10).await;
    request_replay(&mut chain, &json!({"token": "a"}));
    common::mosquitto::wait_until("the end of the second request", || chain.worker.log().contains("this replay is already finished"));
    assert_eq!((chain.count(ROWS).await, chain.count(LETTERS).await), (0, 11));
    // A message that is refused again is counted, and stays a dead letter.
    request_replay(&mut chain, &json!({"token": "b"}));
    chain
        .wait_for("SELECT count(*) FROM fleetwright.pipeline_replay WHERE finished AND stored = 10 AND refused = 1 AND remaining = 0", 1)
        .await;
    assert_eq!((chain.count(ROWS).await, chain.count(LETTERS).await), (10, 1));
}

#[tokio::test]
async fn a_requested_replay_continues_after_a_kill_while_messages_arrive() {
    const COUNT: i32 = 20_000;
    let mut chain = chain(&timed(10)).await;
    fill(&chain, COUNT).await;
    request_replay(&mut chain, &json!({"token": "a"}));
    chain.publish("devices/press-1/telemetry", r#"{"ts":1777863700000,"rms":1}"#);
    chain.wait_for("SELECT count(*) FROM vibration WHERE time < '2026-05-04T03:02:01Z'", 1).await;
    let rows = format!("{ROWS} WHERE time > '2026-05-04T03:02:01Z'");
    while chain.count(&rows).await == 0 {}
    chain.worker.kill();
    assert_eq!(
        chain.count("SELECT count(*) FROM fleetwright.pipeline_replay WHERE NOT finished AND remaining > 0").await,
        1,
        "it was done already"
    );
    chain.start_worker(None);
    let finished = format!("SELECT count(*) FROM fleetwright.pipeline_replay WHERE finished AND stored = {COUNT} AND remaining = 0");
    chain.wait_for(&finished, 1).await;
    assert_eq!((chain.count(LETTERS).await, chain.count(&rows).await), (0, i64::from(COUNT)));
}
