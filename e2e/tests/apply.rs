//! Resources applied in any order become Ready, and readings of MQTT clients become rows.

use anyhow::{Result, ensure};
use fleetwright_e2e::certificate::Authority;
use fleetwright_e2e::client::{Listener, Session, mosquitto_pub};
use fleetwright_e2e::manifest::{device, gateway, pipeline, with};
use fleetwright_e2e::wait::{seconds, until};
use fleetwright_e2e::{Fleet, run};
use serde_json::json;

#[test]
fn resources_applied_in_reverse_order_become_ready_and_store_readings() {
    run("apply", async |fleet| {
        let database = fleet.database_without_secret().await?;
        let authority = Authority::new()?;
        let host = format!("plant-1.{}.svc", fleet.namespace);
        let listeners = json!([{"name": "mqtt", "port": 1883}, {"name": "mqtts", "port": 8883, "tls": {"secretName": "plant-1-tls"}}]);
        fleet.apply(pipeline("readings")).await?;
        for name in ["press-1", "press-2", "press-3", "press-4"] {
            fleet.apply(device(name, "plant-1")).await?;
        }
        fleet.apply(with(gateway("plant-1"), "/spec/listeners", listeners)).await?;
        fleet.apply(authority.secret("plant-1-tls", &host)?).await?;
        fleet.apply(database.secret()).await?;
        fleet
            .all_ready(&["Gateway/plant-1", "Device/press-1", "Device/press-2", "Device/press-3", "Device/press-4", "Pipeline/readings"])
            .await?;
        ensure!(fleet.address("plant-1").await? == host, "the address is another one");

        let (plain, tls) = (Listener::plain(&host), Listener::tls(&host, &authority.file()));
        publish(&fleet, &plain, "press-1", "mosquitto_pub").await?;
        publish(&fleet, &tls, "press-2", "mosquitto_pub").await?;
        publish(&fleet, &plain, "press-3", "Paho").await?;
        publish(&fleet, &tls, "press-4", "Paho").await?;
        let expected = [("press-1", 1.5), ("press-2", 2.5), ("press-3", 3.5), ("press-4", 4.5)];
        let sql = "SELECT name, (extract(epoch FROM time) * 1000)::bigint, value, gateway
                   FROM reading JOIN fleetwright.device ON id = device_id ORDER BY name";
        until(seconds(20), "the four readings are rows", async || {
            let rows = database.rows(sql, &[]).await?;
            let found: Vec<(String, i64, f64, String)> = rows.iter().map(|r| (r.get(0), r.get(1), r.get(2), r.get(3))).collect();
            let wanted: Vec<_> =
                expected.iter().map(|(name, value)| ((*name).to_owned(), 1_790_000_000_123, *value, "plant-1".to_owned())).collect();
            ensure!(found == wanted, "found {found:?}");
            Ok(())
        })
        .await
    });
}

/// Publishes a reading of `press-<n>`: the value n.5, with the same time for all.
async fn publish(fleet: &Fleet, listener: &Listener, device: &str, client: &str) -> Result<()> {
    let number = device.trim_start_matches("press-");
    let (topic, payload) = (format!("devices/{device}/telemetry"), format!(r#"{{"ts": 1790000000123, "value": {number}.5}}"#));
    let password = fleet.password(device).await?;
    if client == "mosquitto_pub" {
        return mosquitto_pub(listener, device, &password, &topic, &payload).await;
    }
    let code = Session::connect(listener, device, &password).await?.publish(&topic, &payload).await?;
    ensure!(code == 0, "the broker refused the reading with reason code {code}");
    Ok(())
}

#[test]
fn payloads_and_topics_become_columns() {
    run("shapes", async |fleet| {
        let database = fleet.database().await?;
        let acl = json!([{"topic": "plants/+/line/+/press-1", "access": "Write"}]);
        fleet.apply(gateway("plant-1")).await?;
        fleet.apply(with(device("press-1", "plant-1"), "/spec/authorization", json!({"acls": acl}))).await?;
        fleet.apply_all([captured("captured"), of_arrival("arrival")]).await?;
        fleet.all_ready(&["Gateway/plant-1", "Device/press-1", "Pipeline/captured", "Pipeline/arrival"]).await?;

        let listener = Listener::plain(fleet.address("plant-1").await?);
        let mut session = Session::connect(&listener, "press-1", &fleet.password("press-1").await?).await?;
        let array = json!([
            {"at": "2026-05-04T03:02:01.5Z", "motor": {"rpm": 12, "on": true}, "name": "grün", "other": [1, {"x": null}]},
            {"at": "2026-05-04T05:02:02.5+02:00", "motor": {"rpm": -9_223_372_036_854_775_808_i64}, "name": ""},
        ]);
        session.publish("plants/1/line/a b/press-1", &array.to_string()).await?;
        session.publish("devices/press-1/telemetry", r#"{"value": 3}"#).await?;

        database.reaches(seconds(20), "SELECT count(*) FROM captured", 2).await?;
        let rows = database.rows("SELECT plant, line, rpm, motor_on, name_, temperature FROM captured ORDER BY time", &[]).await?;
        let found: Vec<Captured> = rows.iter().map(|r| (r.get(0), r.get(1), r.get(2), r.get(3), r.get(4), r.get(5))).collect();
        let row = |rpm, on, name: &str| ("1".to_owned(), "a b".to_owned(), rpm, on, name.to_owned(), None);
        ensure!(found == [row(12, Some(true), "grün"), row(i64::MIN, None, "")], "found {found:?}");
        let sql = "SELECT count(*) FROM captured WHERE time IN ('2026-05-04T03:02:01.5Z', '2026-05-04T03:02:02.5Z')";
        ensure!(database.number(sql).await? == 2, "the times are others");
        let sql = "SELECT count(*) FROM arrival WHERE value = 3 AND time BETWEEN now() - interval '1 minute' AND now()";
        database.reaches(seconds(20), sql, 1).await
    });
}

/// plant, line, rpm, motor_on, name_, temperature
type Captured = (String, String, i64, Option<bool>, String, Option<f64>);

/// A Pipeline with captures, all field types, JSON pointers, and a time in text.
fn captured(name: &str) -> serde_json::Value {
    let decode = json!({
        "time": {"pointer": "/at", "unit": "Rfc3339", "maxAge": "9999d"},
        "fields": [
            {"name": "rpm", "type": "Int64", "pointer": "/motor/rpm", "required": true},
            {"name": "motor_on", "type": "Boolean", "pointer": "/motor/on"},
            {"name": "name_", "type": "Text", "pointer": "/name"},
            {"name": "temperature", "type": "Float64", "unit": "Cel"},
        ],
    });
    let object = with(pipeline(name), "/spec/source/topic", "plants/{plant}/line/{line}/{device}".into());
    with(with(object, "/spec/decode", decode), "/spec/sink/timescale/table", name.into())
}

/// A Pipeline that uses the time of arrival, and integers in a Float64 field.
fn of_arrival(name: &str) -> serde_json::Value {
    let object = with(pipeline(name), "/spec/decode", json!({"fields": [{"name": "value", "type": "Float64"}]}));
    with(object, "/spec/sink/timescale/table", name.into())
}
