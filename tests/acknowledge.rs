//! A broker that is killed in mid-load: whatever it has acknowledged by then is in the queue of a subscriber that is away.

#![allow(clippy::unwrap_used, clippy::panic, reason = "helpers of tests fail by panicking")]
#![allow(clippy::print_stdout, reason = "a test that fails says what led there")]

#[path = "acknowledge/clocks.rs"]
mod clocks;
mod common;
#[path = "acknowledge/device.rs"]
mod device;
#[path = "acknowledge/subscriptions.rs"]
mod subscriptions;

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use common::mosquitto::{Mosquitto, Subscriber, wait_until};
use common::worker::broker_configuration;
use common::{free_port, parts};
use device::{Device, Door};
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

/// One that has subscribed, and is away.
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
fn load_and_kill(broker: &mut Mosquitto, door: &Door, devices: &mut [Device], topic: &str, load: u64) -> AtomicU64 {
    let (count, killed) = (AtomicU64::new(0), AtomicBool::new(false));
    std::thread::scope(|scope| {
        for device in devices {
            scope.spawn(|| {
                let error = device.work(door, Some(topic), &count).unwrap_err();
                assert!(killed.load(Ordering::Relaxed), "the broker has ended a connection: {error}");
            });
        }
        wait_until("progress", || count.load(Ordering::Relaxed) > load);
        killed.store(true, Ordering::Relaxed);
        broker.kill();
    });
    count
}

/// Kills the broker again and again while devices publish, and looks each time what its queue holds afterwards.
fn judge((mut broker, door): (Mosquitto, Door), qos: QoS) {
    let mut devices: Vec<Device> = (0..DEVICES).map(|number| Device::new(number, qos)).collect();
    let (mut acknowledged, mut lost, mut doubled) = (0, Vec::new(), 0);
    for round in 0..ROUNDS {
        let topic = format!("load/{round}");
        let reader = Reader::new(&broker, round, &topic, qos);
        let count = load_and_kill(&mut broker, &door, &mut devices, &topic, LOAD);
        broker.start_again();
        // As a device does whose broker is back: what it was not told of, it sends again.
        let before: BTreeSet<String> = devices.iter().flat_map(|device| device.acknowledged.clone()).collect();
        if qos == QoS::ExactlyOnce {
            for device in &mut devices {
                device.work(&door, None, &count).unwrap();
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

fn broker() -> (Mosquitto, Door) {
    let broker = common::worker::broker();
    let door = Door { port: broker.port, tls: None };
    (broker, door)
}

fn broker_with_tls() -> (Mosquitto, Door) {
    let (folder, port, tls_port) = (tempfile::tempdir().unwrap(), free_port(), free_port());
    let key = KeyPair::generate().unwrap();
    let certificate = CertificateParams::new(vec!["127.0.0.1".to_owned()]).unwrap().self_signed(&key).unwrap().pem();
    let file = |name: &str| folder.path().join(name).display().to_string();
    std::fs::write(file("certificate"), &certificate).unwrap();
    std::fs::write(file("key"), key.serialize_pem()).unwrap();
    let tls = format!("listener {tls_port} 127.0.0.1\ncertfile {}\nkeyfile {}\n", file("certificate"), file("key"));
    let configuration = broker_configuration(folder.path(), port) + &tls;
    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from_pem_slice(certificate.as_bytes()).unwrap()).unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let client = ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions().unwrap();
    let client = client.with_root_certificates(roots).with_no_client_auth();
    (Mosquitto::start(folder, &configuration, port), Door { port: tls_port, tls: Some(Arc::new(client)) })
}

#[test]
fn a_killed_broker_keeps_what_it_has_acknowledged() {
    judge(broker(), QoS::AtLeastOnce);
}

#[test]
fn a_killed_broker_keeps_what_it_has_acknowledged_over_tls() {
    judge(broker_with_tls(), QoS::AtLeastOnce);
}

#[test]
fn a_killed_broker_keeps_exactly_once_what_it_has_acknowledged_so() {
    judge(broker(), QoS::ExactlyOnce);
}

#[test]
fn a_device_that_is_thrown_out_in_the_turn_of_its_message_is_told_nothing_and_sends_it_again() {
    let (broker, door) = broker();
    for (number, qos) in [(0, QoS::AtLeastOnce), (1, QoS::ExactlyOnce)] {
        let topic = format!("load/{number}");
        let reader = Reader::new(&broker, number, &topic, qos);
        let mut device = Device::new(DEVICES, qos);
        assert_eq!(device.be_thrown_out(&door, &topic), [], "neither an acknowledgement nor a reason");
        let message = device.sent[&1].clone();
        device.work(&door, None, &AtomicU64::new(0)).unwrap();
        let times = reader.take_queue(&broker).get(&message).copied().unwrap_or_default();
        assert!(times == 1 || qos == QoS::AtLeastOnce && times > 1, "{times} times at {qos:?}");
    }
}

#[test]
fn without_being_preloaded_the_plugin_keeps_the_broker_from_starting() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("mosquitto.conf");
    std::fs::write(&file, broker_configuration(folder.path(), free_port())).unwrap();
    let log = File::create(folder.path().join("log")).unwrap();
    let mut command = Command::new(parts());
    command.args(["mosquitto", "-c"]).arg(file).env("PARTS_PRELOAD", "").stdout(log.try_clone().unwrap()).stderr(log);
    let mut process = command.spawn().unwrap();
    let read = || std::fs::read_to_string(folder.path().join("log")).unwrap();
    let mut status = None;
    wait_until("an answer", || {
        status = process.try_wait().unwrap();
        status.is_some() || read().contains(" running\n")
    });
    let _ = process.kill();
    assert!(status.is_some_and(|status| !status.success()), "{}", read());
    assert!(read().contains("acknowledge: expected this very file in LD_PRELOAD"), "{}", read());
}
