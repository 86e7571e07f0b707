//! A device that records the messages that the broker has acknowledged.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{ErrorKind, Read, Write};
use std::net::{Ipv4Addr, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use bytes::BytesMut;
use rumqttc::mqttbytes::QoS;
use rumqttc::mqttbytes::v5::{ConnectAuth, ConnectReturnCode, Packet, PubAck, PubComp, PubRel, Publish};
use rustls::{ClientConfig, ClientConnection, StreamOwned};
use rustls_pki_types::ServerName;

use crate::common::mosquitto::PATIENCE;
use crate::common::packets::{hello, next_packet};
use crate::websocket::WebSocket;

/// Messages of a device that are not acknowledged.
const WINDOW: usize = 200;

pub trait Stream: Read + Write {}
impl<T: Read + Write> Stream for T {}

/// Where devices connect to, and how.
pub struct Endpoint {
    pub port: u16,
    pub tls: Option<Arc<ClientConfig>>,
    pub websocket: bool,
}

impl Endpoint {
    /// MQTT over TCP.
    pub fn plain(port: u16) -> Self {
        Self { port, tls: None, websocket: false }
    }

    pub fn connect(&self) -> std::io::Result<Box<dyn Stream>> {
        let socket = TcpStream::connect((Ipv4Addr::LOCALHOST, self.port))?;
        socket.set_read_timeout(Some(PATIENCE))?;
        let stream: Box<dyn Stream> = match &self.tls {
            None => Box::new(socket),
            Some(tls) => {
                let name = ServerName::from(std::net::IpAddr::from(Ipv4Addr::LOCALHOST));
                Box::new(StreamOwned::new(ClientConnection::new(Arc::clone(tls), name).unwrap(), socket))
            }
        };
        Ok(if self.websocket { Box::new(WebSocket::open(stream)?) } else { stream })
    }
}

/// A device with a session. It remembers which of its messages are acknowledged, and sends the others again.
pub struct Device {
    name: String,
    qos: QoS,
    next: u64,
    /// Messages by packet identifier: those that the broker has not answered, and of QoS 2 those that it has received.
    pub sent: BTreeMap<u16, String>,
    received: BTreeMap<u16, String>,
    pub acknowledged: BTreeSet<String>,
}

impl Device {
    pub fn new(number: usize, qos: QoS) -> Self {
        let name = format!("press-{number}");
        Self { name, qos, next: 0, sent: BTreeMap::new(), received: BTreeMap::new(), acknowledged: BTreeSet::new() }
    }

    /// Publishes until the connection ends. Without a topic it sends nothing new, and returns once everything is acknowledged.
    pub fn work(&mut self, endpoint: &Endpoint, topic: Option<&str>, count: &AtomicU64) -> std::io::Result<()> {
        let mut stream = endpoint.connect()?;
        let (mut input, mut output, mut chunk) = (BytesMut::new(), BytesMut::new(), [0; 8192]);
        stream.write_all(&hello(&self.name, ConnectAuth::None, true))?;
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
            // Data that the broker sent before the kill can still be read after writes fail.
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

    pub fn fill(&mut self, topic: &str, output: &mut BytesMut) {
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

    /// Sends a message and, in the same write, a second CONNECT, which is a protocol error. Returns the packets after the CONNACK.
    pub fn provoke_disconnect(&mut self, endpoint: &Endpoint, topic: &str) -> Vec<Packet> {
        let mut stream = endpoint.connect().unwrap();
        let (mut input, mut output) = (BytesMut::new(), BytesMut::new());
        stream.write_all(&hello(&self.name, ConnectAuth::None, true)).unwrap();
        let connack = next_packet(&mut *stream, &mut input);
        assert!(matches!(connack, Some(Packet::ConnAck(_))), "{connack:?}");
        self.publish(1, format!("{topic} {} {}", self.name, self.next), false, &mut output);
        output.extend_from_slice(&hello(&self.name, ConnectAuth::None, true));
        stream.write_all(&output).unwrap();
        std::iter::from_fn(|| next_packet(&mut *stream, &mut input)).collect()
    }
}
