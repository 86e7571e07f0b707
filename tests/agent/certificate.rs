//! Devices that connect by certificate: keys and requests by OpenSSL, certificates by the operator's code, clients that are not ours.

use std::process::Command;

use fleetwright::broker::credential::KeyDigest;
use fleetwright::certificate::client::ClientAuthority;
use fleetwright::certificate::request::SigningRequest;
use jiff::{SignedDuration, Timestamp};
use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, KeyPair, PublicKeyData};

use super::*;
use crate::common::mosquitto::{Subscriber, publish_bare};

/// Listeners of the site, by their place in its ports.
const PASSWORDS: usize = 0;
const CERTIFICATES: usize = 1;
const BOTH: usize = 2;

/// A client CA, as a user would make one.
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

/// A machine with a private key that it made itself.
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

    /// The machine gets a certificate with this name.
    fn certified(&self, ca: &Ca, name: &str, validity: SignedDuration) {
        let issued = ca.authority.issue(name, &self.request, validity, Timestamp::now()).unwrap();
        std::fs::write(self.folder.path().join("certificate"), issued.pem).unwrap();
    }

    /// What a client of Mosquitto's needs to present it.
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

    /// Whether a session of this client, once begun, has ended.
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
async fn a_certificate_alone_says_who_a_device_is() {
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
        // Whatever it says of itself; and nothing but its own topics.
        assert!(plant.publishes(machine, CERTIFICATES, &["-i", "watcher", "-u", "watcher", "-P", "x", "-t", &topic, "-m", name]));
        watcher.wait_for(&format!("{topic} {name}"));
        plant.publishes(machine, CERTIFICATES, &["-t", "devices/press-9/telemetry", "-m", "forged"]);
        assert!(!plant.publishes(machine, PASSWORDS, &["-t", &topic, "-m", "x"]), "there it has no password");
    }
    assert!(!watcher.output().contains("forged"));
    assert!(plant.broker.log().contains("as press-1 (p5, c1, k60, u'press-1')."), "presence knows the device by its name");
    assert!(!plant.has_ended("watcher"), "nobody took over the session of another");
}

#[tokio::test(flavor = "multi_thread")]
async fn only_the_key_that_a_device_asked_for_is_accepted() {
    let (own, stolen) = (Machine::elliptic(), Machine::elliptic());
    let plant = Plant::new(&[by_certificate("press-1", &own)], Ca::new()).await;
    let publish = ["-t", "devices/press-1/telemetry", "-m", "1"];
    own.certified(&plant.ca, "press-1", day());
    assert!(plant.publishes(&own, CERTIFICATES, &publish));
    // Signed by the right authority, for the right name, but of another key.
    stolen.certified(&plant.ca, "press-1", day());
    assert!(!plant.publishes(&stolen, CERTIFICATES, &publish));
    // Of the right key, under the name of another, or of nobody.
    own.certified(&plant.ca, "press-2", day());
    assert!(!plant.publishes(&own, CERTIFICATES, &publish));
    // By an authority of the same name that nobody trusts.
    own.certified(&Ca::new(), "press-1", day());
    assert!(!plant.publishes(&own, CERTIFICATES, &publish));
    // A password opens no listener for certificates.
    let (trust, port) = (plant.trust.path().display().to_string(), plant.ports[CERTIFICATES].to_string());
    let without = ["-p", &port, "--cafile", &trust, "-u", "press-1", "-P", PASSWORD, "-t", "devices/press-1/telemetry", "-m", "1"];
    assert!(!publish_bare(&without).status.success());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_revoked_certificate_ends_its_live_session_and_no_other() {
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
    wait_until("the leave of press-4", || plant.has_ended("press-4"));

    // One is disabled or deleted; one has another key from now on; one is away, and one is there.
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
    assert_eq!(plant.broker.log().matches("as press-3 (").count(), 1, "its connection was left alone");
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
    wait_until("the end of its time", || Instant::now() > end);
    assert!(!plant.publishes(&machine, CERTIFICATES, &publish), "expired");
    // The session that it opened goes with the next reload.
    plant.agent.hold(&[by_certificate("press-1", &machine), device("press-2", &[])]).await;
    wait_until("the end of the session", || plant.has_ended("press-1"));
    machine.certified(&plant.ca, "press-1", day());
    assert!(plant.publishes(&machine, CERTIFICATES, &publish));
    assert_eq!(plant.agent.metrics.reloads.get(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn where_both_are_asked_for_both_have_to_be_of_the_same_device() {
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
    // Either of them on a listener that asks for one of them.
    assert!(publishes(&machines[0], CERTIFICATES, &[]));
    let (trust, port) = (plant.trust.path().display().to_string(), plant.ports[PASSWORDS].to_string());
    let password = ["-p", &port, "--cafile", &trust, "-u", "press-1", "-P", PASSWORD, "-t", "devices/press-1/telemetry", "-m", "1"];
    assert!(publish_bare(&password).status.success());
}

#[tokio::test(flavor = "multi_thread")]
async fn what_the_agent_tries_out_counts_as_no_refused_client() {
    let machine = Machine::elliptic();
    let mut plant = Plant::new(&[by_certificate("press-1", &machine)], Ca::new()).await;
    // Each listener is looked at with each kind of key, has only one of them, and two of them ask for a certificate.
    tokio::time::timeout(PATIENCE, plant.agent.presented.wait_for(Option::is_some)).await.expect("a handshake").unwrap();
    let refusals = |log: &str| log.lines().filter(|line| line.contains("[127.0.0.1:") && line.contains("rotocol error")).count();
    wait_until("refused handshakes in the log", || refusals(&plant.broker.log()) >= 3);
    let stranger = Machine::elliptic();
    stranger.certified(&Ca::new(), "press-1", day());
    assert!(!plant.publishes(&stranger, CERTIFICATES, &["-t", "devices/press-1/telemetry", "-m", "1"]));
    // Whoever only opens the port, as the test did to see whether the broker listens, is not refused either.
    wait_until("the stranger's refusal", || plant.agent.refused() > 0.0);
    assert!((plant.agent.refused() - 1.0).abs() < f64::EPSILON, "{} refused; {}", plant.agent.refused(), plant.broker.log());
}
