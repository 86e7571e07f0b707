//! Refused messages become dead letters with a reason, and do not affect other messages.

use std::collections::BTreeMap;

use anyhow::{Result, ensure};
use fleetwright_e2e::client::{Listener, Session};
use fleetwright_e2e::manifest::{device, gateway, pipeline, with};
use fleetwright_e2e::run;
use fleetwright_e2e::wait::{seconds, until};
use serde_json::json;

/// Payloads with their dead letter reasons; `None`: the payload becomes a row.
const MESSAGES: [(&str, Option<&str>); 13] = [
    (r#"{"ts": 1790000000001, "value": 1}"#, None),
    ("not JSON", Some("Malformed")),
    ("", Some("Malformed")),
    (r#"{"ts": 1790000000002, "value": 2"#, Some("Malformed")),
    (r#"{"ts": 1790000000003}"#, Some("MissingField")),
    (r#"{"value": 4}"#, Some("MissingTime")),
    (r#"{"ts": 1790000000005, "value": "5"}"#, Some("WrongType")),
    (r#"{"ts": 1790000000006, "value": 1000.5}"#, Some("OutOfRange")),
    (r#"{"ts": 1790000000007, "value": -0.5}"#, Some("OutOfRange")),
    (r#"{"ts": 7, "value": 8}"#, Some("TimeOutOfRange")),
    (r#"{"ts": 1790000000009, "value": 9, "unknown": {"of": ["no", "concern"]}}"#, None),
    (r#"{"ts": 1790000000009, "value": 10}"#, Some("Conflict")),
    (r#"{"ts": 1790000000011, "value": 1000}"#, None),
];

#[test]
fn refused_messages_become_dead_letters_and_valid_ones_become_rows() {
    run("refuse", async |fleet| {
        let database = fleet.database().await?;
        let field = json!([{"name": "value", "type": "Float64", "required": true, "min": 0, "max": 1000}]);
        fleet
            .apply_all([gateway("plant-1"), device("press-1", "plant-1"), with(pipeline("readings"), "/spec/decode/fields", field)])
            .await?;
        fleet.all_ready(&["Gateway/plant-1", "Device/press-1", "Pipeline/readings"]).await?;
        let listener = Listener::plain(fleet.address("plant-1").await?);
        let mut session = Session::connect(&listener, "press-1", &fleet.password("press-1").await?).await?;
        for (payload, _) in MESSAGES {
            session.publish("devices/press-1/telemetry", payload).await?;
        }
        // The valid readings of an array become rows. The message is a dead letter because of the other readings.
        let mixed = r#"[{"ts": 1790000000020, "value": 20}, {"ts": 1790000000021}, {"ts": 1790000000022, "value": 22}]"#;
        session.publish("devices/press-1/telemetry", mixed).await?;

        until(seconds(20), "rows and dead letters are as expected", async || {
            let rows = database.rows("SELECT value FROM reading ORDER BY value", &[]).await?;
            let values: Vec<f64> = rows.iter().map(|row| row.get(0)).collect();
            ensure!(values == [1.0, 9.0, 20.0, 22.0, 1000.0], "rows: {values:?}");
            let mut expected = BTreeMap::from([(mixed, "MissingField")]);
            expected.extend(MESSAGES.iter().filter_map(|(payload, reason)| reason.map(|reason| (*payload, reason))));
            let sql =
                "SELECT convert_from(payload, 'UTF8'), reason, detail, namespace, pipeline, gateway, topic FROM fleetwright.dead_letter";
            let letters = database.rows(sql, &[]).await?;
            for letter in &letters {
                let (payload, reason, detail): (String, String, String) = (letter.get(0), letter.get(1), letter.get(2));
                ensure!(expected.remove(payload.as_str()) == Some(reason.as_str()), "{payload:?} is kept with {reason}: {detail}");
                ensure!(!detail.is_empty(), "{payload:?} is kept without a detail");
                let origin: [String; 4] = [3, 4, 5, 6].map(|column| letter.get(column));
                ensure!(
                    origin == [fleet.namespace.as_str(), "readings", "plant-1", "devices/press-1/telemetry"],
                    "{payload:?} is of {origin:?}"
                );
            }
            ensure!(expected.is_empty(), "no dead letter: {expected:?}");
            Ok(())
        })
        .await?;
        // None of these messages stopped the worker.
        fleet.ready("Pipeline", "readings").await.map(drop)
    });
}

#[test]
fn an_unknown_or_foreign_device_writes_no_row() {
    run("stranger", async |fleet| -> Result<()> {
        let database = fleet.database().await?;
        let acls = json!([{"topic": "plants/#", "access": "Write"}]);
        fleet.apply_all([gateway("plant-1"), gateway("plant-2"), device("press-2", "plant-2")]).await?;
        fleet.apply(with(device("press-1", "plant-1"), "/spec/authorization", json!({"acls": acls}))).await?;
        fleet.apply(with(pipeline("readings"), "/spec/source/topic", "plants/{device}".into())).await?;
        fleet.all_ready(&["Gateway/plant-1", "Gateway/plant-2", "Device/press-1", "Device/press-2", "Pipeline/readings"]).await?;
        let listener = Listener::plain(fleet.address("plant-1").await?);
        let mut session = Session::connect(&listener, "press-1", &fleet.password("press-1").await?).await?;
        // The ACL allows this device to publish for other names. The registry rejects them.
        for (topic, value) in [("plants/nobody", 1), ("plants/press-2", 2), ("plants/press-1", 3)] {
            session.publish(topic, &format!(r#"{{"ts": 1790000000001, "value": {value}}}"#)).await?;
        }
        database.reaches(seconds(20), "SELECT count(*) FROM reading", 1).await?;
        for (topic, reason) in [("plants/nobody", "UnknownDevice"), ("plants/press-2", "WrongGateway")] {
            let sql = format!("SELECT count(*) FROM fleetwright.dead_letter WHERE topic = '{topic}' AND reason = '{reason}'");
            database.reaches(seconds(20), &sql, 1).await?;
        }
        ensure!(database.number("SELECT value::bigint FROM reading").await? == 3, "the row is another device's");
        Ok(())
    });
}

#[test]
fn a_corrected_pipeline_replays_its_dead_letters() {
    run("replay", async |fleet| {
        let database = fleet.database().await?;
        let field = |most: i32| json!([{"name": "value", "type": "Float64", "required": true, "max": most}]);
        let wanted = with(pipeline("readings"), "/spec/decode/fields", field(1));
        fleet.apply_all([gateway("plant-1"), device("press-1", "plant-1"), wanted.clone()]).await?;
        fleet.all_ready(&["Gateway/plant-1", "Device/press-1", "Pipeline/readings"]).await?;
        let listener = Listener::plain(fleet.address("plant-1").await?);
        let mut session = Session::connect(&listener, "press-1", &fleet.password("press-1").await?).await?;
        for value in 1..=5 {
            session
                .publish("devices/press-1/telemetry", &format!(r#"{{"ts": {}, "value": {value}}}"#, 1_790_000_000_000_i64 + value))
                .await?;
        }
        database.reaches(seconds(20), "SELECT count(*) FROM fleetwright.dead_letter WHERE reason = 'OutOfRange'", 4).await?;
        until(seconds(20), "the status tells of them", async || {
            let refused = fleet.api("Pipeline").get("readings").await?.data.pointer("/status/deadLetters/lastDay").cloned();
            ensure!(refused == Some(4.into()), "found {refused:?}");
            Ok(())
        })
        .await?;

        // One change corrects the decoder and requests the replay, so the replay uses the new decoder.
        let replay = json!({"token": "2026-11-24", "reasons": ["OutOfRange"]});
        let fixed = with(with(wanted, "/spec/decode/fields", field(4)), "/spec/replay", replay);
        fleet.apply(fixed.clone()).await?;
        let done = fleet.condition("Pipeline", "readings", "Replayed", "True", "Replayed").await?;
        ensure!(done.message.contains("3 messages became rows, 1 were refused again"), "{}", done.message);
        ensure!(database.number("SELECT count(*) FROM reading").await? == 4, "three more rows");
        ensure!(database.number("SELECT count(*) FROM fleetwright.dead_letter").await? == 1, "one is refused again");
        let status = fleet.api("Pipeline").get("readings").await?.data["status"]["replay"].clone();
        let expected = json!({"token": "2026-11-24", "state": "Finished", "stored": 3, "refused": 1, "leftAlone": 0, "remaining": 0});
        ensure!(status == expected, "{status}");

        // The stored dead letters are limited by age and by size.
        let older = "INSERT INTO fleetwright.dead_letter (time, namespace, pipeline, gateway, topic, payload, reason, detail)
             SELECT time - interval '2 hours', namespace, pipeline, gateway, topic, payload, reason, detail FROM fleetwright.dead_letter";
        database.execute(older).await?;
        let bounded = with(fixed, "/spec/deadLetters", json!({"retention": "1h", "maxBytesPerHour": 0}));
        fleet.apply(bounded).await?;
        database.reaches(seconds(30), "SELECT count(*) FROM fleetwright.dead_letter", 1).await?;
        fleet.ready("Pipeline", "readings").await?;
        session.publish("devices/press-1/telemetry", "{").await?;
        fleet.condition("Pipeline", "readings", "DeadLettersDiscarded", "True", "TooManyRefused").await?;
        ensure!(database.number("SELECT sum(discarded)::bigint FROM fleetwright.dead_letter_count").await? == 1, "one is counted");
        ensure!(database.number("SELECT count(*) FROM fleetwright.dead_letter").await? == 1, "none is kept of it");
        Ok(())
    });
}
