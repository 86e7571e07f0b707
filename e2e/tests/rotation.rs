//! Password rotation with a period in which both passwords are accepted.

use std::time::Instant;

use anyhow::{Result, ensure};
use fleetwright_e2e::client::{Listener, Session, mosquitto_pub};
use fleetwright_e2e::cluster::SYSTEM_NAMESPACE;
use fleetwright_e2e::manifest::{device, gateway, with};
use fleetwright_e2e::wait::{seconds, until};
use fleetwright_e2e::{Fleet, fault, run_alone};
use serde_json::json;

/// Period in which both passwords are accepted: longer than a restart of the operator takes on a busy machine.
const OVERLAP: u64 = 60;

/// Reason codes from this value on are failures (MQTT 5, section 2.4).
const REFUSAL: i32 = 128;

#[test]
fn both_passwords_are_accepted_until_the_rotation_period_ends() {
    run_alone("rotation", async |fleet| {
        let rotation = json!({"password": {"rotation": {"overlap": format!("{OVERLAP}s")}}});
        fleet.apply_all([gateway("plant-1"), device("press-2", "plant-1")]).await?;
        fleet.apply(with(device("press-1", "plant-1"), "/spec/authentication", rotation)).await?;
        fleet.all_ready(&["Gateway/plant-1", "Device/press-1", "Device/press-2"]).await?;
        let listener = Listener::plain(fleet.address("plant-1").await?);
        let old = fleet.password("press-1").await?;
        let mut early = Session::connect(&listener, "press-1", &old).await?;
        let mut bystander = Session::connect(&listener, "press-2", &fleet.password("press-2").await?).await?;

        let called = Instant::now();
        ask(&fleet, "1").await?;
        let new = another_password(&fleet, &old).await?;
        until(seconds(20), "the new password is accepted", async || publish(&listener, &new).await).await?;
        println!("a new password was accepted {} ms after the request", called.elapsed().as_millis());
        publish(&listener, &old).await?;
        // The second client needs another identifier; otherwise it would end this session.
        ensure!(early.publish("devices/press-1/telemetry", "{}").await.is_err(), "two clients share one session");
        let mut early = Session::connect(&listener, "press-1", &old).await?;

        // After a restart the operator still knows the completed request and the previous password.
        fault::delete_pod_and_wait(&fleet.client, SYSTEM_NAMESPACE, "fleetwright").await?;
        fleet.apply(device("press-3", "plant-1")).await?;
        fleet.ready("Device", "press-3").await?;
        ensure!(fleet.password("press-1").await? == new, "the password was replaced again");
        ensure!(early.publish("devices/press-1/telemetry", "{}").await? < REFUSAL, "the old password's session has ended");
        ensure!(called.elapsed() < seconds(OVERLAP), "the restart took so long that nothing was tested");

        early.ended(seconds(OVERLAP + 30)).await?;
        let after = called.elapsed();
        ensure!(after >= seconds(OVERLAP - 1), "the old password's session ended after {after:?}");
        println!("the session of the old password ended {:.1} s after the request", after.as_secs_f64());
        ensure!(publish(&listener, &old).await.is_err(), "the old password is still accepted");
        publish(&listener, &new).await?;
        fleet.ready("Device", "press-1").await?;

        // A new token is a new request.
        ask(&fleet, "2").await?;
        let newest = another_password(&fleet, &new).await?;
        until(seconds(20), "the newest password is accepted", async || publish(&listener, &newest).await).await?;
        publish(&listener, &new).await?;
        ensure!(bystander.publish("devices/press-2/telemetry", "{}").await? < REFUSAL, "a device beside it was harmed");
        Ok(())
    });
}

async fn ask(fleet: &Fleet, token: &str) -> Result<()> {
    let change = json!({"metadata": {"annotations": {"fleetwright.io/rotate-password": token}}});
    fleet.change("Device", "press-1", change).await.map(drop)
}

async fn another_password(fleet: &Fleet, before: &str) -> Result<String> {
    until(seconds(20), "there is another password", async || {
        let password = fleet.password("press-1").await?;
        ensure!(password != before, "it is the same");
        Ok(password)
    })
    .await
}

async fn publish(listener: &Listener, password: &str) -> Result<()> {
    mosquitto_pub(listener, "press-1", password, "devices/press-1/telemetry", "{}").await
}
