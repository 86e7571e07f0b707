//! The status of Devices and Gateways shows which devices are connected, also after a restart of the operator.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use fleetwright_e2e::audit::Mark;
use fleetwright_e2e::client::{Listener, Session, mosquitto_pub};
use fleetwright_e2e::cluster::SYSTEM_NAMESPACE;
use fleetwright_e2e::manifest::{device, gateway};
use fleetwright_e2e::wait::{seconds, until};
use fleetwright_e2e::{Fleet, fault, run_alone};
use kube::api::{Patch, PatchParams};
use serde_json::{Value, json};

/// Maximum time until the status shows a change. It takes some tenths of a second on an idle machine.
const SHOWS_WITHIN: Duration = seconds(10);

/// Time after a restart of the operator in which writes are counted.
const COUNTED: Duration = seconds(35);

#[test]
fn presence_is_in_the_status_and_an_operator_restart_writes_nothing() {
    run_alone("presence", async |fleet| {
        fleet
            .apply_all([gateway("plant-1"), device("press-1", "plant-1"), device("press-2", "plant-1"), device("press-3", "plant-1")])
            .await?;
        fleet.all_ready(&["Gateway/plant-1", "Device/press-1", "Device/press-2", "Device/press-3"]).await?;
        let listener = Listener::plain(fleet.address("plant-1").await?);
        let started = Instant::now();
        let stays = Session::connect(&listener, "press-1", &fleet.password("press-1").await?).await?;
        let dies = Session::connect(&listener, "press-2", &fleet.password("press-2").await?).await?;
        connected(&fleet, "press-1", "Online").await?;
        connected(&fleet, "press-2", "Online").await?;
        println!("two devices connected one after the other, and both shown, after {:.1} s", started.elapsed().as_secs_f64());
        total(&fleet, "plant-1", 2).await?;
        // The client process is killed.
        let killed = Instant::now();
        drop(dies);
        connected(&fleet, "press-2", "Offline").await?;
        println!("a device that was killed is shown after {:.1} s", killed.elapsed().as_secs_f64());
        let never = fleet.api("Device").get("press-3").await?;
        ensure!(never.data.pointer("/status/connection").is_none(), "a device that was never connected has a connection");

        // An unknown client, and a client that uses the name of a connected device.
        for name in ["ghost", "press-1"] {
            ensure!(mosquitto_pub(&listener, name, "wrong", "x", "1").await.is_err(), "{name} was accepted");
        }
        until(seconds(60), "the refused show", async || {
            let names = refused(&fleet).await?;
            ensure!(names.contains(&"ghost".to_owned()) && names.contains(&"press-1".to_owned()), "refused: {names:?}");
            Ok(())
        })
        .await?;
        total(&fleet, "plant-1", 1).await?;
        connected(&fleet, "press-1", "Online").await?;

        // The operator reverts changes of these fields by others.
        let empty = Patch::Merge(json!({"status": {"connection": null}}));
        fleet.api("Device").patch_status("press-1", &PatchParams::default(), &empty).await?;
        connected(&fleet, "press-1", "Online").await?;

        let mark = Mark::now()?;
        fault::delete_pod_and_wait(&fleet.client, SYSTEM_NAMESPACE, "fleetwright").await?;
        tokio::time::sleep(COUNTED).await;
        let writes = mark.writes(&fleet.namespace)?;
        ensure!(writes.is_empty(), "a restart of the operator caused {} writes:\n{}", writes.len(), writes.join("\n"));
        // The operator reconciles again.
        drop(stays);
        connected(&fleet, "press-1", "Offline").await
    });
}

/// Waits until the Device's status has this state.
pub async fn connected(fleet: &Fleet, device: &str, state: &str) -> Result<()> {
    until(SHOWS_WITHIN, format!("{device} is {state}"), async || {
        let object = fleet.api("Device").get(device).await?;
        let connection = object.data.pointer("/status/connection").cloned().unwrap_or_default();
        ensure!(connection["state"] == state && connection["since"].is_string(), "its connection is {connection}");
        Ok(())
    })
    .await
}

/// Waits until the Gateway's status has this number of connected devices.
pub async fn total(fleet: &Fleet, gateway: &str, devices: i64) -> Result<()> {
    until(seconds(30), format!("{devices} devices of {gateway} are connected"), async || {
        let object = fleet.api("Gateway").get(gateway).await?;
        let found = object.data.pointer("/status/devices/connected").and_then(Value::as_i64);
        ensure!(found == Some(devices), "it says {found:?}");
        Ok(())
    })
    .await
}

/// The names of the clients that the Gateway's broker refused.
async fn refused(fleet: &Fleet) -> Result<Vec<String>> {
    let object = fleet.api("Gateway").get("plant-1").await?;
    let clients = object.data.pointer("/status/clients/recentlyRefused").and_then(Value::as_array).context("nobody was refused")?;
    Ok(clients.iter().filter_map(|client| client["name"].as_str().map(str::to_owned)).collect())
}
