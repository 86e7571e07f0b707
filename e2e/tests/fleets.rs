//! Many Devices, as users and tools work with them.

use std::time::Instant;

use anyhow::{Result, ensure};
use fleetwright_e2e::client::{Listener, Session};
use fleetwright_e2e::cluster::output;
use fleetwright_e2e::manifest::{device, gateway, secret, with};
use fleetwright_e2e::wait::{seconds, until};
use fleetwright_e2e::{Fleet, run};
use kube::ResourceExt;
use kube::api::ListParams;
use serde_json::{Value, json};
use tokio::process::Command;

use crate::refusal::{REFUSAL, ensure_refused};

/// Number of Devices: enough for several pages of a list.
const DEVICES: usize = 200;

#[test]
fn devices_are_selected_and_awaited_despite_one_that_is_refused() {
    run("fleets", async |fleet| {
        fleet.apply_all([gateway("plant-1"), gateway("plant-2")]).await?;
        fleet.all_ready(&["Gateway/plant-1", "Gateway/plant-2"]).await?;
        let reference = json!({"password": {"secretRef": {"name": "nowhere"}}});
        let called = Instant::now();
        fleet.apply(with(device("refused", "plant-1"), "/spec/authentication", reference)).await?;
        fleet.apply_all((0..DEVICES).map(|number| of_line(&format!("press-{number}"), &plant(number), number % 4))).await?;
        for line in ["0", "1", "2", "3"] {
            kubectl(&fleet, &["wait", "--for=condition=Ready", "fwd", "-l", &format!("line={line}"), "--timeout=60s"]).await?;
        }
        println!("{DEVICES} Devices were Ready after {:.1} s, beside one that is refused", called.elapsed().as_secs_f64());
        fleet.condition("Device", "refused", "Accepted", "False", "SecretNotFound").await?;
        ensure!(count(&fleet, &ListParams::default().labels("line=3")).await? == DEVICES / 4, "another number has the label");
        ensure!(
            count(&fleet, &ListParams::default().fields("spec.gatewayRef.name=plant-2")).await? == DEVICES / 2,
            "another number is at plant-2"
        );
        ensure!(
            kubectl(&fleet, &["get", "fwd", "-l", "line=3", "--field-selector", "spec.gatewayRef.name=plant-2", "-o", "name"])
                .await?
                .lines()
                .count()
                == DEVICES / 4
        );

        fleet.apply(secret("nowhere", &json!({"password": "usable"}))).await?;
        kubectl(&fleet, &["wait", "--for=condition=Ready", "fwd", "--all", "--timeout=60s"]).await.map(drop)
    });
}

/// Devices with even numbers belong to plant-1, those with odd numbers to plant-2.
fn plant(number: usize) -> String {
    format!("plant-{}", number % 2 + 1)
}

fn of_line(name: &str, gateway: &str, line: usize) -> Value {
    with(device(name, gateway), "/metadata/labels", json!({"line": line.to_string()}))
}

async fn count(fleet: &Fleet, selection: &ListParams) -> Result<usize> {
    Ok(fleet.api("Device").list(selection).await?.items.len())
}

async fn kubectl(fleet: &Fleet, arguments: &[&str]) -> Result<String> {
    output(Command::new("kubectl").args(["-n", &fleet.namespace]).args(arguments)).await
}

#[test]
fn a_device_moves_to_another_gateway_when_it_is_created_again() {
    run("moved", async |fleet| {
        fleet.apply_all([gateway("plant-1"), gateway("plant-2"), device("press-1", "plant-1"), device("press-2", "plant-1")]).await?;
        fleet.all_ready(&["Gateway/plant-1", "Gateway/plant-2", "Device/press-1", "Device/press-2"]).await?;
        let first = Listener::plain(fleet.address("plant-1").await?);
        let second = Listener::plain(fleet.address("plant-2").await?);
        let mut bystander = Session::connect(&first, "press-2", &fleet.password("press-2").await?).await?;

        let old = fleet.password("press-1").await?;
        let mut session = Session::connect(&first, "press-1", &old).await?;
        fleet.delete("Device", "press-1").await?;
        fleet.apply(device("press-1", "plant-2")).await?;
        session.ended(seconds(10)).await?;
        moved(&fleet, &second, &first, &old).await?;

        // Moves it back while a finalizer of another controller holds the old object. The new one is created when the finalizer is removed.
        let old = fleet.password("press-1").await?;
        fleet.change("Device", "press-1", json!({"metadata": {"finalizers": ["example.org/hold"]}})).await?;
        let mut session = Session::connect(&second, "press-1", &old).await?;
        fleet.delete("Device", "press-1").await?;
        session.ended(seconds(10)).await?;
        ensure_refused(&second, "press-1", &old).await?;
        let uid = fleet.api("Device").get("press-1").await?.uid();
        fleet.change("Device", "press-1", json!({"metadata": {"finalizers": null}})).await?;
        until(seconds(20), "the Device is created again", async || fleet.apply(device("press-1", "plant-1")).await).await?;
        ensure!(fleet.api("Device").get("press-1").await?.uid() != uid, "it is the Device before");
        moved(&fleet, &first, &second, &old).await?;
        ensure!(bystander.publish("devices/press-2/telemetry", "{}").await? < REFUSAL, "a device beside it was harmed");
        Ok(())
    });
}

/// The device can connect to its new broker with its new password, and no longer to the old broker.
async fn moved(fleet: &Fleet, now: &Listener, before: &Listener, old: &str) -> Result<()> {
    fleet.ready("Device", "press-1").await?;
    let password = fleet.password("press-1").await?;
    ensure!(password != old, "the password is that of the Device before");
    let mut session = Session::connect(now, "press-1", &password).await?;
    ensure!(session.publish("devices/press-1/telemetry", "{}").await? < REFUSAL, "the device may not publish");
    ensure_refused(before, "press-1", old).await?;
    ensure_refused(before, "press-1", &password).await
}

#[test]
fn the_secret_of_a_device_contains_everything_to_connect() {
    run("provision", async |fleet| {
        let listeners = |port: i32| json!([{"name": "mqtt", "port": 1883}, {"name": "mqtts", "port": port, "tls": {}}]);
        // The Device is created first. Its Secret is created with the Gateway and is complete.
        fleet.apply(device("press-1", "plant-1")).await?;
        fleet.condition("Device", "press-1", "Accepted", "False", "GatewayNotFound").await?;
        fleet.apply(with(gateway("plant-1"), "/spec/listeners", listeners(8883))).await?;
        fleet.all_ready(&["Gateway/plant-1", "Device/press-1"]).await?;
        let password = fleet.password("press-1").await?;
        provisioned(&fleet, 8883).await?;

        fleet.change("Gateway", "plant-1", json!({"spec": {"listeners": listeners(8884)}})).await?;
        until(seconds(60), "the Secret follows", async || provisioned(&fleet, 8884).await).await?;
        ensure!(fleet.password("press-1").await? == password, "the password is another one");
        Ok(())
    });
}

/// Connects with the content of the Secret only.
async fn provisioned(fleet: &Fleet, port: u16) -> Result<()> {
    let said = async |key: &str| fleet.secret("press-1-credentials", key).await;
    let folder = tempfile::tempdir()?;
    let authority = folder.path().join("ca.crt");
    std::fs::write(&authority, said("ca.crt").await?)?;
    let listener =
        Listener { host: said("gateway").await?, port: said("port").await?.parse()?, authority: Some(authority), identity: None };
    ensure!(listener.port == port, "the port is {}", listener.port);
    let uri = said("uri").await?;
    ensure!(uri == format!("mqtts://{}:{port}", listener.host), "the URI is {uri}");
    let mut session = Session::connect(&listener, &said("username").await?, &said("password").await?).await?;
    ensure!(session.publish("devices/press-1/telemetry", "{}").await? < REFUSAL, "the device may not publish");
    Ok(())
}
