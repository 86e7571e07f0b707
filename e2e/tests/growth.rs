//! A Pipeline is scaled and changed while devices publish: every acknowledged reading is stored once.

use std::collections::BTreeMap;

use anyhow::{Result, ensure};
use fleetwright_e2e::client::{Listener, Session};
use fleetwright_e2e::cluster::{output, root};
use fleetwright_e2e::database::Database;
use fleetwright_e2e::fault::pod;
use fleetwright_e2e::fleet::GONE_WITHIN;
use fleetwright_e2e::manifest::{device, gateway, pipeline, with};
use fleetwright_e2e::publisher::{Publisher, stored, stored_at_their_times, stored_twice};
use fleetwright_e2e::wait::{seconds, until};
use fleetwright_e2e::{Fleet, run};
use serde_json::{Value, json};
use tokio::process::Command;

/// Devices of each Gateway, and readings per second of each.
const DEVICES: usize = 4;
const RATE: f64 = 10.0;

/// Readings of each Gateway that must be acknowledged between two changes.
const BETWEEN: usize = 150;

/// The autoscaler evaluates its metrics every 15 seconds.
const SCALED_WITHIN: std::time::Duration = seconds(60);

#[test]
fn scaled_and_changed_pipelines_neither_lose_nor_duplicate_readings() {
    run("growth", async |fleet| {
        let database = fleet.database().await?;
        let publishers = start(&fleet).await?;
        more(&publishers).await?;

        // The HorizontalPodAutoscaler of config/autoscaling uses the scale subresource. Without metrics it applies its minimum and maximum.
        for name in ["timed", "arrival"] {
            fleet.apply(autoscaler(&fleet, name).await?).await?;
        }
        scaled(&fleet, 2).await?;
        more(&publishers).await?;

        for name in ["timed", "arrival"] {
            fleet.delete("HorizontalPodAutoscaler", name).await?;
            let mut kubectl = Command::new("kubectl");
            let namespace = fleet.namespace.as_str();
            output(kubectl.args(["-n", namespace, "scale", "pipelines.fleetwright.io", name, "--current-replicas=2", "--replicas=1"]))
                .await?;
        }
        scaled(&fleet, 1).await?;
        for name in ["timed", "arrival"] {
            fleet.gone("Pod", &format!("{name}-ingest-1"), GONE_WITHIN).await?;
        }
        more(&publishers).await?;

        // A new field causes a rollout of the workers.
        for name in ["timed", "arrival"] {
            let before = pod(&fleet.client, &fleet.namespace, &format!("{name}-ingest")).await?;
            fleet.change("Pipeline", name, json!({"spec": {"decode": {"fields": fields(&["value", "ts"])}}})).await?;
            fleet.ready("Pipeline", name).await?;
            let after = pod(&fleet.client, &fleet.namespace, &format!("{name}-ingest")).await?;
            ensure!(before.metadata.uid != after.metadata.uid, "the worker of {name} was not replaced");
        }
        more(&publishers).await?;

        let mut acknowledged = std::collections::BTreeSet::new();
        for publisher in publishers {
            ensure!(publisher.connections() == DEVICES, "a device's session broke, though nothing of its broker was touched");
            acknowledged.extend(publisher.stop().await?);
        }
        for table in ["timed", "arrival"] {
            stored(&database, table, &acknowledged).await?;
            let twice = stored_twice(&database, table).await?;
            ensure!(twice == 0, "{twice} readings stand in {table} more than once");
            let new = database.number(&format!("SELECT count(*) FROM {table} WHERE ts = value")).await?;
            ensure!(new > 0, "no row of {table} has the new field");
        }
        stored_at_their_times(&database, "timed", &acknowledged).await?;
        println!("{} acknowledged readings, each there once", acknowledged.len());
        no_dead_letters(&database).await
    });
}

#[test]
fn a_changed_topic_loses_no_reading_and_leaves_no_queue() {
    run("topic", async |fleet| {
        let database = fleet.database().await?;
        let acls = json!([{"topic": "lines/#", "access": "Write"}]);
        let press = with(device("press-1", "plant-1"), "/spec/authorization", json!({"acls": acls}));
        fleet.apply_all([gateway("plant-1"), press, device("press-2", "plant-1"), pipeline("readings")]).await?;
        fleet.all_ready(&["Gateway/plant-1", "Device/press-1", "Device/press-2", "Pipeline/readings"]).await?;
        let listener = Listener::plain(fleet.address("plant-1").await?);
        let devices = BTreeMap::from([("press-2".to_owned(), fleet.password("press-2").await?)]);
        let publisher = Publisher::start(&listener, &devices, RATE).await?;
        publisher.more(BETWEEN / 3).await?;
        // The old subscription matched all messages acknowledged so far, so they must be stored.
        let before = publisher.stop().await?;
        fleet.change("Pipeline", "readings", json!({"spec": {"source": {"topic": "lines/{device}"}}})).await?;
        stored(&database, "reading", &before).await?;
        fleet.ready("Pipeline", "readings").await?;
        subscribed(&database, "{lines/+}").await?;

        // No worker runs, so the broker queues messages for every subscription that still exists.
        fleet.change("Pipeline", "readings", json!({"spec": {"paused": true}})).await?;
        fleet.gone("Pod", "readings-ingest-0", GONE_WITHIN).await?;
        let mut session = Session::connect(&listener, "press-1", &fleet.password("press-1").await?).await?;
        session.publish("devices/press-1/telemetry", r#"{"ts": 1790000000001, "value": 1}"#).await?;
        session.publish("lines/press-1", r#"{"ts": 1790000000002, "value": 2}"#).await?;
        fleet.change("Pipeline", "readings", json!({"spec": {"paused": false}})).await?;
        database.reaches(seconds(60), "SELECT count(*) FROM reading WHERE value = 2", 1).await?;
        ensure!(database.number("SELECT count(*) FROM reading WHERE value = 1").await? == 0, "the former topic was queued");
        no_dead_letters(&database).await
    });
}

/// Two Gateways with publishing devices, a Pipeline that takes the time from the message, and one that uses the time of arrival.
async fn start(fleet: &Fleet) -> Result<Vec<Publisher>> {
    let gateways = ["plant-1", "plant-2"];
    fleet.apply_all(gateways.map(gateway)).await?;
    let names = |gateway: &str| (1..=DEVICES).map(|number| format!("{gateway}-press-{number}")).collect::<Vec<_>>();
    let devices = gateways.iter().flat_map(|gateway| names(gateway).into_iter().map(|name| device(&name, gateway)));
    fleet.apply_all(devices.collect::<Vec<_>>()).await?;
    let of_arrival = with(pipeline("arrival"), "/spec/decode", json!({"fields": fields(&["value"])}));
    fleet.apply(with(of_arrival, "/spec/sink/timescale/table", "arrival".into())).await?;
    fleet.apply(with(pipeline("timed"), "/spec/sink/timescale/table", "timed".into())).await?;
    fleet.all_ready(&["Gateway/plant-1", "Gateway/plant-2", "Pipeline/timed", "Pipeline/arrival"]).await?;
    let mut publishers = Vec::new();
    for gateway in gateways {
        let mut devices = BTreeMap::new();
        for name in names(gateway) {
            fleet.ready("Device", &name).await?;
            devices.insert(name.clone(), fleet.password(&name).await?);
        }
        publishers.push(Publisher::start(&Listener::plain(fleet.address(gateway).await?), &devices, RATE).await?);
    }
    Ok(publishers)
}

fn fields(names: &[&str]) -> Value {
    names.iter().map(|name| json!({"name": name, "type": "Float64"})).collect()
}

async fn more(publishers: &[Publisher]) -> Result<()> {
    for publisher in publishers {
        publisher.more(BETWEEN).await?;
    }
    Ok(())
}

/// The example of `config/autoscaling`, strictly validated by the API server, for a Pipeline with two workers.
async fn autoscaler(fleet: &Fleet, pipeline: &str) -> Result<Value> {
    let mut kubectl = Command::new("kubectl");
    kubectl.args(["-n", &fleet.namespace, "create", "--dry-run=server", "--validate=strict", "-o", "json", "-f"]);
    kubectl.arg(root().join("config/autoscaling/horizontalpodautoscaler.yaml"));
    let example: Value = serde_json::from_str(&output(&mut kubectl).await?)?;
    let mut example = with(example, "/metadata", json!({"name": pipeline}));
    for (pointer, part) in [("/scaleTargetRef/name", json!(pipeline)), ("/minReplicas", json!(2)), ("/maxReplicas", json!(2))] {
        ensure!(example["spec"].pointer(pointer).is_some(), "the example has no {pointer}");
        example = with(example, &format!("/spec{pointer}"), part);
    }
    Ok(example)
}

/// Waits until this number of workers runs, and the Pipeline's status reports it.
async fn scaled(fleet: &Fleet, replicas: i64) -> Result<()> {
    for name in ["timed", "arrival"] {
        until(SCALED_WITHIN, format!("Pipeline {name} has {replicas} workers"), async || {
            let object = fleet.api("Pipeline").get(name).await?;
            for pointer in ["/spec/workers/replicas", "/status/replicas"] {
                let found = object.data.pointer(pointer).and_then(Value::as_i64);
                ensure!(found == Some(replicas), "{pointer} is {found:?}");
            }
            Ok(())
        })
        .await?;
        fleet.ready("Pipeline", name).await?;
    }
    Ok(())
}

/// Waits until the broker has these subscriptions for the worker.
async fn subscribed(database: &Database, filters: &str) -> Result<()> {
    let sql = format!("SELECT count(*) FROM fleetwright.session WHERE topic_filters = '{filters}'");
    database.reaches(seconds(30), &sql, 1).await
}

async fn no_dead_letters(database: &Database) -> Result<()> {
    let letters = database.number("SELECT count(*) FROM fleetwright.dead_letter").await?;
    ensure!(letters == 0, "{letters} good readings became dead letters");
    Ok(())
}
