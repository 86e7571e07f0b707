//! The device registry against a real PostgreSQL.

#![allow(clippy::unwrap_used, reason = "helpers of tests fail by panicking")]

mod common;

use std::sync::Arc;
use std::time::{Duration, Instant};

use common::postgres::Postgres;
use fleetwright::api::{Device, PipelineSpec};
use fleetwright::configuration::pipeline::compile;
use fleetwright::operator::device::index::SharedDeviceIndex;
use fleetwright::operator::device::key::key_of;
use fleetwright::operator::pipeline::connection::RegistryState;
use fleetwright::operator::pipeline::database::{Database, Databases};
use fleetwright::operator::pipeline::registry::Devices;
use fleetwright::runtime::address::AddressPolicy;
use fleetwright::sink::timescale::execute;
use fleetwright::state::owner::{ClusterNamespace, Owner};
use fleetwright::state::registry::DeviceRow;
use fleetwright::state::registry::fill::{change, sync};
use fleetwright::state::system;
use serde_json::json;
use tokio::sync::broadcast;
use tokio_postgres::Client;
use tokio_util::sync::CancellationToken;

struct Fixture {
    client: Client,
    _postgres: Arc<Postgres>,
}

impl Fixture {
    async fn new() -> Self {
        let postgres = Postgres::shared().await;
        let client = postgres.client(&postgres.create_database().await).await;
        client.batch_execute("CREATE EXTENSION timescaledb").await.unwrap();
        client.batch_execute(&system::statements("public", "here").join(";")).await.unwrap();
        Self { client, _postgres: postgres }
    }

    async fn text(&self, query: &str) -> Option<String> {
        self.client.query_one(query, &[]).await.unwrap().get(0)
    }

    /// The names of the devices, each with its deviations from the default.
    async fn devices(&self, namespace: &str) -> String {
        let query = format!(
            "SELECT string_agg(concat(name, '@', gateway, CASE WHEN NOT enabled THEN ' disabled' END, CASE WHEN NOT declared THEN ' gone' END,
                CASE WHEN attributes <> '{{}}' THEN ' ' || attributes::text END), ', ' ORDER BY id)
             FROM fleetwright.device WHERE namespace = '{namespace}'"
        );
        self.text(&query).await.unwrap_or_default()
    }
}

fn at(namespace: &str) -> ClusterNamespace {
    ClusterNamespace { cluster: "here".to_owned(), namespace: namespace.to_owned() }
}

fn device(name: &str) -> DeviceRow {
    DeviceRow { name: name.to_owned(), gateway: "g".to_owned(), enabled: true, attributes: [].into() }
}

fn gone(name: &str, gateway: &str) -> (String, String) {
    (name.to_owned(), gateway.to_owned())
}

#[tokio::test]
async fn the_registry_has_the_declared_devices() {
    let fixture = Fixture::new().await;
    let client = &fixture.client;
    sync(client, &at("other"), &[device("a")]).await.unwrap();
    let with_attributes = DeviceRow { attributes: [("line".to_owned(), "3\0\"x".to_owned())].into(), ..device("c") };
    assert_eq!(sync(client, &at("n"), &[device("a"), device("b"), with_attributes.clone()]).await.unwrap(), 3);
    assert_eq!(fixture.devices("n").await, "a@g, b@g, c@g {\"line\": \"3\u{fffd}\\\"x\"}");

    let moved = DeviceRow { gateway: "h".to_owned(), ..device("a") };
    let disabled = DeviceRow { enabled: false, ..with_attributes };
    assert_eq!(sync(client, &at("n"), &[moved, disabled, device("d")]).await.unwrap(), 4);
    assert_eq!(fixture.devices("n").await, "a@h, b@g gone, c@g disabled {\"line\": \"3\u{fffd}\\\"x\"}, d@g");

    assert_eq!(
        change(client, &at("n"), &[device("b"), device("e")], &[gone("a", "h"), gone("d", "h"), gone("unknown", "g")]).await.unwrap(),
        3
    );
    assert_eq!(fixture.devices("n").await, "a@h gone, b@g, c@g disabled {\"line\": \"3\u{fffd}\\\"x\"}, d@g, e@g");
    let moved = DeviceRow { gateway: "h".to_owned(), ..device("e") };
    assert_eq!(change(client, &at("n"), &[moved], &[gone("e", "g")]).await.unwrap(), 1, "gone from one Gateway and there at another");
    assert_eq!(change(client, &at("n"), &[device("e")], &[]).await.unwrap(), 1);
    assert_eq!(change(client, &at("n"), &[], &[]).await.unwrap(), 0);
    assert_eq!(sync(client, &at("n"), &[]).await.unwrap(), 4);
    assert_eq!(fixture.devices("other").await, "a@g");
}

#[tokio::test]
async fn unchanged_devices_are_not_written() {
    let fixture = Fixture::new().await;
    let devices: Vec<DeviceRow> = (0..100).map(|number| device(&format!("d{number}"))).collect();
    sync(&fixture.client, &at("n"), &devices).await.unwrap();
    let versions = "SELECT string_agg(concat(id, xmin, xmax), ',' ORDER BY id) FROM fleetwright.device";
    let before = fixture.text(versions).await;
    for _ in 0..3 {
        assert_eq!(sync(&fixture.client, &at("n"), &devices).await.unwrap(), 0);
        assert_eq!(change(&fixture.client, &at("n"), &devices, &[gone("unknown", "g")]).await.unwrap(), 0);
    }
    assert_eq!(fixture.text(versions).await, before, "neither written nor locked");
    sync(&fixture.client, &at("m"), &[device("next")]).await.unwrap();
    assert_eq!(fixture.text("SELECT id::text FROM fleetwright.device WHERE namespace = 'm'").await.unwrap(), "101", "no number is wasted");
}

#[tokio::test]
async fn a_change_is_notified_once_and_no_change_is_not() {
    let postgres = Postgres::shared().await;
    let database = postgres.create_database().await;
    let client = postgres.client(&database).await;
    client.batch_execute("CREATE EXTENSION timescaledb").await.unwrap();
    client.batch_execute(&system::statements("public", "here").join(";")).await.unwrap();
    let (listener, mut connection) = fleetwright::database::connect::connect(&postgres.uri(&database), "listener").await.unwrap();
    let (notified, mut notifications) = tokio::sync::mpsc::unbounded_channel();
    tokio::spawn(async move {
        while let Some(Ok(message)) = std::future::poll_fn(|context| connection.poll_message(context)).await {
            if let tokio_postgres::AsyncMessage::Notification(notification) = message {
                notified.send(notification.payload().to_owned()).unwrap();
            }
        }
    });
    listener.batch_execute(&format!("LISTEN {}", system::DEVICE_CHANNEL)).await.unwrap();
    sync(&client, &at("n"), &[device("a"), device("b")]).await.unwrap();
    sync(&client, &at("n"), &[device("a"), device("b")]).await.unwrap();
    change(&client, &at("m"), &[device("a")], &[]).await.unwrap();
    assert_eq!(notifications.recv().await.unwrap(), "n");
    assert_eq!(notifications.recv().await.unwrap(), "m");
    assert!(notifications.is_empty());
}

fn declared(name: &str, enabled: bool) -> Device {
    let object = json!({
        "apiVersion": "fleetwright.io/v1alpha1", "kind": "Device",
        "metadata": {"name": name, "namespace": "n", "uid": name, "generation": 1},
        "spec": {"gatewayRef": {"name": "g"}, "enabled": enabled},
    });
    serde_json::from_value(object).unwrap()
}

/// Creates the tables, as the reconciler does.
async fn create_tables(database: &Database) {
    let spec: PipelineSpec = serde_json::from_value(json!({
        "source": {"topic": "devices/{device}/telemetry"},
        "decode": {"fields": [{"name": "rms", "type": "Float64"}]},
        "sink": {"timescale": {"connectionSecret": {"name": "db"}, "table": "vibration"}},
    }))
    .unwrap();
    let owner = Owner { cluster: "here".to_owned(), namespace: "n".to_owned(), pipeline: "p".to_owned() };
    let mut session = database.session().await.unwrap();
    execute::apply(session.client().unwrap(), &compile(owner, &spec, Ok(None)).unwrap().desired).await.unwrap();
    database.system_seen(&mut session, false);
}

/// Waits until the registry of the namespace has these devices.
async fn await_devices(client: &Client, expected: &str) {
    let query =
        "SELECT string_agg(concat(name, CASE WHEN NOT enabled THEN '-' END, CASE WHEN NOT declared THEN '!' END), ' ' ORDER BY name)
        FROM fleetwright.device";
    let until = Instant::now() + Duration::from_secs(30);
    loop {
        let found: Option<String> = client.query_one(query, &[]).await.unwrap().get(0);
        if found.as_deref() == Some(expected) {
            return;
        }
        assert!(Instant::now() < until, "{found:?} and not {expected}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test]
async fn the_registry_follows_the_devices_and_survives_a_restart_of_the_database() {
    let postgres = Postgres::start().await;
    let name = postgres.create_database().await;
    let devices = Devices { fleet: SharedDeviceIndex::default(), changes: broadcast::Sender::new(16), listed: CancellationToken::new() };
    let change = |device: &Device, gone: bool| {
        let mut fleet = devices.fleet.lock();
        if gone {
            fleet.device_deleted(device);
        } else {
            fleet.device_applied(device);
        }
        let _ = devices.changes.send(key_of(device).unwrap());
    };
    change(&declared("a", true), false);
    let databases = Databases::new("here".into(), devices.clone(), AddressPolicy::new(&["127.0.0.0/8".parse().unwrap()], &[]));
    let owner = Owner { cluster: "here".to_owned(), namespace: "n".to_owned(), pipeline: "p".to_owned() };
    let database = databases.obtain(&owner, &postgres.uri(&name));
    create_tables(&database).await;
    assert_eq!(database.registry(), RegistryState::Waiting, "an empty list means nothing before all is listed");
    devices.listed.cancel();
    let filled = async {
        while database.registry() != RegistryState::Filled {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(30), filled).await.unwrap();

    let client = postgres.client(&name).await;
    await_devices(&client, "a").await;
    change(&declared("b", true), false);
    change(&declared("c", true), false);
    change(&declared("a", true), true);
    await_devices(&client, "a! b c").await;
    change(&declared("a", false), false);
    await_devices(&client, "a- b c").await;
    // More concurrent changes than the capacity of the channel.
    for number in 0..40 {
        change(&declared(&format!("x{number}"), true), false);
        change(&declared(&format!("x{number}"), true), true);
    }
    change(&declared("b", false), false);

    postgres.kill();
    change(&declared("c", true), true);
    postgres.start_again().await;
    // The drift detection does this every few seconds.
    let until = Instant::now() + Duration::from_secs(30);
    while database.session().await.is_err() {
        assert!(Instant::now() < until, "no connection again");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    create_tables(&database).await;
    let client = postgres.client(&name).await;
    client.batch_execute("DELETE FROM fleetwright.device WHERE name LIKE 'x%'").await.unwrap();
    await_devices(&client, "a- b- c!").await;
}

/// Prints how long a namespace takes: `cargo test --release --test registry -- --ignored --nocapture`.
#[tokio::test]
#[ignore = "a measurement"]
async fn measure() {
    let fixture = Fixture::new().await;
    for count in [10_000, 100_000] {
        let attributes = || [("model".to_owned(), "XJ-200".to_owned()), ("line".to_owned(), "3".to_owned())].into();
        let mut devices: Vec<DeviceRow> =
            (0..count).map(|number| DeviceRow { attributes: attributes(), ..device(&format!("press-{number:06}")) }).collect();
        let namespace = format!("n{count}");
        for what in ["new", "equal", "one changed", "one at a time"] {
            if what == "one changed" {
                devices[count / 2].enabled = false;
            }
            let started = Instant::now();
            let changed = match what {
                "one at a time" => {
                    let row = DeviceRow { gateway: "h".to_owned(), ..devices[7].clone() };
                    change(&fixture.client, &at(&namespace), &[row], &[]).await.unwrap()
                }
                _ => sync(&fixture.client, &at(&namespace), &devices).await.unwrap(),
            };
            println!("{count} devices, {what}: {changed} rows in {:?}", started.elapsed());
        }
    }
}
