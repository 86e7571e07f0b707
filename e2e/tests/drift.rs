//! The operator reverts changes by others.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use fleetwright_e2e::manifest::{device, gateway, pipeline};
use fleetwright_e2e::wait::{seconds, until};
use fleetwright_e2e::{Fleet, run};
use serde_json::json;

/// Maximum time until a change is reverted. The test prints the measured time.
const BACK_WITHIN: Duration = seconds(20);

#[test]
fn edited_deleted_and_dropped_objects_are_restored_within_seconds() {
    run("drift", async |fleet| {
        let database = fleet.database().await?;
        fleet.apply_all([gateway("plant-1"), device("press-1", "plant-1"), pipeline("readings")]).await?;
        fleet.all_ready(&["Gateway/plant-1", "Device/press-1", "Pipeline/readings"]).await?;

        for name in ["plant-1-broker", "readings-ingest"] {
            edited(&fleet, name).await?;
            deleted(&fleet, "StatefulSet", name).await?;
            deleted(&fleet, "ConfigMap", name).await?;
        }
        deleted(&fleet, "Service", "plant-1").await?;
        deleted(&fleet, "Secret", "plant-1-auth-0").await?;

        let called = Instant::now();
        database.execute("DROP TABLE reading").await?;
        until(BACK_WITHIN, "the table is back", async || {
            ensure!(database.has_table("reading").await?, "it is not there");
            Ok(())
        })
        .await?;
        println!("a dropped table was back after {} ms", called.elapsed().as_millis());
        fleet.all_ready(&["Gateway/plant-1", "Device/press-1", "Pipeline/readings"]).await
    });
}

/// Edits the ConfigMap, and waits until its content is restored.
async fn edited(fleet: &Fleet, name: &str) -> Result<()> {
    let before = fleet.api("ConfigMap").get(name).await?.data["data"].clone();
    let file = before.as_object().and_then(|data| data.keys().next()).context("the ConfigMap is empty")?.clone();
    let called = Instant::now();
    fleet.change("ConfigMap", name, json!({"data": {file: "edited by somebody"}})).await?;
    until(BACK_WITHIN, format!("the ConfigMap {name} is as it was"), async || {
        let now = fleet.api("ConfigMap").get(name).await?.data["data"].clone();
        ensure!(now == before, "it is {now}");
        Ok(())
    })
    .await?;
    println!("the edited ConfigMap {name} was back after {} ms", called.elapsed().as_millis());
    Ok(())
}

/// Deletes the object, and waits until it exists again.
async fn deleted(fleet: &Fleet, kind: &str, name: &str) -> Result<()> {
    let before = fleet.api(kind).get(name).await?.metadata.uid;
    let called = Instant::now();
    fleet.delete(kind, name).await?;
    until(BACK_WITHIN, format!("{kind} {name} is back"), async || {
        ensure!(fleet.api(kind).get(name).await?.metadata.uid != before, "it is the old one");
        Ok(())
    })
    .await?;
    println!("the deleted {kind} {name} was back after {} ms", called.elapsed().as_millis());
    Ok(())
}
