//! Twin synchronization with a real Mosquitto: desired states are published, reports are received, and both survive restarts.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a helper of a test fails by panicking")]
#![allow(clippy::print_stderr, reason = "shown where a test fails")]

mod common;

use std::sync::Arc;
use std::time::{Duration, Instant};

use common::free_port;
use common::mosquitto::{Mosquitto, PATIENCE};
use fleetwright::api::Device;
use fleetwright::api::device::{Access, Acl};
use fleetwright::api::name::{LINK_USERNAME, desired_topic, reported_topic};
use fleetwright::broker::credential::file::BrokerFiles;
use fleetwright::broker::credential::{Entry, Password, hash};
use fleetwright::operator::device::index::SharedDeviceIndex;
use fleetwright::operator::device::key::{DeviceKey, GatewayKey};
use fleetwright::operator::device::twin::MAX_REPORT_BYTES;
use fleetwright::operator::twin_sync::metrics::TwinSyncMetrics;
use fleetwright::operator::twin_sync::reports::Report;
use fleetwright::operator::twin_sync::session::internal_login;
use fleetwright::operator::twin_sync::session_loop::SessionLoop;
use serde_json::json;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;

const PASSWORD: &str = "secret of all";

/// A broker with the operator's user and a device `press-1`. It is durable unless its storage is deleted.
fn broker() -> Mosquitto {
    let folder = tempfile::tempdir().unwrap();
    let password = Password::given(PASSWORD.as_bytes()).unwrap();
    let entry = |name: &str, acls: &[Acl]| Entry::new(name, &hash::hash("uid", name, &password, 1), acls).unwrap();
    let topics = [desired_topic("+"), reported_topic("+")].map(|topic| Acl { topic, access: Access::ReadWrite });
    let files = BrokerFiles::new(&[entry("press-1", &[]), entry(LINK_USERNAME, &topics)], &password).unwrap();
    let path = |name: &str| folder.path().join(name);
    std::fs::write(path("passwords"), files.passwords).unwrap();
    std::fs::write(path("acls"), files.acls).unwrap();
    let port = free_port();
    let configuration = format!(
        "log_dest stderr\nallow_anonymous false\npassword_file {}\nacl_file {}\npersistence true\npersistence_location {}/\n\
         listener {port} 127.0.0.1\nuse_username_as_clientid true\n",
        path("passwords").display(),
        path("acls").display(),
        folder.path().display()
    );
    Mosquitto::start(folder, &configuration, port)
}

/// A session as the operator runs it, with an index. It reconnects when it ends.
struct Operator {
    index: SharedDeviceIndex,
    changes: mpsc::UnboundedSender<Arc<str>>,
    reports: mpsc::Receiver<Report>,
    task: JoinHandle<()>,
}

impl Drop for Operator {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Operator {
    fn start(port: u16, index: SharedDeviceIndex) -> Self {
        let (changes, devices) = mpsc::unbounded_channel();
        let (sender, reports) = mpsc::channel(16);
        let metrics = TwinSyncMetrics::register(&prometheus::Registry::new()).unwrap();
        let mut session_loop = SessionLoop::new(GatewayKey::new("fleet", "plant-1"), index.clone(), devices, sender, metrics);
        let task = tokio::spawn(async move {
            let login = internal_login("127.0.0.1".to_owned(), port, &Password::given(PASSWORD.as_bytes()).unwrap(), None);
            loop {
                let error = match session_loop.begin(&login).await {
                    Ok(session) => session_loop.run(session).await,
                    Err(error) => error,
                };
                eprintln!("the session ended: {}", fleetwright::runtime::error::chain(&error));
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        });
        Self { index, changes, reports, task }
    }

    fn apply(&self, device: &Device) {
        self.index.lock().device_applied(device);
        self.changes.send("press-1".into()).unwrap();
    }

    async fn report(&mut self) -> Report {
        tokio::time::timeout(PATIENCE, self.reports.recv()).await.expect("a report in time").unwrap()
    }
}

fn device(generation: i64, desired: &serde_json::Value) -> Device {
    let object = json!({
        "apiVersion": "fleetwright.io/v1alpha1", "kind": "Device",
        "metadata": {"name": "press-1", "namespace": "fleet", "uid": "1", "generation": generation},
        "spec": {"gatewayRef": {"name": "plant-1"}, "desired": desired},
    });
    serde_json::from_value(object).unwrap()
}

/// Waits until the retained message of the device contains this text, or until there is none.
async fn retains(broker: &Mosquitto, expected: Option<&str>) {
    let started = Instant::now();
    loop {
        let arguments = ["-t", "devices/press-1/desired"];
        let found = broker.subscribe(("press-1", PASSWORD), &arguments);
        tokio::time::sleep(Duration::from_millis(100)).await;
        let output = found.output();
        if expected.map_or(output.is_empty(), |text| output.contains(text)) {
            return;
        }
        assert!(started.elapsed() < PATIENCE, "expected {expected:?}, the broker retains {output:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn desired_states_are_restored_after_crashes_and_foreign_writes() {
    let mut broker = broker();
    let operator = Operator::start(broker.port, SharedDeviceIndex::default());
    operator.apply(&device(1, &json!({"samplingSeconds": 5})));
    retains(&broker, Some(r#"{"generation":1,"desired":{"samplingSeconds":5}}"#)).await;
    let key = DeviceKey { gateway: GatewayKey::new("fleet", "plant-1"), name: "press-1".into() };
    let changes = operator.index.lock().take_changes();
    assert!(changes.devices.contains(&key), "the confirmation leads to a status");

    operator.apply(&device(2, &json!({"samplingSeconds": 7})));
    retains(&broker, Some(r#"{"generation":2,"desired":{"samplingSeconds":7}}"#)).await;

    // The broker crashes and loses its storage.
    broker.kill();
    std::fs::remove_file(broker.folder.path().join("mosquitto.db")).ok();
    broker.start_again();
    retains(&broker, Some(r#"{"generation":2,"desired":{"samplingSeconds":7}}"#)).await;

    // Another client publishes to the topic.
    let (login, topic) = ((LINK_USERNAME, PASSWORD), "devices/press-1/desired");
    assert!(broker.publish(login, &["-t", topic, "-r", "-m", "other"]).status.success());
    retains(&broker, Some(r#""samplingSeconds":7"#)).await;

    operator.index.lock().device_deleted(&device(2, &json!({})));
    operator.changes.send("press-1".into()).unwrap();
    retains(&broker, None).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn reports_survive_an_operator_restart_and_large_ones_are_truncated() {
    let broker = broker();
    let mut operator = Operator::start(broker.port, SharedDeviceIndex::default());
    operator.apply(&device(1, &json!({"a": 1})));
    retains(&broker, Some("generation")).await;
    let say = |message: &str| {
        let file = broker.folder.path().join("message");
        std::fs::write(&file, message).unwrap();
        let arguments = ["-t", "devices/press-1/reported", "-f", file.to_str().unwrap()];
        assert!(broker.publish(("press-1", PASSWORD), &arguments).status.success());
    };
    say(r#"{"generation":1}"#);
    assert_eq!(&*operator.report().await.payload, br#"{"generation":1}"#);

    // One report exceeds the limit and is truncated, so that its length is visible. The broker does not deliver the other.
    say(&"x".repeat(200_000));
    assert_eq!(operator.report().await.payload.len(), MAX_REPORT_BYTES + 1);
    say(&"x".repeat(1_500_000));
    say("[1]");
    assert_eq!(&*operator.report().await.payload, b"[1]");

    let index = operator.index.clone();
    drop(operator);
    let started = Instant::now();
    while !broker.log().contains("Client _operator") || !broker.log().contains("disconnected") {
        assert!(started.elapsed() < PATIENCE, "the broker has not noticed the end of the operator:\n{}", broker.log());
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    say(r#"{"a":2}"#);
    let mut operator = Operator::start(broker.port, index);
    assert_eq!(&*operator.report().await.payload, br#"{"a":2}"#);
    // The resumed session also receives later messages.
    operator.apply(&device(3, &json!({"a": 3})));
    retains(&broker, Some(r#""a":3"#)).await;
}
