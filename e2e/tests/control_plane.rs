//! Devices publish while the control plane is unavailable, and all acknowledged messages are in the table.

use std::collections::BTreeMap;
use std::time::Instant;

use anyhow::{Result, ensure};
use fleetwright_e2e::client::Listener;
use fleetwright_e2e::cluster::{SYSTEM_NAMESPACE, start_component, stop_component};
use fleetwright_e2e::database::Database;
use fleetwright_e2e::manifest::{device, gateway, pipeline};
use fleetwright_e2e::publisher::{Publisher, stored, stored_at_their_times, stored_twice};
use fleetwright_e2e::wait::{seconds, until};
use fleetwright_e2e::{Fleet, fault, run_alone};

/// Time for which the API server is stopped.
const AWAY: std::time::Duration = seconds(60);

/// Readings that must be acknowledged between two faults.
const BETWEEN: usize = 100;

#[test]
fn readings_are_stored_while_operator_and_api_server_are_unavailable() {
    run_alone("headless", async |fleet| {
        let database = fleet.database().await?;
        fleet.apply_all([gateway("plant-1"), device("press-1", "plant-1"), device("press-2", "plant-1"), pipeline("readings")]).await?;
        fleet.all_ready(&["Gateway/plant-1", "Device/press-1", "Device/press-2", "Pipeline/readings"]).await?;
        let mut devices = BTreeMap::new();
        for name in ["press-1", "press-2"] {
            devices.insert(name.to_owned(), fleet.password(name).await?);
        }
        let publisher = Publisher::start(&Listener::plain(fleet.address("plant-1").await?), &devices, 10.0).await?;
        publisher.more(BETWEEN).await?;
        fault::kill_and_wait(&fleet.client, SYSTEM_NAMESPACE, "fleetwright", "fleetwright operator").await?;
        publisher.more(BETWEEN).await?;
        // The operator reconciles again.
        fleet.apply(device("press-3", "plant-1")).await?;
        fleet.ready("Device", "press-3").await?;

        let pods = [
            fault::pod(&fleet.client, &fleet.namespace, "readings-ingest").await?,
            fault::pod(&fleet.client, &fleet.namespace, "plant-1-broker").await?,
        ];
        stop_component("apiserver").await?;
        let outcome = without_api_server(&database, &publisher, &pods).await;
        let back = Instant::now();
        start_component("apiserver").await?;
        outcome?;
        recovered(&fleet).await?;
        println!("a change was carried out {:.1} s after the start of the API server", back.elapsed().as_secs_f64());

        let acknowledged = publisher.stop().await?;
        stored(&database, "reading", &acknowledged).await?;
        stored_at_their_times(&database, "reading", &acknowledged).await?;
        ensure!(stored_twice(&database, "reading").await? == 0, "readings stand in the table more than once");
        println!("{} acknowledged readings, each there once", acknowledged.len());
        Ok(())
    });
}

/// Kills the worker and the broker while the API server is stopped. The kubelet restarts them with the data on their volumes.
async fn without_api_server(
    database: &Database,
    publisher: &Publisher,
    [worker, broker]: &[k8s_openapi::api::core::v1::Pod; 2],
) -> Result<()> {
    let started = Instant::now();
    publisher.more(BETWEEN).await?;
    fault::kill(worker, "fleetwright ingest").await?;
    publisher.more(BETWEEN).await?;
    fault::kill(broker, "mosquitto").await?;
    publisher.more(BETWEEN).await?;
    fault::kill(broker, "fleetwright agent").await?;
    while started.elapsed() < AWAY {
        publisher.more(BETWEEN).await?;
    }
    // Rows of the last seconds prove that all components work before the API server is back.
    until(seconds(20), "readings become rows without an API server", async || {
        let fresh = database.number("SELECT count(*) FROM reading WHERE time > now() - interval '5 seconds'").await?;
        ensure!(fresh > 0, "the newest row is older than five seconds");
        Ok(())
    })
    .await
}

/// Changes take effect again without intervention.
async fn recovered(fleet: &Fleet) -> Result<()> {
    until(seconds(60), "the API server answers", async || Ok(fleet.client.apiserver_version().await.map(drop)?)).await?;
    until(seconds(30), "a Device can be applied", async || fleet.apply(device("press-4", "plant-1")).await).await?;
    fleet.all_ready(&["Device/press-4", "Gateway/plant-1", "Pipeline/readings"]).await
}
