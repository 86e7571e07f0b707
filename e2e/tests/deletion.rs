//! Deletion of Pipelines, Gateways and namespaces.

use std::time::Instant;

use anyhow::{Result, ensure};
use fleetwright_e2e::client::{Listener, Session};
use fleetwright_e2e::database::Database;
use fleetwright_e2e::manifest::{device, gateway, pipeline, with};
use fleetwright_e2e::wait::{seconds, until};
use fleetwright_e2e::{Fleet, fault, run};
use serde_json::{Value, json};

fn with_policy(name: &str, policy: &str) -> Value {
    with(with(pipeline(name), "/spec/sink/timescale/table", name.into()), "/spec/deletionPolicy", policy.into())
}

#[test]
fn deletion_policy_retain_keeps_the_table_and_delete_drops_it() {
    run("deletion", async |fleet| {
        let database = fleet.database().await?;
        fleet.apply_all([gateway("plant-1"), device("press-1", "plant-1")]).await?;
        fleet.apply_all([with_policy("kept", "Retain"), with_policy("dropped", "Delete")]).await?;
        fleet.all_ready(&["Gateway/plant-1", "Device/press-1", "Pipeline/kept", "Pipeline/dropped"]).await?;
        let listener = Listener::plain(fleet.address("plant-1").await?);
        let mut session = Session::connect(&listener, "press-1", &fleet.password("press-1").await?).await?;
        session.publish("devices/press-1/telemetry", r#"{"ts": 1790000000001, "value": 1}"#).await?;
        session.publish("devices/press-1/telemetry", "{").await?;
        let letters = |pipeline: &str| format!("SELECT count(*) FROM fleetwright.dead_letter WHERE pipeline = '{pipeline}'");
        for table in ["kept", "dropped"] {
            database.reaches(seconds(20), &format!("SELECT count(*) FROM {table}"), 1).await?;
            database.reaches(seconds(20), &letters(table), 1).await?;
        }
        for name in ["kept", "dropped"] {
            fleet.delete("Pipeline", name).await?;
        }
        for name in ["kept", "dropped"] {
            fleet.gone("Pipeline", name, seconds(30)).await?;
            workers_gone(&fleet, name).await?;
        }
        ensure!(database.number("SELECT count(*) FROM kept").await? == 1, "the row of a Pipeline with Retain is gone");
        ensure!(!database.has_table("dropped").await?, "the table of a Pipeline with Delete is still there");
        ensure!(database.number(&letters("kept")).await? == 1, "the dead letter of a Pipeline with Retain is gone");
        ensure!(database.number(&letters("dropped")).await? == 0, "the dead letter of a Pipeline with Delete is still there");

        // A Pipeline that is created again continues to use its table.
        fleet.apply(with_policy("kept", "Retain")).await?;
        fleet.ready("Pipeline", "kept").await?;
        session.publish("devices/press-1/telemetry", r#"{"ts": 1790000000002, "value": 2}"#).await?;
        database.reaches(seconds(20), "SELECT count(*) FROM kept", 2).await
    });
}

async fn workers_gone(fleet: &Fleet, pipeline: &str) -> Result<()> {
    until(seconds(60), format!("the workers of {pipeline} are gone"), async || {
        let left = fault::pods(&fleet.client, &fleet.namespace, &format!("{pipeline}-ingest")).await?;
        ensure!(left.is_empty(), "{} are there", left.len());
        Ok(())
    })
    .await
}

#[test]
fn a_namespace_is_deleted_while_the_database_is_unavailable() {
    run("away", async |fleet| {
        // The database server is in the same namespace, and is deleted before the Pipeline.
        let database = Database::own(&fleet).await?;
        fleet.apply_all([gateway("plant-1"), device("press-1", "plant-1"), with_policy("dropped", "Delete")]).await?;
        fleet.all_ready(&["Gateway/plant-1", "Device/press-1", "Pipeline/dropped"]).await?;
        fleet.change("StatefulSet", "timescaledb", json!({"spec": {"replicas": 0}})).await?;
        until(seconds(60), "the database is away", async || {
            ensure!(database.connect().await.is_err(), "it still answers");
            Ok(())
        })
        .await?;
        let called = Instant::now();
        fleet.remove_namespace().await?;
        println!("a namespace whose database was away was gone after {:.1} s", called.elapsed().as_secs_f64());
        Ok(())
    });
}

#[test]
fn a_deleted_gateway_removes_its_objects_and_keeps_devices() {
    run("gateway", async |fleet| {
        fleet.apply_all([gateway("plant-1"), device("press-1", "plant-1")]).await?;
        fleet.all_ready(&["Gateway/plant-1", "Device/press-1"]).await?;
        fleet.delete("Gateway", "plant-1").await?;
        fleet.gone("Gateway", "plant-1", seconds(30)).await?;
        for (kind, name) in
            [("StatefulSet", "plant-1-broker"), ("Service", "plant-1"), ("Secret", "plant-1-auth-0"), ("ConfigMap", "plant-1-agent")]
        {
            fleet.gone(kind, name, seconds(60)).await?;
        }
        // The Devices wait with their passwords until the Gateway exists again.
        let password = fleet.password("press-1").await?;
        fleet.condition("Device", "press-1", "Reconciling", "True", "").await?;
        fleet.apply(gateway("plant-1")).await?;
        fleet.all_ready(&["Gateway/plant-1", "Device/press-1"]).await?;
        let listener = Listener::plain(fleet.address("plant-1").await?);
        Session::connect(&listener, "press-1", &password).await.map(drop)
    });
}
