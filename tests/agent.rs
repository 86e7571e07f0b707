//! The agent with a real Mosquitto in the configuration that the operator renders, and third-party clients.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a helper of a test fails by panicking")]
#![allow(clippy::print_stdout, reason = "a test prints what an attacker has consumed")]

#[path = "agent/attacker.rs"]
mod attacker;
#[path = "agent/certificate.rs"]
mod certificate;
mod common;
#[path = "agent/full.rs"]
mod full;
#[path = "agent/isolation.rs"]
mod isolation;
#[path = "agent/limits.rs"]
mod limits;
#[path = "agent/renewal.rs"]
mod renewal;
#[path = "agent/unreleased.rs"]
mod unreleased;

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use common::free_port;
use common::mosquitto::{Mosquitto, PATIENCE, wait_until};
use fleetwright::agent::driver::{BROKER_CHECK, BrokerPaths, Driver};
use fleetwright::agent::metrics::AgentMetrics;
use fleetwright::agent::presence::follow::LogFollower;
use fleetwright::agent::presence::{self, Presence};
use fleetwright::agent::presentation::Presented;
use fleetwright::agent::session::BrokerAddress;
use fleetwright::agent::state::{Change, Origin, Subject};
use fleetwright::api::Gateway;
use fleetwright::api::device::{Access, Acl};
use fleetwright::api::name::internal_certificate;
use fleetwright::broker::configuration::{BrokerConfiguration, render};
use fleetwright::broker::credential::shard::{Data, Shard, revision};
use fleetwright::broker::credential::{Entry, Password, hash};
use fleetwright::certificate::fingerprint;
use fleetwright::configuration::agent::{
    AgentConfiguration, CLIENT_AUTHORITIES_FILE, CONFIGURATION_FOLDER, DATA_FOLDER, LOG_FOLDER, RUNTIME_FOLDER, TLS_CERTIFICATE,
    TlsListener, tls_folder,
};
use fleetwright::runtime::readiness::Readiness;
use k8s_openapi::ByteString;
use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::PemObject;
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::sync::{mpsc, watch};
use tokio_util::sync::{CancellationToken, DropGuard};

const PASSWORD: &str = "secret of all";
const TLS_SECRET: &str = "plant-1-tls";

/// A running agent, and its outputs.
struct Agent {
    registry: prometheus::Registry,
    changes: mpsc::Sender<Change>,
    verified: watch::Receiver<Option<BTreeMap<usize, String>>>,
    presented: watch::Receiver<Option<Presented>>,
    readiness: Readiness,
    metrics: Arc<AgentMetrics>,
    first_written: CancellationToken,
    _stop: DropGuard,
}

impl Agent {
    fn start(folder: &Path, internal_port: u16, tls_listeners: &[TlsListener]) -> Self {
        let registry = prometheus::Registry::new();
        let metrics = Arc::new(AgentMetrics::register(&registry).unwrap());
        let readiness = Readiness::awaiting([BROKER_CHECK]);
        let (changes, incoming) = mpsc::channel(16);
        let (verified_sender, verified) = watch::channel(None);
        let paths = BrokerPaths {
            configuration: folder.join("mosquitto.conf"),
            runtime: folder.join("run"),
            data: folder.join("data"),
            broker: BrokerAddress { host: "127.0.0.1".to_owned(), port: internal_port },
        };
        let (presentations, presented) = watch::channel(None);
        let configuration = AgentConfiguration {
            namespace: "fleet".to_owned(),
            gateway: "plant-1".to_owned(),
            internal: tls_listener(internal_port, internal_certificate("plant-1")),
            tls_listeners: tls_listeners.to_vec(),
        };
        let presence = Presence::new();
        let driver = Driver::new(paths, &configuration, incoming, verified_sender, presentations, readiness.clone(), Arc::clone(&metrics))
            .with_presence(presence.clone());
        let first_written = driver.first_written();
        let shutdown = CancellationToken::new();
        let presence_metrics = presence::metrics::PresenceMetrics::register(&registry).unwrap();
        let follower = LogFollower::new(&folder.join("log"), &folder.join("mosquitto.conf"), presence, presence_metrics);
        tokio::spawn(follower.run(shutdown.clone()));
        tokio::spawn(driver.run(shutdown.clone()));
        Self { registry, changes, verified, presented, readiness, metrics, first_written, _stop: shutdown.drop_guard() }
    }

    /// The number of clients that it counts as refused.
    fn refused(&self) -> f64 {
        let families = self.registry.gather();
        let refused = families.iter().filter(|family| family.name() == "fleetwright_broker_refused_total");
        refused.flat_map(prometheus::proto::MetricFamily::get_metric).map(|metric| metric.get_counter().get_value()).sum()
    }

    async fn shard(&self, users: &[Entry]) -> String {
        let data = Shard::new(1, users.iter().cloned()).render();
        let revision = revision(&data);
        self.send_change(Subject::Shard(0), Some(data)).await;
        revision
    }

    async fn send_change(&self, subject: Subject, data: Option<Data>) {
        self.changes.send(Change { subject, data, origin: Origin::ApiServer }).await.unwrap();
    }

    /// Changes the users of the broker, and returns the time until they are verified.
    async fn hold(&mut self, users: &[Entry]) -> Duration {
        let started = Instant::now();
        let wanted = self.shard(users).await;
        let held = |verified: &Option<BTreeMap<usize, String>>| verified.as_ref().is_some_and(|shards| shards.get(&0) == Some(&wanted));
        tokio::time::timeout(PATIENCE, self.verified.wait_for(held)).await.expect("a verification").unwrap();
        started.elapsed()
    }
}

/// A Gateway's rendered configuration with the folders and ports of this machine.
struct Site {
    configuration: String,
    folder: TempDir,
    internal_port: u16,
    port: u16,
    /// The ports of all declared listeners.
    ports: Vec<u16>,
    tls_listeners: Vec<TlsListener>,
}

impl Site {
    fn new(spec: &Value) -> Self {
        Self::trusting(spec, None)
    }

    /// A Gateway whose devices' certificates are signed by `trusted` (PEM).
    fn trusting(spec: &Value, trusted: Option<&str>) -> Self {
        let folder = tempfile::tempdir().unwrap();
        std::fs::create_dir(folder.path().join("data")).unwrap();
        std::fs::create_dir(folder.path().join("log")).unwrap();
        let internal_port = free_port();
        let object = json!({
            "apiVersion": "fleetwright.io/v1alpha1", "kind": "Gateway", "metadata": {"name": "plant-1", "namespace": "fleet"}, "spec": spec
        });
        let mut gateway: Gateway = serde_json::from_value(object).unwrap();
        let ports: Vec<u16> = gateway.spec.listeners.iter().map(|_| free_port()).collect();
        let mut tls_listeners = Vec::new();
        for (listener, port) in gateway.spec.listeners.iter_mut().zip(&ports) {
            listener.port = i32::from(*port);
            tls_listeners.extend(listener.tls_secret("plant-1").map(|secret| tls_listener(*port, secret)));
        }
        let queued_bytes = gateway.spec.limits.queued_bytes_per_client.to_units().unwrap();
        // Half of the container's limit, which is 256 MiB by default.
        let memory_limit = gateway.spec.resources.limits.get("memory").and_then(|memory| Some(memory.to_units()? / 2));
        let broker = BrokerConfiguration {
            namespace: "fleet",
            name: "plant-1",
            spec: &gateway.spec,
            memory_limit,
            queued_bytes,
            trusts_client_certificates: trusted.is_some(),
        };
        let place = |name: &str| folder.path().join(name).display().to_string();
        if let Some(trusted) = trusted {
            std::fs::write(folder.path().join(CLIENT_AUTHORITIES_FILE), trusted).unwrap();
        }
        let mut configuration = render(&broker)
            .replace(CONFIGURATION_FOLDER, &folder.path().display().to_string())
            .replace(RUNTIME_FOLDER, &place("run"))
            .replace(DATA_FOLDER, &place("data"))
            .replace(LOG_FOLDER, &place("log"))
            .replace("plugin_opt_trusted_port 1884\n", &format!("plugin_opt_trusted_port {internal_port}\n"))
            .replace("listener 1884\n", &format!("listener {internal_port} 127.0.0.1\n"));
        for port in &ports {
            configuration = configuration.replace(&format!("listener {port}\n"), &format!("listener {port} 127.0.0.1\n"));
        }
        Self { configuration, folder, internal_port, port: ports[0], ports, tls_listeners }
    }

    /// Starts the broker and its agent, and waits until these users are verified.
    async fn start(self, users: &[Entry], tls: Option<Data>) -> (Mosquitto, Agent) {
        self.start_on(users, tls, None).await
    }

    /// The same, with a volume of this size (such as `64m`) for the broker's data.
    async fn start_on(self, users: &[Entry], tls: Option<Data>, volume: Option<&str>) -> (Mosquitto, Agent) {
        self.start_all(users, &renewal::certificate(), tls, volume).await
    }

    /// The same, with this certificate of the internal listener.
    async fn start_with_internal(self, internal: &Data, users: &[Entry]) -> (Mosquitto, Agent) {
        self.start_all(users, internal, None, None).await
    }

    async fn start_all(self, users: &[Entry], internal: &Data, tls: Option<Data>, volume: Option<&str>) -> (Mosquitto, Agent) {
        let mut agent = Agent::start(self.folder.path(), self.internal_port, &self.tls_listeners);
        agent.send_change(Subject::Tls(internal_certificate("plant-1")), Some(internal.clone())).await;
        if let Some(tls) = tls {
            agent.send_change(Subject::Tls(TLS_SECRET.to_owned()), Some(tls)).await;
        }
        agent.shard(users).await;
        tokio::time::timeout(PATIENCE, agent.first_written.cancelled()).await.expect("files");
        assert!(agent.readiness.verdict().is_err(), "no broker yet");
        let broker = Mosquitto::start_on(self.folder, &self.configuration, self.port, volume);
        agent.hold(users).await;
        assert_eq!(agent.readiness.verdict(), Ok(()));
        (broker, agent)
    }
}

fn tls_listener(port: u16, secret: String) -> TlsListener {
    TlsListener { port, secret, host_names: vec!["127.0.0.1".to_owned()] }
}

/// The file with the certificate of the internal listener, which is its own authority.
fn internal_trust(broker: &Mosquitto) -> String {
    let folder = broker.folder.path().join("run").join(tls_folder(&internal_certificate("plant-1")));
    folder.join(TLS_CERTIFICATE).display().to_string()
}

fn device(username: &str, acls: &[(&str, Access)]) -> Entry {
    let password = Password::given(PASSWORD.as_bytes()).unwrap();
    let acls: Vec<Acl> = acls.iter().map(|(topic, access)| Acl { topic: (*topic).to_owned(), access: *access }).collect();
    Entry::new(username, &hash::hash("uid", username, &password, 1), &acls).unwrap()
}

fn worker() -> Entry {
    device("_ingest_vibration", &[("devices/+/telemetry", Access::Read)])
}

fn publish(broker: &Mosquitto, username: &str, payload: &str) -> bool {
    let topic = format!("devices/{username}/telemetry");
    broker.publish((username, PASSWORD), &["-t", &topic, "-m", payload]).status.success()
}

/// Arguments of a session that outlives its connection.
const PERSISTENT: [&str; 7] = ["-i", "replaced", "-c", "-x", "4294967295", "-t", "devices/+/telemetry"];

#[tokio::test(flavor = "multi_thread")]
async fn a_device_is_accepted_once_it_is_verified() {
    let (broker, mut agent) = Site::new(&json!({})).start(&[device("press-1", &[])], None).await;
    assert!(publish(&broker, "press-1", "1"));
    assert!(!publish(&broker, "press-2", "1"), "not declared yet");
    let took = agent.hold(&[device("press-1", &[]), device("press-2", &[])]).await;
    println!("from a changed shard to its verification: {took:?}");
    assert!(publish(&broker, "press-2", "1"), "right after the verification");
    assert!(!broker.publish(("press-2", "wrong"), &["-t", "x", "-m", "1"]).status.success());
    assert!(!broker.log().contains("receive-maximum quota"), "a false warning for every message");
    assert_eq!(agent.metrics.reloads.get(), 1, "the first files existed before the broker, the second caused one reload");
}

#[tokio::test(flavor = "multi_thread")]
async fn many_changes_at_once_are_one_reload() {
    let (broker, mut agent) = Site::new(&json!({})).start(&[], None).await;
    for number in 0..10 {
        let users: Vec<Entry> = (0..number).map(|number| device(&format!("press-{number}"), &[])).collect();
        agent.shard(&users).await;
    }
    let users: Vec<Entry> = (0..20).map(|number| device(&format!("press-{number}"), &[])).collect();
    agent.hold(&users).await;
    assert!(publish(&broker, "press-19", "1"));
    assert_eq!(agent.metrics.reloads.get(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_revoked_device_loses_its_live_session() {
    let users = [device("press-1", &[]), device("press-2", &[]), device("press-3", &[("devices/press-2/desired", Access::Write)])];
    let (broker, mut agent) = Site::new(&json!({})).start(&users, None).await;
    let _revoked = broker.subscribe(("press-1", PASSWORD), &["-t", "devices/press-1/#"]);
    let stays = broker.subscribe(("press-2", PASSWORD), &["-t", "devices/press-2/#"]);
    let started = Instant::now();
    agent.shard(&users[1..]).await;
    let gone = |log: &str| log.lines().any(|line| line.contains("Client press-1 [") && line.contains("disconnected"));
    wait_until("the end of the session", || gone(&broker.log()));
    println!("from a changed shard to the end of the live session: {:?}", started.elapsed());
    agent.hold(&users[1..]).await;
    assert!(!publish(&broker, "press-1", "1"), "revoked");
    assert!(broker.publish(("press-3", PASSWORD), &["-t", "devices/press-2/desired", "-m", "still here"]).status.success());
    stays.wait_for("still here");
    assert_eq!(broker.log().matches("as press-2 (").count(), 1, "the connection of the other device stayed open");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restarted_broker_is_verified_again() {
    let users = [device("press-1", &[])];
    let (mut broker, mut agent) = Site::new(&json!({})).start(&users, None).await;
    broker.kill();
    wait_until("unreadiness", || agent.readiness.verdict().is_err());
    broker.start_again();
    wait_until("readiness", || agent.readiness.verdict().is_ok());
    // The broker starts with changes that were made while it was down.
    broker.stop();
    let both = [device("press-1", &[]), device("press-2", &[])];
    agent.shard(&both).await;
    wait_until("new files", || agent.metrics.written.get() == 2);
    broker.start_again();
    agent.hold(&both).await;
    assert!(publish(&broker, "press-2", "1"));
}

/// Starts a persistent session of the worker, disconnects it, and queues a message for it.
fn leave_a_queue(broker: &Mosquitto) {
    drop(broker.subscribe(("_ingest_vibration", PASSWORD), &PERSISTENT));
    let left = |log: &str| log.lines().any(|line| line.contains("Client _ingest_vibration [") && line.contains("disconnected"));
    wait_until("the worker's disconnect", || left(&broker.log()));
    assert!(publish(broker, "press-1", "queued"));
}

#[tokio::test(flavor = "multi_thread")]
async fn the_session_of_a_removed_worker_ends_with_its_queue() {
    let users = [device("press-1", &[]), worker()];
    let (broker, mut agent) = Site::new(&json!({})).start(&users, None).await;
    leave_a_queue(&broker);
    // The worker is only disconnected: its queue survives a change of other users.
    agent.hold(&[device("press-1", &[]), device("press-2", &[]), worker()]).await;
    let back = broker.subscribe(("_ingest_vibration", PASSWORD), &PERSISTENT);
    back.wait_for("queued");
    drop(back);
    leave_a_queue(&broker);

    agent.hold(&users[..1]).await;
    wait_until("the end of its session", || agent.metrics.sessions_ended.get() == 1);
    wait_until("files without it", || agent.metrics.verified.get() == agent.metrics.written.get() && agent.metrics.written.get() == 4);
    assert!(!broker.publish(("_ingest_vibration", PASSWORD), &["-t", "x", "-m", "1"]).status.success());
    agent.hold(&users).await;
    let again = broker.subscribe(("_ingest_vibration", PASSWORD), &PERSISTENT);
    assert!(publish(&broker, "press-1", "fresh"));
    again.wait_for("fresh");
    assert!(!again.output().contains("queued"), "the queue of the removed worker still existed");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restarted_agent_ends_the_sessions_of_removed_workers() {
    let users = [device("press-1", &[]), worker()];
    let site = Site::new(&json!({}));
    let (folder, internal_port) = (site.folder.path().to_owned(), site.internal_port);
    let (broker, agent) = site.start(&users, None).await;
    leave_a_queue(&broker);
    drop(agent);
    let mut agent = Agent::start(&folder, internal_port, &[]);
    agent.hold(&users[..1]).await;
    wait_until("the end of its session", || agent.metrics.sessions_ended.get() == 1);
}

/// Tests each durability with its rendered configuration.
#[tokio::test(flavor = "multi_thread")]
async fn acknowledged_messages_survive_as_the_durability_promises() {
    for (durability, survives_kill) in [("Disk", true), ("Process", true), ("Snapshot", false)] {
        let users = [device("press-1", &[]), worker()];
        let (mut broker, agent) = Site::new(&json!({"durability": durability})).start(&users, None).await;
        leave_a_queue(&broker);
        if survives_kill {
            broker.kill();
        } else {
            broker.stop();
        }
        broker.start_again();
        wait_until("readiness", || agent.readiness.verdict().is_ok());
        broker.subscribe(("_ingest_vibration", PASSWORD), &PERSISTENT).wait_for("queued");
    }
}
