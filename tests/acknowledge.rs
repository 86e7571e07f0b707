//! A broker that is killed under load: everything that it has acknowledged is in the queue of a subscriber that is not connected.

#![allow(clippy::unwrap_used, clippy::panic, reason = "helpers of tests fail by panicking")]
#![allow(clippy::print_stdout, reason = "a test that fails says what led there")]

#[path = "acknowledge/clocks.rs"]
mod clocks;
mod common;
#[path = "acknowledge/device.rs"]
mod device;
#[path = "acknowledge/subscriptions.rs"]
mod subscriptions;
#[path = "acknowledge/websocket.rs"]
mod websocket;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use common::free_port;
use common::mosquitto::{Mosquitto, Subscriber, wait_until};
use common::worker::broker_configuration;
use device::{Device, Endpoint};
use rcgen::{CertificateParams, KeyPair};
use rumqttc::mqttbytes::QoS;
use rustls::{ClientConfig, RootCertStore};
use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::PemObject;

/// How often the broker is killed.
const ROUNDS: u32 = 8;

/// Devices that publish at once.
const DEVICES: usize = 4;

/// Acknowledged messages between two kills.
const LOAD: u64 = 3_000;

const LOGIN: (&str, &str) = ("reader", "password");

/// A subscriber that is not connected, and whose session has a queue.
struct Reader {
    name: String,
    session: Vec<String>,
    topic: String,
    level: String,
}

impl Reader {
    fn new(broker: &Mosquitto, number: u32, topic: &str, qos: QoS) -> Self {
        let (name, level) = (format!("reader-{number}"), (qos as u8).to_string());
        let session = ["-i", &name, "-c", "-x", "4294967295", "-t", topic, "-q", &level].map(str::to_owned).to_vec();
        let reader = Self { name, session, topic: topic.to_owned(), level };
        drop(reader.connect(broker));
        reader
    }

    fn connect(&self, broker: &Mosquitto) -> Subscriber {
        let session: Vec<&str> = self.session.iter().map(String::as_str).collect();
        broker.subscribe((&self.name, LOGIN.1), &session)
    }

    /// What its queue holds, and how often.
    fn take_queue(&self, broker: &Mosquitto) -> BTreeMap<String, usize> {
        // Of the same quality: one of QoS 2 is printed when it is released, and would come after a later one of QoS 1.
        assert!(broker.publish(LOGIN, &["-t", &self.topic, "-m", "end", "-q", &self.level]).status.success());
        let queue = self.connect(broker);
        wait_until("the end of the queue", || queue.output().lines().any(|line| line == "end"));
        let mut held = BTreeMap::new();
        for line in queue.output().lines() {
            *held.entry(line.to_owned()).or_insert(0) += 1;
        }
        held
    }
}

/// Lets devices publish, and kills the broker once more than so many messages are acknowledged; gives how many were.
fn load_and_kill(broker: &mut Mosquitto, endpoint: &Endpoint, devices: &mut [Device], topic: &str, load: u64) -> AtomicU64 {
    let (count, killed) = (AtomicU64::new(0), AtomicBool::new(false));
    std::thread::scope(|scope| {
        for device in devices {
            scope.spawn(|| {
                let error = device.work(endpoint, Some(topic), &count).unwrap_err();
                assert!(killed.load(Ordering::Relaxed), "the broker has ended a connection: {error}");
            });
        }
        wait_until("progress", || count.load(Ordering::Relaxed) > load);
        killed.store(true, Ordering::Relaxed);
        broker.kill();
    });
    count
}

/// Kills the broker several times while devices publish, and compares each time what they were told with what the queue holds.
fn check_queue_after_kills((mut broker, endpoint): (Mosquitto, Endpoint), qos: QoS) {
    let mut devices: Vec<Device> = (0..DEVICES).map(|number| Device::new(number, qos)).collect();
    let (mut acknowledged, mut lost, mut doubled) = (0, Vec::new(), 0);
    for round in 0..ROUNDS {
        let topic = format!("load/{round}");
        let reader = Reader::new(&broker, round, &topic, qos);
        let count = load_and_kill(&mut broker, &endpoint, &mut devices, &topic, LOAD);
        broker.start_again();
        // As a device does after a reconnect, it sends again what was not acknowledged.
        let before: BTreeSet<String> = devices.iter().flat_map(|device| device.acknowledged.clone()).collect();
        if qos == QoS::ExactlyOnce {
            for device in &mut devices {
                device.work(&endpoint, None, &count).unwrap();
            }
        } else {
            for device in &mut devices {
                device.sent.clear();
            }
        }
        let held = reader.take_queue(&broker);
        let after: BTreeSet<String> = devices.iter_mut().flat_map(|device| std::mem::take(&mut device.acknowledged)).collect();
        let missing: Vec<String> = after.iter().filter(|message| !held.contains_key(*message)).cloned().collect();
        println!("round {round}: {} of {} are missing", missing.len(), after.len());
        assert!(before.len() > usize::try_from(LOAD).unwrap());
        acknowledged += after.len();
        lost.extend(missing);
        doubled += held.values().filter(|times| **times > 1).count();
    }
    assert!(lost.is_empty(), "{} of {acknowledged} acknowledged messages are lost: {lost:?}", lost.len());
    assert!(qos != QoS::ExactlyOnce || doubled == 0, "{doubled} messages of QoS 2 are there twice");
}

fn broker() -> (Mosquitto, Endpoint) {
    let broker = common::worker::broker();
    let endpoint = Endpoint::plain(broker.port);
    (broker, endpoint)
}

/// With one more listener, which has TLS, and speaks WebSockets if `websocket`.
fn broker_with_listener(tls: bool, websocket: bool) -> (Mosquitto, Endpoint) {
    let (folder, port, second_port) = (tempfile::tempdir().unwrap(), free_port(), free_port());
    let key = KeyPair::generate().unwrap();
    let certificate = CertificateParams::new(vec!["127.0.0.1".to_owned()]).unwrap().self_signed(&key).unwrap().pem();
    let file = |name: &str| folder.path().join(name).display().to_string();
    std::fs::write(file("certificate"), &certificate).unwrap();
    std::fs::write(file("key"), key.serialize_pem()).unwrap();
    let mut listener = format!("listener {second_port} 127.0.0.1\n");
    if websocket {
        listener += "protocol websockets\n";
    }
    if tls {
        writeln!(listener, "certfile {}\nkeyfile {}", file("certificate"), file("key")).unwrap();
    }
    let configuration = broker_configuration(folder.path(), port) + &listener;
    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from_pem_slice(certificate.as_bytes()).unwrap()).unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let client = ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions().unwrap();
    let client = client.with_root_certificates(roots).with_no_client_auth();
    let endpoint = Endpoint { port: second_port, tls: tls.then(|| Arc::new(client)), websocket };
    (Mosquitto::start(folder, &configuration, port), endpoint)
}

#[test]
fn a_killed_broker_keeps_what_it_has_acknowledged() {
    check_queue_after_kills(broker(), QoS::AtLeastOnce);
}

#[test]
fn a_killed_broker_keeps_what_it_has_acknowledged_over_tls() {
    check_queue_after_kills(broker_with_listener(true, false), QoS::AtLeastOnce);
}

#[test]
fn a_killed_broker_keeps_what_it_has_acknowledged_over_websockets() {
    check_queue_after_kills(broker_with_listener(false, true), QoS::AtLeastOnce);
}

#[test]
fn a_killed_broker_keeps_what_it_has_acknowledged_over_websockets_with_tls() {
    check_queue_after_kills(broker_with_listener(true, true), QoS::AtLeastOnce);
}

#[test]
fn a_killed_broker_keeps_messages_of_qos_2_exactly_once() {
    check_queue_after_kills(broker(), QoS::ExactlyOnce);
}

#[test]
fn a_killed_broker_keeps_messages_of_qos_2_exactly_once_over_websockets() {
    check_queue_after_kills(broker_with_listener(false, true), QoS::ExactlyOnce);
}

#[test]
fn a_device_that_is_disconnected_right_after_its_message_gets_no_acknowledgement() {
    for (broker, endpoint) in [broker(), broker_with_listener(false, true)] {
        for (number, qos) in [(0, QoS::AtLeastOnce), (1, QoS::ExactlyOnce)] {
            let topic = format!("load/{number}");
            let reader = Reader::new(&broker, number, &topic, qos);
            let mut device = Device::new(DEVICES, qos);
            assert_eq!(device.provoke_disconnect(&endpoint, &topic), [], "neither an acknowledgement nor a DISCONNECT");
            let message = device.sent[&1].clone();
            device.work(&endpoint, None, &AtomicU64::new(0)).unwrap();
            let times = reader.take_queue(&broker).get(&message).copied().unwrap_or_default();
            assert!(times == 1 || qos == QoS::AtLeastOnce && times > 1, "{times} times at {qos:?}");
        }
    }
}
