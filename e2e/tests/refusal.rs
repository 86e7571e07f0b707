//! Authentication and authorization by the broker.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use fleetwright_e2e::client::{Listener, Session};
use fleetwright_e2e::manifest::{device, gateway, secret, with};
use fleetwright_e2e::wait::{seconds, until};
use fleetwright_e2e::{Fleet, run};
use serde_json::json;

/// Reason codes from this value on are failures (MQTT 5, section 2.4).
pub const REFUSAL: i32 = 128;

/// Maximum lifetime of a revoked session. The test prints the measured time.
const ENDS_WITHIN: Duration = seconds(10);

#[test]
fn wrong_passwords_unknown_devices_and_foreign_topics_are_refused() {
    run("intruder", async |fleet| {
        fleet.apply_all([gateway("plant-1"), device("press-1", "plant-1"), device("press-2", "plant-1")]).await?;
        fleet.all_ready(&["Gateway/plant-1", "Device/press-1", "Device/press-2"]).await?;
        let listener = Listener::plain(fleet.address("plant-1").await?);
        let (first, second) = (fleet.password("press-1").await?, fleet.password("press-2").await?);
        for (username, password) in [("press-1", second.as_str()), ("press-1", ""), ("press-9", &first), ("", ""), ("_agent", &first)] {
            ensure_refused(&listener, username, password).await?;
        }
        let mut own = Session::connect(&listener, "press-1", &first).await?;
        let mut others = Session::connect(&listener, "press-2", &second).await?;
        for topic in ["devices/press-1/telemetry", "devices/press-2/desired", "devices/press-20/telemetry", "elsewhere"] {
            let code = others.publish(topic, "{}").await?;
            ensure!(code >= REFUSAL, "press-2 may publish to {topic}: the reason code is {code}");
        }
        // The broker may accept the subscription, but it delivers only messages of the device's own topics.
        for filter in ["#", "devices/#", "devices/+/telemetry", "devices/press-2/telemetry", "devices/press-1/#"] {
            own.subscribe(filter).await?;
        }
        let (foreign, mine) = ("devices/press-2/telemetry", "devices/press-1/telemetry");
        ensure!(others.publish(foreign, "foreign").await? < REFUSAL, "press-2 may not publish to its own topic");
        ensure!(own.publish(mine, "mine").await? < REFUSAL, "press-1 may not publish to its own topic");
        let message = own.message(seconds(10)).await?;
        ensure!(message == format!("{mine} mine"), "press-1 received {message}");
        Ok(())
    });
}

pub async fn ensure_refused(listener: &Listener, username: &str, password: &str) -> Result<()> {
    let answer = Session::try_connect(listener, username, password).await?;
    let code = answer.err().unwrap_or_default();
    ensure!(code >= REFUSAL, "{username:?} was let in");
    Ok(())
}

#[test]
fn a_disabled_or_deleted_device_loses_its_session() {
    run("revoked", async |fleet| {
        fleet.apply(gateway("plant-1")).await?;
        fleet.apply_all(["press-1", "press-2", "press-3"].map(|name| device(name, "plant-1"))).await?;
        fleet.all_ready(&["Gateway/plant-1", "Device/press-1", "Device/press-2", "Device/press-3"]).await?;
        let listener = Listener::plain(fleet.address("plant-1").await?);
        let mut bystander = connect(&fleet, &listener, "press-3").await?;
        let password = fleet.password("press-1").await?;

        let mut session = connect(&fleet, &listener, "press-1").await?;
        let called = Instant::now();
        fleet.change("Device", "press-1", json!({"spec": {"enabled": false}})).await?;
        session.ended(ENDS_WITHIN).await?;
        println!("a disabled device's session ended {} ms after the call to the API server", called.elapsed().as_millis());
        fleet.ready("Device", "press-1").await?;
        ensure_refused(&listener, "press-1", &password).await?;

        fleet.change("Device", "press-1", json!({"spec": {"enabled": true}})).await?;
        fleet.ready("Device", "press-1").await?;
        Session::connect(&listener, "press-1", &password).await?;

        let password = fleet.password("press-2").await?;
        let mut session = connect(&fleet, &listener, "press-2").await?;
        let called = Instant::now();
        fleet.delete("Device", "press-2").await?;
        session.ended(ENDS_WITHIN).await?;
        println!("a deleted device's session ended {} ms after the call to the API server", called.elapsed().as_millis());
        fleet.gone("Device", "press-2", seconds(10)).await?;
        fleet.gone("Secret", "press-2-credentials", seconds(30)).await?;
        ensure_refused(&listener, "press-2", &password).await?;

        ensure!(bystander.publish("devices/press-3/telemetry", "{}").await? < REFUSAL, "a device beside them was harmed");
        Ok(())
    });
}

async fn connect(fleet: &Fleet, listener: &Listener, device: &str) -> Result<Session> {
    Session::connect(listener, device, &fleet.password(device).await?).await
}

#[test]
fn changes_of_a_user_password_and_of_acls_take_effect() {
    run("given", async |fleet| {
        let given = json!({"secretRef": {"name": "press-1-own", "key": "secret"}});
        fleet.apply_all([secret("press-1-own", &json!({"secret": "först"})), gateway("plant-1")]).await?;
        fleet.apply(with(device("press-1", "plant-1"), "/spec/authentication", json!({"password": given}))).await?;
        fleet.all_ready(&["Gateway/plant-1", "Device/press-1"]).await?;
        let listener = Listener::plain(fleet.address("plant-1").await?);
        let mut session = Session::connect(&listener, "press-1", "först").await?;
        ensure!(session.publish("lines/3", "{}").await? >= REFUSAL, "an ACL is not needed");

        fleet.apply(with(secret("press-1-own", &json!({"secret": "second"})), "/metadata/name", "press-1-own".into())).await?;
        until(seconds(20), "the new password is taken", async || Session::connect(&listener, "press-1", "second").await).await?;
        ensure_refused(&listener, "press-1", "först").await?;

        let acls = json!([{"topic": "lines/+", "access": "Write"}]);
        fleet.change("Device", "press-1", json!({"spec": {"authorization": {"acls": acls}}})).await?;
        fleet.ready("Device", "press-1").await?;
        let mut session = Session::connect(&listener, "press-1", "second").await?;
        ensure!(session.publish("lines/3", "{}").await? < REFUSAL, "Ready says that the ACL is live, and it is not");
        Ok(())
    });
}
