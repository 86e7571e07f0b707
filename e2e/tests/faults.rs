//! Processes are killed while devices publish. Afterwards every acknowledged reading is in the table.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Context, Result, ensure};
use fleetwright_e2e::client::Listener;
use fleetwright_e2e::database::Database;
use fleetwright_e2e::manifest::{device, gateway, pipeline, with};
use fleetwright_e2e::publisher::{Publisher, Reading, stored, stored_at_their_times, stored_twice};
use fleetwright_e2e::wait::{seconds, until};
use fleetwright_e2e::{Fleet, fault, metrics, run};
use k8s_openapi::api::core::v1::Event;
use kube::Api;
use kube::api::ListParams;
use serde_json::json;

/// Devices, and readings per second of each: enough that every fault meets batches in flight.
const DEVICES: usize = 8;
const RATE: f64 = 10.0;

/// Readings that must be acknowledged between two faults: those of a few seconds.
const BETWEEN: usize = 250;

#[test]
fn killed_workers_agents_and_databases_neither_lose_nor_duplicate_readings() {
    run("killed", async |fleet| {
        let (database, publisher) = start(&fleet).await?;
        for (pod, program) in [
            ("timed-ingest", "fleetwright ingest"),
            ("arrival-ingest", "fleetwright ingest"),
            ("plant-1-broker", "fleetwright agent"),
            ("timescaledb", "postgres"),
        ] {
            fault::kill_and_wait(&fleet.client, &fleet.namespace, pod, program).await?;
            publisher.more(BETWEEN).await?;
        }
        fault::delete_pod_and_wait(&fleet.client, &fleet.namespace, "timescaledb").await?;
        publisher.more(BETWEEN).await?;
        fleet.all_ready(&["Gateway/plant-1", "Pipeline/timed", "Pipeline/arrival"]).await?;

        ensure!(publisher.connections() == DEVICES, "a device's session broke, though nothing of its broker was touched");
        let acknowledged = publisher.stop().await?;
        stored_once(&database, &acknowledged).await?;
        stored_at_their_times(&database, "timed", &acknowledged).await?;
        println!("{} acknowledged readings, each there once", acknowledged.len());
        no_dead_letters(&database).await
    });
}

#[test]
fn killed_brokers_lose_no_readings() {
    run("broker", async |fleet| {
        let (database, publisher) = start(&fleet).await?;
        fault::kill_and_wait(&fleet.client, &fleet.namespace, "plant-1-broker", "mosquitto").await?;
        publisher.more(BETWEEN).await?;
        let before = publisher.connections();
        ensure!(before > DEVICES, "no session broke: the broker was not killed");
        fault::delete_pod_and_wait(&fleet.client, &fleet.namespace, "plant-1-broker").await?;
        publisher.more(BETWEEN).await?;
        ensure!(publisher.connections() > before, "no session broke: the broker's pod was not deleted");
        // Messages that wait for a worker also survive a kill of the broker.
        fleet.change("Pipeline", "timed", json!({"spec": {"paused": true}})).await?;
        fleet.gone("Pod", "timed-ingest-0", fleetwright_e2e::fleet::GONE_WITHIN).await?;
        publisher.more(BETWEEN).await?;
        fault::kill_and_wait(&fleet.client, &fleet.namespace, "plant-1-broker", "mosquitto").await?;
        fleet.change("Pipeline", "timed", json!({"spec": {"paused": false}})).await?;
        fleet.all_ready(&["Gateway/plant-1", "Pipeline/timed", "Pipeline/arrival"]).await?;

        let acknowledged = publisher.stop().await?;
        for table in ["timed", "arrival"] {
            stored(&database, table, &acknowledged).await?;
        }
        stored_at_their_times(&database, "timed", &acknowledged).await?;
        ensure!(stored_twice(&database, "timed").await? == 0, "readings stand in the table more than once");
        // Devices publish again what the broker has stored but not acknowledged. Such duplicates have no unique key.
        let again = stored_twice(&database, "arrival").await?;
        println!("{} acknowledged readings are there; {again} without a key came twice from their device", acknowledged.len());
        no_dead_letters(&database).await
    });
}

#[test]
fn an_unavailable_database_is_reported_and_its_backlog_is_stored() {
    run("unreachable", async |fleet| {
        let (database, publisher) = start(&fleet).await?;
        let is_up = async || metric(&fleet, "timed-ingest-0", "fleetwright_ingest_database_up").await;
        ensure!(is_up().await? == "1", "the metric says that the database is away");

        fleet.change("StatefulSet", "timescaledb", json!({"spec": {"replicas": 0}})).await?;
        fleet.gone("Pod", "timescaledb-0", fleetwright_e2e::fleet::GONE_WITHIN).await?;
        for pipeline in ["timed", "arrival"] {
            let table = fleet.condition("Pipeline", pipeline, "TableReady", "Unknown", "DatabaseUnavailable").await?;
            ensure!(table.message.contains("timescaledb") && table.message.contains("start it"), "no help: {}", table.message);
            fleet.condition("Pipeline", pipeline, "Ready", "False", "DatabaseUnavailable").await?;
        }
        until(seconds(30), "the worker says so", async || {
            ensure!(is_up().await? == "0", "its metric says that the database is there");
            let pod = fault::pod(&fleet.client, &fleet.namespace, "timed-ingest").await?;
            let conditions = pod.status.and_then(|status| status.conditions).unwrap_or_default();
            let ready = conditions.into_iter().find(|condition| condition.type_ == "Ready");
            ensure!(ready.as_ref().is_some_and(|ready| ready.status == "False"), "it is ready: {ready:?}");
            Ok(())
        })
        .await?;
        publisher.more(BETWEEN).await?;
        let events = Api::<Event>::namespaced(fleet.client.clone(), &fleet.namespace).list(&ListParams::default()).await?.items;
        let told = |event: &&Event| event.reason.as_deref() == Some("DatabaseUnavailable") && event.type_.as_deref() == Some("Warning");
        let of = |name: &str| events.iter().filter(told).filter(|event| event.involved_object.name.as_deref() == Some(name)).count();
        // One Event for each cause: the closed connection, then the unreachable server.
        ensure!((1..=3).contains(&of("timed")), "{} Events tell of it", of("timed"));

        fleet.change("StatefulSet", "timescaledb", json!({"spec": {"replicas": 1}})).await?;
        fleet.all_ready(&["Pipeline/timed", "Pipeline/arrival"]).await?;
        ensure!(publisher.connections() == DEVICES, "a device's session broke, though its broker was there");
        let acknowledged = publisher.stop().await?;
        stored_once(&database, &acknowledged).await?;
        no_dead_letters(&database).await
    });
}

/// Reads the value of a metric of a pod.
async fn metric(fleet: &Fleet, pod: &str, name: &str) -> Result<String> {
    let text = metrics::scrape(&fault::pod(&fleet.client, &fleet.namespace, pod).await?).await?;
    let value = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
    Ok(value.with_context(|| format!("{pod} has no metric {name}"))?.trim().to_owned())
}

/// Creates a database server, a broker, a Pipeline that takes the time from the message, one that uses the time of arrival, and
/// devices that publish.
async fn start(fleet: &Fleet) -> Result<(Database, Publisher)> {
    let database = Database::own(fleet).await?;
    fleet.apply(gateway("plant-1")).await?;
    let names: Vec<String> = (1..=DEVICES).map(|number| format!("press-{number}")).collect();
    fleet.apply_all(names.iter().map(|name| device(name, "plant-1"))).await?;
    let decode = json!({"fields": [{"name": "value", "type": "Float64", "required": true}]});
    let of_arrival = with(pipeline("arrival"), "/spec/decode", decode);
    fleet.apply(with(of_arrival, "/spec/sink/timescale/table", "arrival".into())).await?;
    fleet.apply(with(pipeline("timed"), "/spec/sink/timescale/table", "timed".into())).await?;
    fleet.all_ready(&["Gateway/plant-1", "Pipeline/timed", "Pipeline/arrival"]).await?;
    let mut devices = BTreeMap::new();
    for name in names {
        fleet.ready("Device", &name).await?;
        devices.insert(name.clone(), fleet.password(&name).await?);
    }
    let publisher = Publisher::start(&Listener::plain(fleet.address("plant-1").await?), &devices, RATE).await?;
    publisher.more(BETWEEN).await?;
    Ok((database, publisher))
}

/// Checks that both tables contain each reading once.
async fn stored_once(database: &Database, acknowledged: &BTreeSet<Reading>) -> Result<()> {
    for table in ["timed", "arrival"] {
        stored(database, table, acknowledged).await?;
        let twice = stored_twice(database, table).await?;
        ensure!(twice == 0, "{twice} readings stand in {table} more than once");
    }
    Ok(())
}

async fn no_dead_letters(database: &Database) -> Result<()> {
    let letters = database.number("SELECT count(*) FROM fleetwright.dead_letter").await?;
    ensure!(letters == 0, "{letters} good readings became dead letters");
    Ok(())
}
