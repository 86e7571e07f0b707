//! Desired and reported state of a Device, and their recovery after the broker lost its storage.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use fleetwright_e2e::client::{Listener, Session};
use fleetwright_e2e::manifest::{device, gateway, with};
use fleetwright_e2e::wait::seconds;
use fleetwright_e2e::{Fleet, fault, run};
use k8s_openapi::api::core::v1::PersistentVolumeClaim;
use kube::Api;
use kube::api::{DeleteParams, ListParams};
use serde_json::{Value, json};

/// Maximum time until a device receives a message.
const ARRIVES_WITHIN: Duration = seconds(30);

const DESIRED: &str = "devices/press-1/desired";
const REPORTED: &str = "devices/press-1/reported";

#[test]
fn desired_and_reported_state_survive_the_loss_of_broker_storage() {
    run("desired", async |fleet| {
        let press = with(device("press-1", "plant-1"), "/spec/desired", json!({"samplingSeconds": 5}));
        fleet.apply_all([gateway("plant-1"), press]).await?;
        fleet.all_ready(&["Gateway/plant-1", "Device/press-1"]).await?;
        fleet.condition("Device", "press-1", "Synced", "False", "AwaitingReport").await?;
        let generation = receive(&fleet, 5).await?;
        let mut session = connect(&fleet).await?;

        // The device reports first a failure to apply the desired state, then success.
        session.publish(REPORTED, "no JSON").await?;
        fleet.condition("Device", "press-1", "Synced", "False", "InvalidReport").await?;
        session.publish(REPORTED, &json!({"samplingSeconds": 9}).to_string()).await?;
        fleet.condition("Device", "press-1", "Synced", "False", "Diverged").await?;
        session.publish(REPORTED, &json!({"generation": generation, "reported": {"samplingSeconds": 5}}).to_string()).await?;
        fleet.condition("Device", "press-1", "Synced", "True", "Synced").await?;
        let object = fleet.api("Device").get("press-1").await?;
        let reported = object.data.pointer("/status/reported/state/samplingSeconds");
        ensure!(reported == Some(&json!(5)), "the status says: {}", object.data["status"]);
        drop(session);

        // A connected device receives a change.
        let mut session = connect(&fleet).await?;
        session.subscribe(DESIRED).await?;
        session.message(ARRIVES_WITHIN).await?;
        let changed = Instant::now();
        fleet.change("Device", "press-1", json!({"spec": {"desired": {"samplingSeconds": 6}}})).await?;
        let message = session.message(ARRIVES_WITHIN).await?;
        println!("a desired state arrives after {:.2} s", changed.elapsed().as_secs_f64());
        ensure!(message.contains(r#""samplingSeconds":6"#), "received {message}");
        fleet.condition("Device", "press-1", "Synced", "False", "AwaitingReport").await?;
        drop(session);

        wipe(&fleet).await?;
        receive(&fleet, 6).await.map(drop)
    });
}

async fn connect(fleet: &Fleet) -> Result<Session> {
    let listener = Listener::plain(fleet.address("plant-1").await?);
    let password = fleet.password("press-1").await?;
    Session::connect(&listener, "press-1", &password).await
}

/// Connects as the device, waits for the retained desired state, and returns its generation.
async fn receive(fleet: &Fleet, sampling: i64) -> Result<i64> {
    let mut session = connect(fleet).await?;
    session.subscribe(DESIRED).await?;
    let message = session.message(ARRIVES_WITHIN).await?;
    let (_, payload) = message.split_once(' ').with_context(|| format!("received {message}"))?;
    let desired: Value = serde_json::from_str(payload).with_context(|| format!("received {message}"))?;
    ensure!(desired["desired"] == json!({"samplingSeconds": sampling}), "received {message}");
    desired["generation"].as_i64().context("no generation")
}

/// Deletes the broker's pod and its volume, and waits until a new pod is ready.
async fn wipe(fleet: &Fleet) -> Result<()> {
    let claims = Api::<PersistentVolumeClaim>::namespaced(fleet.client.clone(), &fleet.namespace);
    for claim in claims.list(&ListParams::default()).await? {
        let name = claim.metadata.name.unwrap_or_default();
        if name.ends_with("plant-1-broker-0") {
            claims.delete(&name, &DeleteParams::default()).await?;
        }
    }
    fault::delete_pod_and_wait(&fleet.client, &fleet.namespace, "plant-1-broker").await?;
    fleet.ready("Gateway", "plant-1").await.map(drop)
}
