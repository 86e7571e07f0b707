//! One device that attacks its broker, with no rights beyond its own topics, and another one that must not notice.

use std::io::Write;
use std::net::{Ipv4Addr, TcpStream};

use bytes::BytesMut;
use fleetwright::configuration::agent::Fullness;
use rumqttc::mqttbytes::QoS;
use rumqttc::mqttbytes::v5::{
    ConnAck, Connect, ConnectProperties, ConnectReturnCode, LastWill, Packet, PubAckReason, Publish, Subscribe, SubscribeFilter,
    SubscribeReasonCode,
};

use super::common::packets::{login, next_packet};
use super::full::{Paho, assert_exactly, numbered, take_queue, users};
use super::*;

/// How soon every publish of the innocent device is acknowledged.
const SOON: Duration = Duration::from_secs(1);

/// Bytes of each of its messages.
const BYTES: usize = 100;

/// A raw connection of the attacker.
pub struct Attacker {
    pub stream: TcpStream,
    input: BytesMut,
}

impl Attacker {
    pub fn connect(broker: &Mosquitto) -> Self {
        let (attacker, answer) = Self::try_connect(broker, None);
        assert_eq!(answer.expect("a CONNACK").code, ConnectReturnCode::Success);
        attacker
    }

    /// Logs in with a session that outlives the connection.
    pub fn try_connect(broker: &Mosquitto, will: Option<LastWill>) -> (Self, Option<ConnAck>) {
        let stream = TcpStream::connect((Ipv4Addr::LOCALHOST, broker.port)).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.set_write_timeout(Some(PATIENCE)).unwrap();
        let mut attacker = Self { stream, input: BytesMut::new() };
        let properties = ConnectProperties { session_expiry_interval: Some(u32::MAX), ..ConnectProperties::new() };
        let connect = Connect { keep_alive: 60, client_id: "press-1".to_owned(), clean_start: false, properties: Some(properties) };
        let mut packet = BytesMut::new();
        Packet::Connect(connect, will, login(("press-1", PASSWORD))).write(&mut packet, None).unwrap();
        attacker.stream.write_all(&packet).unwrap();
        let answer = match next_packet(&mut attacker.stream, &mut attacker.input) {
            Some(Packet::ConnAck(answer)) => Some(answer),
            _ => None,
        };
        (attacker, answer)
    }

    pub fn subscribe(&mut self, filters: &[String]) -> Vec<SubscribeReasonCode> {
        let filters = filters.iter().map(|filter| SubscribeFilter::new(filter, QoS::AtLeastOnce));
        let mut subscribe = Subscribe::new_many(filters, None);
        subscribe.pkid = 1;
        self.send(&Packet::Subscribe(subscribe));
        loop {
            match next_packet(&mut self.stream, &mut self.input) {
                Some(Packet::SubAck(answer)) => return answer.return_codes,
                Some(_) => {}
                None => return Vec::new(),
            }
        }
    }

    fn send(&mut self, packet: &Packet) {
        let mut output = BytesMut::new();
        packet.clone().write(&mut output, None).unwrap();
        self.stream.write_all(&output).unwrap();
    }

    /// Publishes with QoS 1, and returns whether the broker has accepted it.
    pub fn publish(&mut self, mut publish: Publish) -> bool {
        publish.pkid = 1;
        self.send(&Packet::Publish(publish));
        match next_packet(&mut self.stream, &mut self.input) {
            Some(Packet::PubAck(answer)) => match answer.reason {
                PubAckReason::Success | PubAckReason::NoMatchingSubscribers => true,
                PubAckReason::QuotaExceeded => false,
                other => panic!("{other:?}"),
            },
            other => panic!("{other:?}"),
        }
    }

    /// Publishes retained messages, and returns how many of them the broker has accepted.
    pub fn publish_retained(&mut self, topics: impl Iterator<Item = String>) -> usize {
        topics.filter(|topic| self.publish(retained(topic, QoS::AtLeastOnce, "1"))).count()
    }

    /// Sends these messages without reading the answers, until the broker ends the connection.
    pub fn flood(&mut self, messages: impl Iterator<Item = Publish>) {
        let mut output = BytesMut::new();
        for message in messages {
            output.clear();
            message.write(&mut output).unwrap();
            if self.stream.write_all(&output).is_err() {
                return;
            }
        }
    }
}

pub fn retained(topic: &str, qos: QoS, payload: &str) -> Publish {
    let mut publish = Publish::new(topic, qos, payload.to_owned(), None);
    publish.retain = true;
    publish
}

/// The other device, which publishes from before the attack until after it.
pub struct Innocent {
    client: Paho,
    sent: usize,
}

impl Innocent {
    /// A device that has sent this many messages before.
    pub fn new(broker: &Mosquitto, sent: usize) -> Self {
        Self { client: Paho::modern(broker, "press-2"), sent }
    }

    /// Publishes messages one by one, each of which has to be acknowledged soon.
    pub fn publishes(&mut self, messages: usize) {
        for number in self.sent..self.sent + messages {
            let started = Instant::now();
            assert_eq!(self.client.answers("devices/press-2/telemetry", number..number + 1, BYTES), ["published 0"]);
            assert!(started.elapsed() < SOON, "message {number} took {:?}", started.elapsed());
        }
        self.sent += messages;
    }
}

/// A site with the default limits, an innocent device, and a worker whose queue gets what it publishes.
pub async fn start() -> (Mosquitto, Agent, Innocent) {
    let (broker, agent) = Site::new(&json!({})).start(&users(), None).await;
    leave_a_queue(&broker);
    let mut innocent = Innocent::new(&broker, 0);
    innocent.publishes(5);
    (broker, agent, innocent)
}

/// What the broker's process uses: memory and volume, in KiB.
pub fn consumption(broker: &Mosquitto) -> (u64, u64) {
    let own = std::fs::read_to_string(format!("/proc/{}/status", broker.pid())).unwrap();
    let memory = own.lines().find_map(|line| line.strip_prefix("VmRSS:")?.trim().split(' ').next()?.parse().ok()).unwrap();
    let files = std::fs::read_dir(broker.data()).unwrap().map(|entry| entry.unwrap().metadata().unwrap().len()).sum::<u64>();
    (memory, files / 1024)
}

/// Runs an attack with the innocent device before, during and after it; prints and returns what the attacker has consumed (KiB of memory
/// and of the volume).
pub fn attack_beside(innocent: &mut Innocent, broker: &Mosquitto, name: &str, attack: impl FnOnce(&Mosquitto) + Send) -> (u64, u64) {
    let before = consumption(broker);
    std::thread::scope(|scope| {
        let attack = scope.spawn(|| attack(broker));
        while !attack.is_finished() {
            innocent.publishes(1);
        }
        attack.join().unwrap();
    });
    innocent.publishes(5);
    let after = consumption(broker);
    let consumed = (after.0.saturating_sub(before.0), after.1.saturating_sub(before.1));
    println!("{name}: memory +{} KiB, volume +{} KiB", consumed.0, consumed.1);
    consumed
}

/// Runs an attack that exceeds a limit. The innocent device is served before, during and after it, also after a crash of the broker, and
/// what it has published is delivered. The agent names the attacker.
pub async fn check(name: &str, limit: &str, attack: impl FnOnce(&Mosquitto) + Send) {
    let (mut broker, agent, mut innocent) = start().await;
    attack_beside(&mut innocent, &broker, name, attack);
    let mut seen = agent.metrics.fullness();
    let wanted = format!("press-1: {limit}");
    let named = |seen: &Option<Fullness>| matches!(seen, Some(Fullness::Clients { clients }) if clients.contains(&wanted));
    let found = tokio::time::timeout(PATIENCE, seen.wait_for(named)).await;
    assert!(found.is_ok(), "expected {wanted}; found {:?}", *agent.metrics.fullness().borrow());
    wait_until("a count", || exceeded(&agent, limit) > 0.0);
    let sent = innocent.sent;
    drop(innocent);
    broker.kill();
    broker.start_again();
    let mut innocent = Innocent::new(&broker, sent);
    innocent.publishes(5);
    let worker = take_queue(&broker);
    worker.wait_for(&numbered(innocent.sent - 1, BYTES));
    assert_exactly(&worker.output(), &(0..innocent.sent), 0..innocent.sent);
}

/// The agent's count of how often this limit was exceeded.
pub fn exceeded(agent: &Agent, limit: &str) -> f64 {
    let families = agent.registry.gather();
    let family = families.iter().filter(|family| family.name() == "fleetwright_broker_client_limits_exceeded");
    let of_limit = |metric: &&prometheus::proto::Metric| metric.get_label().iter().any(|label| label.value() == limit);
    family.flat_map(prometheus::proto::MetricFamily::get_metric).filter(of_limit).map(|metric| metric.get_gauge().get_value()).sum()
}

/// A topic of the attacker with this many levels.
pub fn deep(number: usize, levels: usize) -> String {
    format!("devices/press-1/reported/{number}{}", "/x".repeat(levels - 4))
}
