//! Devices that connect with certificates: keys and requests by OpenSSL, certificates by the operator's code, third-party clients.

use std::process::Command;

use fleetwright::broker::credential::KeyDigest;
use fleetwright::certificate::client::ClientAuthority;
use fleetwright::certificate::request::SigningRequest;
use jiff::{SignedDuration, Timestamp};
use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, KeyPair, PublicKeyData};

use super::*;
use crate::common::mosquitto::{Subscriber, publish_bare};

/// Listeners of the site, by their index in its ports.
const PASSWORDS: usize = 0;
const CERTIFICATES: usize = 1;
const BOTH: usize = 2;

/// A client CA of a user.
struct Ca {
    certificate: String,
    authority: ClientAuthority,
}

impl Ca {
    fn new() -> Self {
        let key = KeyPair::generate().unwrap();
        let mut parameters = CertificateParams::default();
        parameters.distinguished_name.push(DnType::CommonName, "devices of plant 1");
        parameters.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let certificate = parameters.self_signed(&key).unwrap().pem();
        let authority = ClientAuthority::parse(certificate.as_bytes(), key.serialize_pem().as_bytes(), None, Timestamp::now()).unwrap();
        Self { certificate, authority }
    }
}

/// A machine with a private key that it generated.
struct Machine {
    folder: TempDir,
    request: SigningRequest,
}

impl Machine {
    fn new(kind: &[&str]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let mut command = Command::new("openssl");
        command.args(["req", "-new", "-nodes", "-subj", "/CN=whatever", "-keyout", "key", "-out", "request"]).args(kind);
        assert!(command.current_dir(folder.path()).output().unwrap().status.success());
        let request = std::fs::read_to_string(folder.path().join("request")).unwrap();
        Self { folder, request: SigningRequest::parse(&request).unwrap() }
    }

    fn elliptic() -> Self {
        Self::new(&["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"])
    }

    fn digest(&self) -> KeyDigest {
        KeyDigest::of(&self.request.key().subject_public_key_info())
    }

    /// Issues a certificate with this name to the machine.
    fn certified(&self, ca: &Ca, name: &str, validity: SignedDuration) {
        let issued = ca.authority.issue(name, &self.request, validity, Timestamp::now()).unwrap();
        std::fs::write(self.folder.path().join("certificate"), issued.pem).unwrap();
    }

    /// The arguments with which Mosquitto's clients present the certificate.
    fn arguments(&self, trust: &Path, port: u16) -> Vec<String> {
        let file = |name: &str| self.folder.path().join(name).display().to_string();
        let trust = trust.display().to_string();
        ["-p", &port.to_string(), "--cafile", &trust, "--cert", &file("certificate"), "--key", &file("key")].map(str::to_owned).into()
    }
}

/// A site with a listener for passwords, one for certificates, and one for both.
struct Plant {
    ca: Ca,
    trust: tempfile::NamedTempFile,
    ports: Vec<u16>,
    broker: Mosquitto,
    agent: Agent,
}

impl Plant {
    async fn new(users: &[Entry], ca: Ca) -> Self {
        let tls = |authentication: &str| json!({"secretName": TLS_SECRET, "authentication": authentication});
        let site = Site::trusting(
            &json!({
                "listeners": [
                    {"name": "passwords", "port": 8883, "tls": tls("Password")},
                    {"name": "certificates", "port": 8884, "tls": tls("Certificate")},
                    {"name": "both", "port": 8885, "tls": tls("CertificateAndPassword")},
                ],
                "clientAuthority": {"secretName": "devices-ca"}
            }),
            Some(&ca.certificate),
        );
        let ports = site.ports.clone();
        let certificate = renewal::certificate();
        let trust = renewal::trust(&certificate);
        let (broker, agent) = site.start(users, Some(certificate)).await;
        Self { ca, trust, ports, broker, agent }
    }

    fn arguments(&self, machine: &Machine, listener: usize, more: &[&str]) -> Vec<String> {
        let mut arguments = machine.arguments(self.trust.path(), self.ports[listener]);
        arguments.extend(more.iter().map(|argument| (*argument).to_owned()));
        arguments
    }

    fn publishes(&self, machine: &Machine, listener: usize, more: &[&str]) -> bool {
        let arguments = self.arguments(machine, listener, more);
        publish_bare(&arguments.iter().map(String::as_str).collect::<Vec<_>>()).status.success()
    }

    fn subscribes(&self, machine: &Machine, listener: usize, client: &str, more: &[&str]) -> Subscriber {
        let arguments = self.arguments(machine, listener, more);
        self.broker.subscribe_bare(client, &arguments.iter().map(String::as_str).collect::<Vec<_>>())
    }

    /// Whether a session of this client has started and ended.
    fn has_ended(&self, client: &str) -> bool {
        let begins = format!("Client {client} [");
        self.broker.log().lines().any(|line| line.contains(&begins) && line.contains("disconnected"))
    }
}

fn by_certificate(name: &str, machine: &Machine) -> Entry {
    Entry::by_certificate(name, machine.digest(), &[]).unwrap()
}

fn day() -> SignedDuration {
    SignedDuration::from_hours(24)
}

#[tokio::test(flavor = "multi_thread")]
async fn the_certificate_determines_user_name_and_client_identifier() {
    let kinds: [(&str, &[&str]); 3] = [
        ("press-1", &["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"]),
        ("press-2", &["-newkey", "rsa:2048"]),
        ("press-3", &["-newkey", "ed25519"]),
    ];
    let machines = kinds.map(|(name, kind)| (name, Machine::new(kind)));
    let mut users: Vec<Entry> = machines.iter().map(|(name, machine)| by_certificate(name, machine)).collect();
    users.push(device("watcher", &[("devices/+/telemetry", Access::Read)]));
    let plant = Plant::new(&users, Ca::new()).await;
    let trust = plant.trust.path().display().to_string();
    let port = plant.ports[PASSWORDS].to_string();
    let watcher = ["-p", &port, "--cafile", &trust, "-u", "watcher", "-P", PASSWORD, "-t", "devices/+/telemetry", "-v"];
    let watcher = plant.broker.subscribe_bare("watcher", &watcher);
    for (name, machine) in &machines {
        machine.certified(&plant.ca, name, day());
        let topic = format!("devices/{name}/telemetry");
        // The broker ignores the name that the client sends, and permits only the device's own topics.
        assert!(plant.publishes(machine, CERTIFICATES, &["-i", "watcher", "-u", "watcher", "-P", "x", "-t", &topic, "-m", name]));
        watcher.wait_for(&format!("{topic} {name}"));
        plant.publishes(machine, CERTIFICATES, &["-t", "devices/press-9/telemetry", "-m", "forged"]);
        assert!(!plant.publishes(machine, PASSWORDS, &["-t", &topic, "-m", "x"]), "it has no password");
    }
    assert!(!watcher.output().contains("forged"));
    assert!(plant.broker.log().contains("as press-1 (p5, c1, k60, u'press-1')."), "the log has the name of the device");
    assert!(!plant.has_ended("watcher"), "no device took over the session of another");
}

#[tokio::test(flavor = "multi_thread")]
async fn only_a_certificate_with_the_declared_key_is_accepted() {
    let (own, stolen) = (Machine::elliptic(), Machine::elliptic());
    let plant = Plant::new(&[by_certificate("press-1", &own)], Ca::new()).await;
    let publish = ["-t", "devices/press-1/telemetry", "-m", "1"];
    own.certified(&plant.ca, "press-1", day());
    assert!(plant.publishes(&own, CERTIFICATES, &publish));
    // The right authority and name with another key.
    stolen.certified(&plant.ca, "press-1", day());
    assert!(!plant.publishes(&stolen, CERTIFICATES, &publish));
    // The right key with the name of another device.
    own.certified(&plant.ca, "press-2", day());
    assert!(!plant.publishes(&own, CERTIFICATES, &publish));
    // An untrusted authority with the same name.
    own.certified(&Ca::new(), "press-1", day());
    assert!(!plant.publishes(&own, CERTIFICATES, &publish));
    // A listener for certificates accepts no password.
    let (trust, port) = (plant.trust.path().display().to_string(), plant.ports[CERTIFICATES].to_string());
    let without = ["-p", &port, "--cafile", &trust, "-u", "press-1", "-P", PASSWORD, "-t", "devices/press-1/telemetry", "-m", "1"];
    assert!(!publish_bare(&without).status.success());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_revoked_certificate_ends_only_its_own_session() {
    let (revoked, replaced, stays, away) = (Machine::elliptic(), Machine::elliptic(), Machine::elliptic(), Machine::elliptic());
    let machines = [("press-1", &revoked), ("press-2", &replaced), ("press-3", &stays), ("press-4", &away)];
    let users = machines.map(|(name, machine)| by_certificate(name, machine));
    let mut plant = Plant::new(&users, Ca::new()).await;
    for (name, machine) in machines {
        machine.certified(&plant.ca, name, day());
    }
    let subscribe = |name: &str, machine: &Machine| plant.subscribes(machine, CERTIFICATES, name, &["-t", &format!("devices/{name}/#")]);
    let _sessions = (subscribe("press-1", &revoked), subscribe("press-2", &replaced));
    let staying = subscribe("press-3", &stays);
    let persistent = ["-i", "x", "-c", "-x", "4294967295", "-t", "devices/press-4/#"];
    drop(plant.subscribes(&away, CERTIFICATES, "press-4", &persistent));
    wait_until("the disconnect of press-4", || plant.has_ended("press-4"));

    // press-1 is deleted, press-2 gets another key, press-3 stays connected, press-4 is offline.
    let new = Machine::elliptic();
    let after =
        [by_certificate("press-2", &new), users[2].clone(), users[3].clone(), device("press-5", &[("devices/+/desired", Access::Write)])];
    let started = Instant::now();
    plant.agent.shard(&after).await;
    wait_until("the end of both sessions", || plant.has_ended("press-1") && plant.has_ended("press-2"));
    let took = started.elapsed();
    println!("from a changed shard to the end of the live sessions: {took:?}");
    assert!(took < Duration::from_secs(1), "{took:?}");
    plant.agent.hold(&after).await;
    for (name, machine) in [("press-1", &revoked), ("press-2", &replaced)] {
        assert!(!plant.publishes(machine, CERTIFICATES, &["-t", &format!("devices/{name}/telemetry"), "-m", "1"]), "{name}");
    }
    new.certified(&plant.ca, "press-2", day());
    assert!(plant.publishes(&new, CERTIFICATES, &["-t", "devices/press-2/telemetry", "-m", "1"]));

    let (trust, port) = (plant.trust.path().display().to_string(), plant.ports[PASSWORDS].to_string());
    for (name, message) in [("press-3", "still here"), ("press-4", "queued")] {
        let topic = format!("devices/{name}/desired");
        let publish = ["-p", &port, "--cafile", &trust, "-u", "press-5", "-P", PASSWORD, "-t", &topic, "-m", message];
        assert!(publish_bare(&publish).status.success());
    }
    staying.wait_for("still here");
    assert_eq!(plant.broker.log().matches("as press-3 (").count(), 1, "its connection stayed open");
    plant.subscribes(&away, CERTIFICATES, "press-4", &persistent).wait_for("queued");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_renewed_certificate_needs_no_change_of_the_broker_and_an_expired_one_is_refused() {
    let machine = Machine::elliptic();
    let mut plant = Plant::new(&[by_certificate("press-1", &machine)], Ca::new()).await;
    let publish = ["-t", "devices/press-1/telemetry", "-m", "1"];
    machine.certified(&plant.ca, "press-1", SignedDuration::from_secs(5));
    let _session = plant.subscribes(&machine, CERTIFICATES, "press-1", &["-t", "devices/press-1/#"]);
    let end = Instant::now() + Duration::from_secs(5);
    wait_until("its expiry", || Instant::now() > end);
    assert!(!plant.publishes(&machine, CERTIFICATES, &publish), "expired");
    // The next reload ends the session that it opened.
    plant.agent.hold(&[by_certificate("press-1", &machine), device("press-2", &[])]).await;
    wait_until("the end of the session", || plant.has_ended("press-1"));
    machine.certified(&plant.ca, "press-1", day());
    assert!(plant.publishes(&machine, CERTIFICATES, &publish));
    assert_eq!(plant.agent.metrics.reloads.get(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn certificate_and_password_must_belong_to_the_same_device() {
    let machines = [Machine::elliptic(), Machine::elliptic()];
    let with_both = |name: &str, machine: &Machine| device(name, &[]).with_certificate_key(machine.digest());
    let users = [with_both("press-1", &machines[0]), with_both("press-2", &machines[1])];
    let plant = Plant::new(&users, Ca::new()).await;
    machines[0].certified(&plant.ca, "press-1", day());
    machines[1].certified(&plant.ca, "press-2", day());
    let publishes = |machine: &Machine, listener, login: &[&str]| {
        plant.publishes(machine, listener, &[login, &["-t", "devices/press-1/telemetry", "-m", "1"]].concat())
    };
    let own = ["-u", "press-1", "-P", PASSWORD];
    assert!(publishes(&machines[0], BOTH, &own));
    assert!(!publishes(&machines[1], BOTH, &own), "the certificate of another device");
    assert!(!publishes(&machines[0], BOTH, &["-u", "press-2", "-P", PASSWORD]), "the password of another device");
    assert!(!publishes(&machines[0], BOTH, &["-u", "press-1", "-P", "wrong"]));
    assert!(!publishes(&machines[0], BOTH, &[]), "no password");
    // Each is sufficient on a listener that requires only this one.
    assert!(publishes(&machines[0], CERTIFICATES, &[]));
    let (trust, port) = (plant.trust.path().display().to_string(), plant.ports[PASSWORDS].to_string());
    let password = ["-p", &port, "--cafile", &trust, "-u", "press-1", "-P", PASSWORD, "-t", "devices/press-1/telemetry", "-m", "1"];
    assert!(publish_bare(&password).status.success());
}

#[tokio::test(flavor = "multi_thread")]
async fn handshakes_of_the_agent_do_not_count_as_refused_clients() {
    let machine = Machine::elliptic();
    let mut plant = Plant::new(&[by_certificate("press-1", &machine)], Ca::new()).await;
    // The agent tests each listener with each kind of key. Each listener has only one of them, and two require a certificate.
    tokio::time::timeout(PATIENCE, plant.agent.presented.wait_for(Option::is_some)).await.expect("a handshake").unwrap();
    let refusals = |log: &str| log.lines().filter(|line| line.contains("[127.0.0.1:") && line.contains("rotocol error")).count();
    wait_until("refused handshakes in the log", || refusals(&plant.broker.log()) >= 3);
    let stranger = Machine::elliptic();
    stranger.certified(&Ca::new(), "press-1", day());
    assert!(!plant.publishes(&stranger, CERTIFICATES, &["-t", "devices/press-1/telemetry", "-m", "1"]));
    // A client that only opens the port, as the start of this test did, does not count either.
    wait_until("the stranger's refusal", || plant.agent.refused() > 0.0);
    assert!((plant.agent.refused() - 1.0).abs() < f64::EPSILON, "{} refused; {}", plant.agent.refused(), plant.broker.log());
}
