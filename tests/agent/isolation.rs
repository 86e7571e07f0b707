//! One device that attacks its broker, with no rights beyond its own topics: another device is not affected.

use std::io::{ErrorKind, Read, Write};
use std::net::{Ipv4Addr, TcpStream};

use bytes::BytesMut;
use fleetwright::configuration::agent::Fullness;
use rumqttc::mqttbytes::QoS;
use rumqttc::mqttbytes::v5::{
    ConnAck, Connect, ConnectProperties, ConnectReturnCode, LastWill, Packet, PubAckReason, Publish, Subscribe, SubscribeFilter,
    SubscribeReasonCode,
};

use super::common::packets::{login, next_packet};
use super::full::{Paho, users};
use super::*;

/// How soon every publish of the innocent device is acknowledged.
const SOON: Duration = Duration::from_secs(1);

/// A raw connection of the attacker.
struct Attacker {
    stream: TcpStream,
    input: BytesMut,
}

impl Attacker {
    fn connect(broker: &Mosquitto) -> Self {
        let (attacker, answer) = Self::try_connect(broker, None);
        assert_eq!(answer.expect("a CONNACK").code, ConnectReturnCode::Success);
        attacker
    }

    /// Logs in with a session that outlives the connection.
    fn try_connect(broker: &Mosquitto, will: Option<LastWill>) -> (Self, Option<ConnAck>) {
        let stream = TcpStream::connect((Ipv4Addr::LOCALHOST, broker.port)).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
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

    fn subscribe(&mut self, filters: &[String]) -> Vec<SubscribeReasonCode> {
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

    /// Publishes with QoS 1, and returns how many the broker has accepted.
    fn publish_retained(&mut self, topics: impl Iterator<Item = String>) -> usize {
        let mut accepted = 0;
        for topic in topics {
            let mut publish = Publish::new(topic, QoS::AtLeastOnce, "1", None);
            (publish.pkid, publish.retain) = (1, true);
            self.send(&Packet::Publish(publish));
            match next_packet(&mut self.stream, &mut self.input) {
                Some(Packet::PubAck(answer)) => match answer.reason {
                    PubAckReason::Success | PubAckReason::NoMatchingSubscribers => accepted += 1,
                    PubAckReason::QuotaExceeded => {}
                    other => panic!("{other:?}"),
                },
                other => panic!("{other:?}"),
            }
        }
        accepted
    }

    /// Publishes this many bytes to itself without reading anything; gives how long the broker took to read them.
    fn flood(&mut self, total: usize) -> Duration {
        let started = Instant::now();
        let mut output = BytesMut::new();
        let mut publish = Publish::new("devices/press-1/reported/self", QoS::AtLeastOnce, vec![b'x'; 100_000], None);
        publish.pkid = 1;
        publish.write(&mut output).unwrap();
        self.stream.set_write_timeout(Some(PATIENCE)).unwrap();
        for _ in 0..total / 100_000 {
            if let Err(error) = self.stream.write_all(&output) {
                assert!(matches!(error.kind(), ErrorKind::ConnectionReset | ErrorKind::BrokenPipe), "{error}");
                break;
            }
        }
        started.elapsed()
    }
}

/// The other device, which publishes from before the attack until after it.
struct Innocent(Paho);

impl Innocent {
    fn new(broker: &Mosquitto) -> Self {
        Self(Paho::modern(broker, "press-2"))
    }

    /// Publishes messages one by one, each of which has to be acknowledged soon.
    fn publishes(&mut self, messages: std::ops::Range<usize>) {
        for number in messages {
            let started = Instant::now();
            assert_eq!(self.0.answers("devices/press-2/telemetry", number..number + 1, 100), ["published 0"]);
            assert!(started.elapsed() < SOON, "message {number} took {:?}", started.elapsed());
        }
    }
}

/// A site with the default limits, an innocent device, and a worker that reads.
async fn start() -> (Mosquitto, Agent, Innocent) {
    let (broker, agent) = Site::new(&json!({})).start(&users(), None).await;
    leave_a_queue(&broker);
    let mut innocent = Innocent::new(&broker);
    innocent.publishes(0..5);
    (broker, agent, innocent)
}

/// What the broker's process uses: memory and volume, in KiB.
fn consumption(broker: &Mosquitto) -> (u64, u64) {
    let own = std::fs::read_to_string(format!("/proc/{}/status", broker.pid())).unwrap();
    let memory = own.lines().find_map(|line| line.strip_prefix("VmRSS:")?.trim().split(' ').next()?.parse().ok()).unwrap();
    let files = std::fs::read_dir(broker.data()).unwrap().map(|entry| entry.unwrap().metadata().unwrap().len()).sum::<u64>();
    (memory, files / 1024)
}

/// Runs an attack, with the innocent device before, during and after it, also after a restart; prints what the attacker has consumed.
async fn check(name: &str, limit: &str, attack: impl FnOnce(&Mosquitto) + Send) {
    let (mut broker, agent, mut innocent) = start().await;
    let before = consumption(&broker);
    std::thread::scope(|scope| {
        let attack = scope.spawn(|| attack(&broker));
        let mut number = 5;
        while !attack.is_finished() {
            innocent.publishes(number..number + 1);
            number += 1;
        }
        attack.join().unwrap();
    });
    innocent.publishes(1000..1005);
    let after = consumption(&broker);
    println!("{name}: memory +{} KiB, volume +{} KiB", after.0.saturating_sub(before.0), after.1.saturating_sub(before.1));
    // The agent names the device, and counts.
    let mut seen = agent.metrics.fullness();
    let wanted = format!("press-1: {limit}");
    let named = |seen: &Option<Fullness>| matches!(seen, Some(Fullness::Clients { clients }) if clients.contains(&wanted));
    let found = tokio::time::timeout(PATIENCE, seen.wait_for(named)).await;
    assert!(found.is_ok(), "expected {wanted}; found {:?}", *agent.metrics.fullness().borrow());
    wait_until("a count", || exceeded(&agent, limit) > 0.0);
    drop(innocent);
    broker.kill();
    broker.start_again();
    Innocent::new(&broker).publishes(2000..2005);
}

fn exceeded(agent: &Agent, limit: &str) -> f64 {
    let families = agent.registry.gather();
    let family = families.iter().filter(|family| family.name() == "fleetwright_broker_client_limits_exceeded");
    let of_limit = |metric: &&prometheus::proto::Metric| metric.get_label().iter().any(|label| label.value() == limit);
    family.flat_map(prometheus::proto::MetricFamily::get_metric).filter(of_limit).map(|metric| metric.get_gauge().get_value()).sum()
}

/// A topic of the attacker with this many levels.
fn deep(number: usize, levels: usize) -> String {
    format!("devices/press-1/reported/{number}{}", "/x".repeat(levels - 4))
}

#[tokio::test(flavor = "multi_thread")]
async fn retained_messages_on_deep_topics_harm_nobody() {
    check("3,000 retained messages, 150 levels", "topic", |broker| {
        assert_eq!(Attacker::connect(broker).publish_retained((0..3_000).map(|number| deep(number, 150))), 0);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn many_retained_messages_harm_nobody() {
    check("3,000 retained messages, 16 levels", "retained", |broker| {
        let mut attacker = Attacker::connect(broker);
        assert_eq!(attacker.publish_retained((0..3_000).map(|number| deep(number, 16))), 100);
        // Replacing is possible at the limit.
        assert_eq!(attacker.publish_retained((0..10).map(|number| deep(number, 16))), 10);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn many_subscriptions_harm_nobody() {
    check("3,000 subscriptions", "subscriptions", |broker| {
        let mut attacker = Attacker::connect(broker);
        let filters: Vec<String> = (0..3_000).map(|number| deep(number, 16)).collect();
        let answers: Vec<_> = filters.chunks(50).flat_map(|filters| attacker.subscribe(filters)).collect();
        assert_eq!(answers.iter().filter(|answer| matches!(answer, SubscribeReasonCode::Success(_))).count(), 100);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_device_that_floods_itself_harms_nobody() {
    check("100 MB to itself, not acknowledged", "queue", |broker| {
        let mut attacker = Attacker::connect(broker);
        attacker.subscribe(&["devices/press-1/#".to_owned()]);
        println!("it took {:?}", attacker.flood(100_000_000));
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_device_that_does_not_read_harms_nobody() {
    check("100 MB of QoS 0 to itself, not read", "queue", |broker| {
        let mut attacker = Attacker::connect(broker);
        attacker.subscribe(&["devices/press-1/#".to_owned()]);
        let mut output = BytesMut::new();
        Publish::new("devices/press-1/reported/self", QoS::AtMostOnce, vec![b'x'; 100_000], None).write(&mut output).unwrap();
        for _ in 0..1_000 {
            attacker.stream.write_all(&output).unwrap();
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn large_retained_wills_harm_nobody() {
    check("500 wills of 65 kB", "will", |broker| {
        for number in 0..500 {
            let will = LastWill::new(format!("devices/press-1/reported/{number}"), vec![b'x'; 65_000], QoS::AtLeastOnce, true, None);
            let (_, answer) = Attacker::try_connect(broker, Some(will));
            assert_ne!(answer.map(|answer| answer.code), Some(ConnectReturnCode::Success));
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn many_retained_wills_harm_nobody() {
    check("500 wills of 4 kB", "retained", |broker| {
        for number in 0..500 {
            let will = LastWill::new(format!("devices/press-1/reported/{number}"), vec![b'x'; 4_000], QoS::AtLeastOnce, true, None);
            let (_, answer) = Attacker::try_connect(broker, Some(will));
            assert_eq!(answer.map(|answer| answer.code), Some(ConnectReturnCode::Success));
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_device_that_is_faster_than_its_rate_is_slowed_down_and_loses_nothing() {
    let spec = json!({"limits": {"clients": {"messagesPerSecond": 100, "messageBurst": 50}}});
    let (broker, agent) = Site::new(&spec).start(&users(), None).await;
    leave_a_queue(&broker);
    let mut fast = Paho::modern(&broker, "press-1");
    let mut innocent = Innocent::new(&broker);
    let started = Instant::now();
    assert!(fast.answers("devices/press-1/telemetry", 0..250, 100).iter().all(|answer| answer == "published 0"));
    assert!(started.elapsed() > Duration::from_millis(1500), "{:?}", started.elapsed());
    innocent.publishes(0..5);
    wait_until("a count", || exceeded(&agent, "rate") > 0.0);
}

/// A device is deleted, and its name is given to another one, which finds nothing.
#[tokio::test(flavor = "multi_thread")]
async fn the_next_holder_of_a_name_finds_nothing() {
    let mut users = users();
    users.push(device("press-9", &[("devices/press-1/desired", Access::Write)]));
    let (broker, mut agent) = Site::new(&json!({})).start(&users, None).await;
    let mut former = Attacker::connect(&broker);
    assert_eq!(former.publish_retained(["devices/press-1/reported/secret".to_owned()].into_iter()), 1);
    former.subscribe(&["devices/press-1/#".to_owned()]);
    drop(former);
    wait_until("its leave", || broker.log().lines().any(|line| line.contains("Client press-1 [") && line.contains("disconnected")));
    assert!(broker.publish(("press-9", PASSWORD), &["-t", "devices/press-1/desired", "-m", "queued"]).status.success());
    let without: Vec<Entry> = users[1..].to_vec();
    agent.hold(&without).await;
    wait_until("the end of the session", || broker.log().contains("Ending the session of press-1"));
    agent.hold(&users).await;
    assert!(!broker.has_session(("press-1", PASSWORD), "press-1"), "its session, with its queue and subscriptions");
    let next = broker.subscribe(("press-1", PASSWORD), &["-t", "devices/press-1/#"]);
    assert!(broker.publish(("press-9", PASSWORD), &["-t", "devices/press-1/desired", "-m", "fresh"]).status.success());
    next.wait_for("fresh");
    assert_eq!(next.output().trim(), "fresh", "neither the queue nor what was retained");
    assert!(!broker.log().contains("Ending the session of press-2"), "another device");
}

/// The Session Expiry Interval that the broker grants.
#[tokio::test(flavor = "multi_thread")]
async fn a_session_expires_at_the_latest_when_the_gateway_says() {
    let (broker, _agent) = Site::new(&json!({"limits": {"clients": {"sessionExpirySeconds": 60}}})).start(&users(), None).await;
    let (_, answer) = Attacker::try_connect(&broker, None);
    let properties = answer.expect("a CONNACK").properties.expect("properties");
    assert_eq!(properties.session_expiry_interval, Some(60));
    assert_eq!(properties.receive_max, Some(1_000));
}

/// A broker without memory still deletes what is retained, and takes acknowledgements: both make room.
#[tokio::test(flavor = "multi_thread")]
async fn a_full_broker_can_be_emptied() {
    let spec = json!({"resources": {"limits": {"memory": "64Mi"}}});
    let (broker, agent) = Site::new(&spec).start(&users(), None).await;
    let retained = broker.publish(("press-1", PASSWORD), &["-t", "devices/press-1/reported", "-r", "-m", "1"]);
    assert!(retained.status.success());
    leave_a_queue(&broker);
    let answers = Paho::modern(&broker, "press-2").answers("devices/press-2/telemetry", 0..24_000, 1000);
    assert_ne!(answers.last().unwrap(), "published 0", "full");
    let deleted = broker.publish(("press-1", PASSWORD), &["-t", "devices/press-1/reported", "-r", "-n"]);
    assert!(deleted.status.success() && deleted.stderr.is_empty(), "{}", String::from_utf8_lossy(&deleted.stderr));
    full::drain(&broker, &agent).await;
}

/// What is acknowledged is stored: a client of MQTT 3.1.1 with more unreleased messages of QoS 2 than may be in flight loses none of it.
#[tokio::test(flavor = "multi_thread")]
async fn unreleased_messages_of_mqtt_3_beyond_the_limit_are_not_acknowledged() {
    let spec = json!({"limits": {"clients": {"inFlightMessages": 20}}});
    let (broker, _agent) = Site::new(&spec).start(&users(), None).await;
    leave_a_queue(&broker);
    let mut stream = TcpStream::connect((Ipv4Addr::LOCALHOST, broker.port)).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream.write_all(&mqtt_3::connect("press-1", PASSWORD)).unwrap();
    for number in 1..=50 {
        stream.write_all(&mqtt_3::publish(number, "devices/press-1/telemetry", "1234567")).unwrap();
    }
    let mut answers = Vec::new();
    let _ = stream.read_to_end(&mut answers);
    // CONNACK, then PUBRECs of four bytes; the connection ends without one for what is beyond the limit.
    let received = answers[4..].chunks(4).filter(|packet| packet[0] == 0x50).count();
    assert!(received <= 20, "{received} PUBRECs for 20 places");
    assert!(broker.log().contains("receive maximum exceeded"), "{}", broker.log());
}

/// Packets of MQTT 3.1.1.
mod mqtt_3 {
    fn text(text: &str) -> Vec<u8> {
        [&u16::try_from(text.len()).unwrap().to_be_bytes()[..], text.as_bytes()].concat()
    }

    fn packet(header: u8, body: &[u8]) -> Vec<u8> {
        assert!(body.len() < 128);
        [&[header, u8::try_from(body.len()).unwrap()][..], body].concat()
    }

    /// With a session that outlives the connection.
    pub fn connect(username: &str, password: &str) -> Vec<u8> {
        let body = [text("MQTT"), vec![4, 0b1100_0000, 0, 60], text(username), text(username), text(password)].concat();
        packet(0x10, &body)
    }

    /// With QoS 2.
    pub fn publish(id: u16, topic: &str, payload: &str) -> Vec<u8> {
        packet(0x34, &[text(topic), id.to_be_bytes().to_vec(), payload.as_bytes().to_vec()].concat())
    }
}
