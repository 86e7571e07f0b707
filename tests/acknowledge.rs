//! A broker that is killed in mid-load: whatever it has acknowledged by then is in the queue of a subscriber that is away.

#![allow(clippy::unwrap_used, clippy::panic, reason = "helpers of tests fail by panicking")]
#![allow(clippy::print_stdout, reason = "a test that fails says what led there")]

mod common;

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::{ErrorKind, Read, Write};
use std::net::{Ipv4Addr, TcpStream};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use bytes::BytesMut;
use common::mosquitto::{Mosquitto, PATIENCE, wait_until};
use common::worker::broker_configuration;
use common::{free_port, parts};
use rcgen::{CertificateParams, KeyPair};
use rumqttc::mqttbytes::QoS;
use rumqttc::mqttbytes::v5::{Connect, ConnectAuth, ConnectProperties, ConnectReturnCode, Packet, PubAck, PubComp, PubRel, Publish};
use rustls::{ClientConfig, ClientConnection, RootCertStore, StreamOwned};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, ServerName};

/// How often the broker is killed.
const ROUNDS: u32 = 8;

/// Devices that publish at once.
const DEVICES: usize = 4;

/// Messages of a device that are not acknowledged.
const WINDOW: usize = 200;

/// Acknowledged messages between two kills.
const LOAD: u64 = 3_000;

const LOGIN: (&str, &str) = ("reader", "password");

trait Stream: Read + Write {}
impl<T: Read + Write> Stream for T {}

/// Where devices connect to.
struct Door {
    port: u16,
    tls: Option<Arc<ClientConfig>>,
}

impl Door {
    fn connect(&self) -> std::io::Result<Box<dyn Stream>> {
        let socket = TcpStream::connect((Ipv4Addr::LOCALHOST, self.port))?;
        socket.set_read_timeout(Some(PATIENCE))?;
        let Some(tls) = &self.tls else { return Ok(Box::new(socket)) };
        let name = ServerName::from(std::net::IpAddr::from(Ipv4Addr::LOCALHOST));
        Ok(Box::new(StreamOwned::new(ClientConnection::new(Arc::clone(tls), name).unwrap(), socket)))
    }
}

/// A device with a session, which knows what of its messages is acknowledged and sends the rest again.
struct Device {
    name: String,
    qos: QoS,
    next: u64,
    /// Messages by packet identifier: those that the broker has not answered, and of QoS 2 those that it has received.
    sent: BTreeMap<u16, String>,
    received: BTreeMap<u16, String>,
    acknowledged: BTreeSet<String>,
}

impl Device {
    fn new(number: usize, qos: QoS) -> Self {
        let name = format!("press-{number}");
        Self { name, qos, next: 0, sent: BTreeMap::new(), received: BTreeMap::new(), acknowledged: BTreeSet::new() }
    }

    /// Publishes until the connection ends. Without a topic it sends nothing new, and goes once all is acknowledged.
    fn work(&mut self, door: &Door, topic: Option<&str>, count: &AtomicU64) -> std::io::Result<()> {
        let mut stream = door.connect()?;
        let (mut input, mut output, mut chunk) = (BytesMut::new(), BytesMut::new(), [0; 8192]);
        let properties = ConnectProperties { session_expiry_interval: Some(600), ..ConnectProperties::new() };
        let connect = Connect { keep_alive: 60, client_id: self.name.clone(), clean_start: false, properties: Some(properties) };
        Packet::Connect(connect, None, ConnectAuth::None).write(&mut output, None).unwrap();
        stream.write_all(&output)?;
        output.clear();
        loop {
            match Packet::read(&mut input, None) {
                Ok(packet) => {
                    self.take(packet, &mut output, count);
                    if let Some(topic) = topic {
                        self.fill(topic, &mut output);
                    }
                    continue;
                }
                Err(rumqttc::mqttbytes::Error::InsufficientBytes(_)) => {}
                Err(error) => panic!("{error}"),
            }
            // What the broker said before it was killed can still be read when nothing can be written any more.
            let _ = stream.write_all(&output);
            output.clear();
            if topic.is_none() && self.sent.is_empty() && self.received.is_empty() {
                return Ok(());
            }
            let read = stream.read(&mut chunk)?;
            if read == 0 {
                return Err(ErrorKind::UnexpectedEof.into());
            }
            input.extend_from_slice(&chunk[..read]);
        }
    }

    fn take(&mut self, packet: Packet, output: &mut BytesMut, count: &AtomicU64) {
        match packet {
            Packet::ConnAck(answer) => {
                assert_eq!(answer.code, ConnectReturnCode::Success);
                for id in self.received.keys() {
                    PubRel::new(*id, None).write(output).unwrap();
                }
                let again: Vec<_> = self.sent.iter().map(|(id, message)| (*id, message.clone())).collect();
                for (id, message) in again {
                    self.publish(id, message, true, output);
                }
            }
            Packet::PubRec(answer) => {
                if let Some(message) = self.sent.remove(&answer.pkid) {
                    self.received.insert(answer.pkid, message);
                    PubRel::new(answer.pkid, None).write(output).unwrap();
                }
            }
            Packet::PubAck(PubAck { pkid, .. }) | Packet::PubComp(PubComp { pkid, .. }) => self.complete(pkid, count),
            other => panic!("{other:?}"),
        }
    }

    fn complete(&mut self, id: u16, count: &AtomicU64) {
        if let Some(message) = self.sent.remove(&id).or_else(|| self.received.remove(&id)) {
            self.acknowledged.insert(message);
            count.fetch_add(1, Ordering::Relaxed);
        }
    }

    fn fill(&mut self, topic: &str, output: &mut BytesMut) {
        while self.sent.len() + self.received.len() < WINDOW {
            let free = (1..=u16::MAX).find(|id| !self.sent.contains_key(id) && !self.received.contains_key(id)).unwrap();
            self.publish(free, format!("{topic} {} {}", self.name, self.next), false, output);
            self.next += 1;
        }
    }

    /// A message begins with its topic.
    fn publish(&mut self, id: u16, message: String, again: bool, output: &mut BytesMut) {
        let mut publish = Publish::new(message.split(' ').next().unwrap(), self.qos, message.clone(), None);
        publish.pkid = id;
        publish.dup = again;
        publish.write(output).unwrap();
        self.sent.insert(id, message);
    }
}

/// Kills the broker again and again while devices publish, and looks each time what its queue holds afterwards.
fn judge((mut broker, door): (Mosquitto, Door), qos: QoS) {
    let mut devices: Vec<Device> = (0..DEVICES).map(|number| Device::new(number, qos)).collect();
    let level = (qos as u8).to_string();
    let (mut acknowledged, mut lost, mut doubled) = (0, Vec::new(), 0);
    for round in 0..ROUNDS {
        let topic = format!("load/{round}");
        let reader = format!("reader-{round}");
        let session = ["-i", &reader, "-c", "-x", "4294967295", "-t", &topic, "-q", &level];
        drop(broker.subscribe((&reader, LOGIN.1), &session));
        let count = AtomicU64::new(0);
        std::thread::scope(|scope| {
            for device in &mut devices {
                scope.spawn(|| device.work(&door, Some(&topic), &count).unwrap_err());
            }
            wait_until("progress", || count.load(Ordering::Relaxed) > LOAD);
            broker.kill();
        });
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
        // Of the same quality: one of QoS 2 is printed when it is released, and would come after a later one of QoS 1.
        assert!(broker.publish(LOGIN, &["-t", &topic, "-m", "end", "-q", &level]).status.success());
        let queue = broker.subscribe((&reader, LOGIN.1), &session);
        wait_until("the end of the queue", || queue.output().lines().any(|line| line == "end"));
        let mut held = BTreeMap::new();
        for line in queue.output().lines() {
            *held.entry(line.to_owned()).or_insert(0) += 1;
        }
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
