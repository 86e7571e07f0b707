//! An unchanged fleet and a restart of the operator cause no writes in the API server's audit log.

use std::time::Duration;

use anyhow::{Result, ensure};
use fleetwright_e2e::audit::Mark;
use fleetwright_e2e::client::{Listener, Session};
use fleetwright_e2e::cluster::SYSTEM_NAMESPACE;
use fleetwright_e2e::manifest::{device, gateway, pipeline, secret};
use fleetwright_e2e::wait::{seconds, until};
use fleetwright_e2e::{Fleet, fault, run_alone};
use serde_json::json;

use crate::presence::{connected, total};

/// Time without writes after which a fleet counts as steady.
const QUIET: Duration = seconds(5);

/// Time in which writes are counted: longer than the longest requeue interval of the operator.
const COUNTED: Duration = seconds(35);

#[test]
fn an_unchanged_fleet_and_an_operator_restart_cause_no_writes() {
    run_alone("steady", async |fleet| {
        fleet.database().await?;
        fleet.apply_all([gateway("plant-1"), gateway("plant-2"), pipeline("readings")]).await?;
        let devices: Vec<String> = (1..=10).map(|number| format!("press-{number}")).collect();
        fleet.apply_all(devices.iter().map(|name| device(name, if name.len() > 7 { "plant-2" } else { "plant-1" }))).await?;
        // Objects that wait or have failed cause no writes either.
        fleet.apply(device("waiting", "plant-9")).await?;
        fleet.all_ready(&["Gateway/plant-1", "Gateway/plant-2", "Pipeline/readings"]).await?;
        for name in &devices {
            fleet.ready("Device", name).await?;
        }
        steady(&fleet).await?;

        // The audit log does contain writes: one changed password causes one write.
        let mark = Mark::now()?;
        fleet.delete("Secret", "press-1-credentials").await?;
        until(seconds(20), "a write is counted", async || {
            ensure!(!mark.writes(&fleet.namespace)?.is_empty(), "none is in the audit log");
            Ok(())
        })
        .await?;
        fleet.ready("Device", "press-1").await?;
        steady(&fleet).await?;

        // Readings cause no writes to the API server.
        let listener = Listener::plain(fleet.address("plant-1").await?);
        let mut session = Session::connect(&listener, "press-1", &fleet.password("press-1").await?).await?;
        connected(&fleet, "press-1", "Online").await?;
        total(&fleet, "plant-1", 1).await?;
        steady(&fleet).await?;
        let mark = Mark::now()?;
        for time in 1_790_000_000_000_i64..1_790_000_000_100 {
            session.publish("devices/press-1/telemetry", &json!({"ts": time, "value": 1}).to_string()).await?;
        }
        fleet.apply(secret("of-no-concern", &json!({"key": "value"}))).await?;
        tokio::time::sleep(COUNTED).await;
        ensure_none(&mark, &fleet, "a steady fleet")?;

        let mark = Mark::now()?;
        fault::delete_pod_and_wait(&fleet.client, SYSTEM_NAMESPACE, "fleetwright").await?;
        tokio::time::sleep(COUNTED).await;
        ensure_none(&mark, &fleet, "a restart of the operator")
    });
}

fn ensure_none(mark: &Mark, fleet: &Fleet, what: &str) -> Result<()> {
    let writes = mark.writes(&fleet.namespace)?;
    ensure!(writes.is_empty(), "{what} caused {} writes:\n{}", writes.len(), writes.join("\n"));
    Ok(())
}

/// Waits until there were no writes for some time.
async fn steady(fleet: &Fleet) -> Result<()> {
    until(seconds(60), "the fleet is steady", async || {
        let mark = Mark::now()?;
        tokio::time::sleep(QUIET).await;
        ensure_none(&mark, fleet, "the last seconds")
    })
    .await
}
