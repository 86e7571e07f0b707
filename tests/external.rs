//! An external broker: a Mosquitto with its own passwords and certificate, where client identifiers differ from user names.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a helper of a test fails by panicking")]

mod common;

use std::net::{Ipv4Addr, TcpStream};
use std::sync::Arc;

use bytes::Bytes;
use common::free_port;
use common::mosquitto::{Mosquitto, PATIENCE, wait_until};
use common::postgres::Postgres;
use common::worker::Chain;
use fleetwright::api::Device;
use fleetwright::api::device::ConnectionState;
use fleetwright::broker::credential::{Password, hash};
use fleetwright::mqtt::login::{ClientTls, Login};
use fleetwright::operator::device::index::SharedDeviceIndex;
use fleetwright::operator::device::key::GatewayKey;
use fleetwright::operator::presence::follow::PresenceUpdate;
use fleetwright::operator::twin_sync::connections::ReportedConnections;
use fleetwright::operator::twin_sync::external::cause;
use fleetwright::operator::twin_sync::metrics::TwinSyncMetrics;
use fleetwright::operator::twin_sync::session::{TwinSession, discard};
use fleetwright::operator::twin_sync::session_loop::{PresenceSubscription, SessionLoop, SyncError};
use fleetwright::runtime::address::AddressPolicy;
use rcgen::{CertificateParams, KeyPair};
use serde_json::json;
use tempfile::TempDir;
use tokio::sync::{Notify, mpsc};
use tokio::time::{Instant, timeout};

const FLEET: (&str, &str) = ("fleet", "open sesame");
const PRESS: (&str, &str) = ("press-1", "of the press");

/// An external broker with a listener without TLS and one with TLS.
struct Foreign {
    broker: Mosquitto,
    tls_port: u16,
    authority: String,
}

fn foreign() -> Foreign {
    foreign_with(|_| String::new())
}

/// The same, with further lines of configuration and a folder for their files.
fn foreign_with(more: impl FnOnce(&TempDir) -> String) -> Foreign {
    let folder = tempfile::tempdir().unwrap();
    let key = KeyPair::generate().unwrap();
    let authority = CertificateParams::new(vec!["localhost".to_owned()]).unwrap().self_signed(&key).unwrap().pem();
    let entry = |(name, password): (&str, &str)| {
        format!("{name}:{}\n", hash::hash("uid", name, &Password::given(password.as_bytes()).unwrap(), 101))
    };
    write(&folder, "passwords", &[entry(FLEET), entry(PRESS)].concat());
    write(&folder, "broker.crt", &authority);
    write(&folder, "broker.key", &key.serialize_pem());
    let (port, tls_port) = (free_port(), free_port());
    let path = folder.path().display();
    let configuration = format!(
        "log_dest stderr\nallow_anonymous false\npassword_file {path}/passwords\npersistence true\npersistence_location {path}/\n\
         max_queued_messages 0\nmax_inflight_messages 2000\nlistener {port} 127.0.0.1\nlistener {tls_port} 127.0.0.1\ncertfile {path}/broker.crt\n\
         keyfile {path}/broker.key\n{}",
        more(&folder)
    );
    let broker = Mosquitto::start(folder, &configuration, port);
    // The second listener starts after the first one.
    wait_until("the listener with TLS", || TcpStream::connect((Ipv4Addr::LOCALHOST, tls_port)).is_ok());
    Foreign { broker, tls_port, authority }
}

fn write(folder: &TempDir, name: &str, content: &str) {
    std::fs::write(folder.path().join(name), content).unwrap();
}

impl Foreign {
    fn login(&self) -> Login {
        Login {
            host: "localhost".to_owned(),
            port: self.tls_port,
            client_id: "fwo0123456789abcdef".to_owned(),
            username: FLEET.0.to_owned(),
            password: Bytes::from_static(FLEET.1.as_bytes()),
            tls: Some(ClientTls::verified_by(Some(self.authority.clone().into_bytes())).unwrap()),
            addresses: Some(AddressPolicy::new(&["127.0.0.0/8".parse().unwrap(), "::1".parse().unwrap()], &[])),
        }
    }

    fn publish_retained(&self, topic: &str, message: &str) {
        let output = self.broker.publish(PRESS, &["-r", "-t", topic, "-m", message]);
        assert!(output.status.success(), "{output:?}");
    }

    /// Waits until the broker retains this desired state.
    fn retains(&self, text: &str) {
        let subscriber = self.broker.subscribe(PRESS, &["-i", PRESS.0, "-t", "devices/press-1/desired"]);
        subscriber.wait_for(text);
    }
}

/// A session as the operator runs it.
struct Operator {
    updates: mpsc::Receiver<PresenceUpdate>,
    resync: Arc<Notify>,
    changes: mpsc::UnboundedSender<Arc<str>>,
    task: tokio::task::JoinHandle<()>,
}

impl Drop for Operator {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Operator {
    async fn start(foreign: &Foreign, index: SharedDeviceIndex) -> Self {
        let (changes, devices) = mpsc::unbounded_channel();
        let (reports, taken) = mpsc::channel(16);
        let (sender, updates) = mpsc::channel(16);
        let gateway = GatewayKey::new("fleet", "plant-1");
        let resync = Arc::new(Notify::new());
        let connections = ReportedConnections::new(gateway.clone(), Instant::now(), 0);
        let subscription = PresenceSubscription { connections, updates: sender, resync: Arc::clone(&resync) };
        let metrics = TwinSyncMetrics::register(&prometheus::Registry::new()).unwrap();
        let mut session_loop = SessionLoop::new(gateway, index, devices, reports, metrics).with_presence(subscription);
        let session = session_loop.begin(&foreign.login()).await.unwrap();
        let task = tokio::spawn(async move {
            session_loop.run(session).await;
            drop(taken);
        });
        Self { updates, resync, changes, task }
    }

    /// The next presence message: whether it has all devices, and their states.
    async fn next_news(&mut self) -> (bool, Vec<(String, ConnectionState)>) {
        match timeout(PATIENCE, self.updates.recv()).await.expect("an update in time").unwrap() {
            PresenceUpdate::Heard { all, devices, .. } => {
                (all, devices.iter().map(|(device, connection)| (device.to_string(), connection.state)).collect())
            }
            other => panic!("{other:?}"),
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn desired_states_and_presence_work_over_tls() {
    let foreign = foreign();
    let index = SharedDeviceIndex::default();
    foreign.publish_retained("devices/press-1/connection", "online");
    let mut operator = Operator::start(&foreign, index.clone()).await;
    let online = || vec![("press-1".to_owned(), ConnectionState::Online)];
    assert_eq!(operator.next_news().await, (true, online()), "the retained presence messages");

    foreign.publish_retained("devices/press-1/connection", "offline");
    assert_eq!(operator.next_news().await, (false, vec![("press-1".to_owned(), ConnectionState::Offline)]));
    foreign.publish_retained("devices/press-1/connection", "no idea");
    foreign.publish_retained("devices/press-1/connection", "online");
    assert_eq!(operator.next_news().await, (false, online()), "an unknown presence message is ignored");
    operator.resync.notify_one();
    assert_eq!(operator.next_news().await, (true, online()), "all devices after a request");

    let device = json!({
        "apiVersion": "fleetwright.io/v1alpha1", "kind": "Device",
        "metadata": {"name": "press-1", "namespace": "fleet", "uid": "1", "generation": 1},
        "spec": {"gatewayRef": {"name": "plant-1"}, "desired": {"samplingSeconds": 5}},
    });
    index.lock().device_applied(&serde_json::from_value::<Device>(device).unwrap());
    operator.changes.send("press-1".into()).unwrap();
    foreign.retains(r#"{"generation":1,"desired":{"samplingSeconds":5}}"#);
    drop(operator);
    assert!(foreign.broker.has_session(FLEET, "fwo0123456789abcdef"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_failed_login_has_the_reason_of_its_cause() {
    let foreign = foreign();
    let stranger = KeyPair::generate().unwrap();
    let stranger = CertificateParams::new(vec!["localhost".to_owned()]).unwrap().self_signed(&stranger).unwrap().pem();
    let other_authority = ClientTls::verified_by(Some(stranger.into_bytes())).unwrap();
    let plain = || Login { tls: None, ..foreign.login() };
    for (name, login, reason) in [
        ("another password", Login { password: Bytes::from_static(b"sesame"), ..foreign.login() }, "LoginRefused"),
        ("another authority", Login { tls: Some(other_authority), ..foreign.login() }, "TlsFailed"),
        ("another name", Login { host: "127.0.0.1".to_owned(), ..foreign.login() }, "TlsFailed"),
        ("TLS where there is none", Login { port: foreign.broker.port, ..foreign.login() }, "TlsFailed"),
        ("no TLS where there is", plain(), "BrokerUnreachable"),
        ("closed port", Login { port: free_port(), ..plain() }, "BrokerUnreachable"),
        ("closed port with TLS", Login { port: free_port(), ..foreign.login() }, "BrokerUnreachable"),
        ("an address of the machine", Login { addresses: Some(AddressPolicy::default()), ..foreign.login() }, "AddressNotAllowed"),
        ("no such host", Login { host: "nowhere.invalid".to_owned(), ..plain() }, "BrokerUnreachable"),
    ] {
        let error = SyncError::from(TwinSession::begin(&login, 16, true).await.expect_err(name));
        let cause = cause(&login, &error);
        assert_eq!(cause.reason.as_str(), reason, "{name}: {}", cause.message);
        assert!(!cause.message.contains("sesame"), "{}", cause.message);
    }
}

/// A broker that accepts the login and refuses every subscription.
#[tokio::test(flavor = "multi_thread")]
async fn a_refused_subscription_has_its_own_reason() {
    let foreign = foreign_with(|folder| {
        let hash = hash::hash("uid", FLEET.0, &Password::given(FLEET.1.as_bytes()).unwrap(), 101);
        let [salt, password] = [3, 4].map(|part| hash.split('$').nth(part).unwrap().to_owned());
        let access = json!({"publishClientSend": true, "publishClientReceive": true, "subscribe": false, "unsubscribe": true});
        let client = json!({"username": FLEET.0, "password": password, "salt": salt, "iterations": 101});
        write(folder, "security.json", &json!({"defaultACLAccess": access, "clients": [client]}).to_string());
        let path = folder.path().display();
        let plugin = "/usr/lib/mosquitto-build/clients/usr/lib/mosquitto/dynamic_security.so";
        format!("plugin {plugin}\nplugin_opt_config_file {path}/security.json\n")
    });
    let login = foreign.login();
    let error = SyncError::from(TwinSession::begin(&login, 16, true).await.expect_err("no subscription is allowed"));
    let cause = cause(&login, &error);
    assert_eq!(cause.reason.as_str(), "SubscriptionRefused", "{}", cause.message);
    assert!(cause.message.contains("devices/+/reported") && !cause.message.contains("sesame"), "{}", cause.message);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_discarded_session_ends_with_its_queue() {
    let foreign = foreign();
    let reader = "fwi0123456789abcdef";
    let port = foreign.broker.port.to_string();
    let arguments = ["-p", &port, "-u", FLEET.0, "-P", FLEET.1, "-i", reader, "-c", "-x", "600", "-t", "devices/+/telemetry"];
    drop(foreign.broker.subscribe_bare(reader, &arguments));
    foreign.publish_retained("devices/press-1/telemetry", "queued");
    assert!(foreign.broker.has_session(FLEET, reader));
    foreign.publish_retained("devices/press-1/telemetry", "queued");
    discard(&Login { client_id: reader.to_owned(), ..foreign.login() }).await.unwrap();
    assert!(!foreign.broker.has_session(FLEET, reader));
    let wrong = Login { password: Bytes::from_static(b"sesame"), ..foreign.login() };
    assert!(discard(&wrong).await.is_err());
}

#[tokio::test]
async fn a_worker_with_a_login_from_files_loses_nothing() {
    let foreign = foreign();
    let gateway = json!({
        "name": "plant-1", "host": "localhost", "port": foreign.tls_port, "tls": true,
        "external": {"clientId": "fwi0123456789abcdef", "authorities": true},
    });
    let files =
        [("gateways/plant-1/username", FLEET.0), ("gateways/plant-1/password", "wrong"), ("gateways/plant-1/ca.crt", &foreign.authority)];
    let decode = json!({"time": {"pointer": "/ts", "unit": "Milliseconds"}, "fields": [{"name": "rms", "type": "Float64"}]});
    let Foreign { broker, .. } = foreign;
    let mut chain = Chain::start_reading(broker, gateway, &files, "devices/{device}/telemetry", &decode, Postgres::shared().await).await;
    chain.worker.wait_not_ready("NotAuthorized");
    // The Secret is corrected, and the file follows.
    chain.worker.write("gateways/plant-1/password", &format!("{}\n", FLEET.1));
    chain.worker.wait_ready();
    let start = 1_777_863_721_500_u64;
    let publish = |chain: &Chain, range: std::ops::Range<u64>| {
        let padding = "x".repeat(2_000);
        let lines: Vec<String> = range.map(|n| format!(r#"{{"ts":{},"rms":{n},"padding":"{padding}"}}"#, start + n)).collect();
        chain.broker.publish_lines(PRESS, &["-t", "devices/press-1/telemetry"], &lines.join("\n"));
    };
    publish(&chain, 0..100);
    chain.wait_for("SELECT count(*) FROM vibration", 100).await;

    // The broker queues more than one TLS record or one read holds.
    assert!(chain.worker.stop());
    publish(&chain, 100..2_100);
    chain.start_worker(None);
    chain.wait_for("SELECT count(*) FROM vibration", 2_100).await;
    assert_eq!(chain.count("SELECT count(*) FROM fleetwright.dead_letter").await, 0);

    // The broker restarts.
    chain.broker.stop();
    chain.worker.wait_not_ready("gateway plant-1");
    chain.broker.start_again();
    chain.worker.wait_ready();
    publish(&chain, 2_100..2_200);
    chain.wait_for("SELECT count(*) FROM vibration", 2_200).await;
    assert!(chain.worker.stop());
    assert!(chain.broker.has_session(FLEET, "fwi0123456789abcdef"));
}
