//! The limits of each device, one by one: how they refuse, and what they do not refuse.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpStream};

use rumqttc::mqttbytes::QoS;
use rumqttc::mqttbytes::v5::{ConnectReturnCode, LastWill, Publish, PublishProperties};

use super::attacker::{Attacker, Innocent, exceeded};
use super::full::{Paho, assert_exactly, numbered, take_queue, users};
use super::*;

/// A site with these limits of each device, and a worker with a queue.
async fn start(clients: &Value) -> (Mosquitto, Agent) {
    let (broker, agent) = Site::new(&json!({"limits": {"clients": clients}})).start(&users(), None).await;
    leave_a_queue(&broker);
    (broker, agent)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_device_that_is_faster_than_its_rate_is_slowed_down_and_loses_nothing() {
    let (broker, agent) = start(&json!({"messagesPerSecond": 100, "messageBurst": 50})).await;
    let mut fast = Paho::modern(&broker, "press-1");
    let mut innocent = Innocent::new(&broker, 1_000);
    let started = Instant::now();
    assert!(fast.answers("devices/press-1/telemetry", 0..250, 100).iter().all(|answer| answer == "published 0"));
    assert!(started.elapsed() > Duration::from_millis(1500), "{:?}", started.elapsed());
    innocent.publishes(5);
    wait_until("a count", || exceeded(&agent, "rate") > 0.0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_new_connection_does_not_renew_the_burst() {
    let (broker, _agent) = start(&json!({"messagesPerSecond": 100, "messageBurst": 50})).await;
    let started = Instant::now();
    for _ in 0..5 {
        let mut attacker = Attacker::connect(&broker);
        for _ in 0..50 {
            assert!(attacker.publish(Publish::new("devices/press-1/telemetry", QoS::AtLeastOnce, "1", None)));
        }
    }
    assert!(started.elapsed() > Duration::from_millis(1500), "{:?}", started.elapsed());
}

#[tokio::test(flavor = "multi_thread")]
async fn bytes_beyond_the_rate_are_read_later() {
    let (broker, _agent) = start(&json!({"bytesPerSecond": 100_000, "byteBurst": 50_000})).await;
    let mut attacker = Attacker::connect(&broker);
    let started = Instant::now();
    for _ in 0..20 {
        assert!(attacker.publish(Publish::new("devices/press-1/telemetry", QoS::AtLeastOnce, vec![b'x'; 10_000], None)));
    }
    assert!(started.elapsed() > Duration::from_secs(1), "{:?}", started.elapsed());
}

/// The Session Expiry Interval and the Receive Maximum that the broker grants.
#[tokio::test(flavor = "multi_thread")]
async fn a_session_expires_at_the_latest_when_the_gateway_says() {
    let (broker, _agent) = start(&json!({"sessionExpirySeconds": 60})).await;
    let (_, answer) = Attacker::try_connect(&broker, None);
    let properties = answer.expect("a CONNACK").properties.expect("properties");
    assert_eq!(properties.session_expiry_interval, Some(60));
    assert_eq!(properties.receive_max, Some(1_000));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_message_beyond_a_limit_is_refused_and_its_device_stays_connected() {
    let (broker, _agent) = start(&json!({"topicLevels": 5, "topicBytes": 60, "propertyBytes": 100, "retainedBytes": 1024})).await;
    let mut device = Attacker::connect(&broker);
    let publish = |topic: &str, bytes: usize, property: usize, retain: bool| {
        let mut publish = Publish::new(topic, QoS::AtLeastOnce, vec![b'x'; bytes], None);
        let user_properties = vec![("key".to_owned(), "x".repeat(property))];
        publish.properties = Some(PublishProperties { user_properties, ..PublishProperties::default() });
        publish.retain = retain;
        publish
    };
    let long = format!("devices/press-1/reported/{}", "x".repeat(50));
    for (topic, bytes, property, retain, accepted) in [
        ("devices/press-1/reported/a/b", 1, 1, false, true),
        ("devices/press-1/reported/a/b/c", 1, 1, false, false),
        (long.as_str(), 1, 1, false, false),
        ("devices/press-1/reported/a", 1, 101, false, false),
        ("devices/press-1/reported/a", 2_000, 1, true, false),
        ("devices/press-1/reported/a", 2_000, 1, false, true),
        ("devices/press-1/reported/a", 900, 1, true, true),
        ("devices/press-1/reported/b", 900, 1, true, false),
        ("devices/press-1/reported/a", 0, 1, true, true),
        ("devices/press-1/reported/b", 900, 1, true, true),
    ] {
        let found = device.publish(publish(topic, bytes, property, retain));
        assert_eq!(found, accepted, "{topic}: {bytes} bytes, a property of {property}, retained: {retain}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn wills_that_the_gateway_does_not_allow_are_refused_with_the_connection() {
    let (broker, _agent) = start(&json!({"retainedWills": false, "willBytes": 10})).await;
    for (bytes, retain, expected) in [
        (10, false, ConnectReturnCode::Success),
        (11, false, ConnectReturnCode::PacketTooLarge),
        (10, true, ConnectReturnCode::RetainNotSupported),
    ] {
        let will = LastWill::new("devices/press-1/reported", vec![b'x'; bytes], QoS::AtLeastOnce, retain, None);
        let (_, answer) = Attacker::try_connect(&broker, Some(will));
        assert_eq!(answer.expect("a CONNACK").code, expected, "{bytes} bytes, retained: {retain}");
    }
}

/// More waits for a worker than any limit of a device allows, also after a restart.
#[tokio::test(flavor = "multi_thread")]
async fn the_queue_of_a_worker_has_none_of_these_limits() {
    for durability in ["Process", "Snapshot"] {
        let limits = json!({"queuedMessages": 5, "queuedBytes": 1024, "inFlightMessages": 5, "sessionExpirySeconds": 60});
        let site = Site::new(&json!({"durability": durability, "limits": {"clients": limits}}));
        let (mut broker, _agent) = site.start(&users(), None).await;
        leave_a_queue(&broker);
        let mut device = Paho::modern(&broker, "press-2");
        for numbers in [0..50, 50..100] {
            assert!(device.answers("devices/press-2/telemetry", numbers, 100).iter().all(|answer| answer == "published 0"));
            drop(device);
            broker.stop();
            broker.start_again();
            device = Paho::modern(&broker, "press-2");
        }
        let worker = take_queue(&broker);
        worker.wait_for(&numbered(99, 100));
        assert_exactly(&worker.output(), &(0..100), 0..100);
    }
}

/// A broker without memory still deletes what is retained, and takes acknowledgements: both make room.
#[tokio::test(flavor = "multi_thread")]
async fn a_full_broker_can_be_emptied() {
    // Without a rate: otherwise the device that fills the broker would be reported for a minute.
    let limits = json!({"clients": {"messagesPerSecond": 0, "bytesPerSecond": 0}});
    let spec = json!({"resources": {"limits": {"memory": "64Mi"}}, "limits": limits});
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

/// What an MQTT 3.1.1 client knows of its messages of QoS 2; their packet identifiers are their numbers.
struct OldDevice {
    messages: usize,
    received: usize,
    completed: usize,
}

impl OldDevice {
    /// Connects, and sends all that is not acknowledged without waiting; goes on until the broker ends the connection, or all is done.
    fn connect_and_send(&mut self, broker: &Mosquitto) {
        let mut stream = TcpStream::connect((Ipv4Addr::LOCALHOST, broker.port)).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.write_all(&mqtt_3::connect("press-1", PASSWORD)).unwrap();
        for number in self.completed..self.received {
            stream.write_all(&mqtt_3::release(number)).unwrap();
        }
        for number in self.received..self.messages {
            stream.write_all(&mqtt_3::publish(number, "devices/press-1/telemetry", &numbered(number, 10))).unwrap();
        }
        let mut answer = [0; 4];
        while self.completed < self.messages && stream.read_exact(&mut answer).is_ok() {
            match answer[0] {
                mqtt_3::CONNACK => assert_eq!(answer[3], 0),
                mqtt_3::PUBREC => {
                    assert_eq!(mqtt_3::number(answer), self.received, "in the order of the messages");
                    self.received += 1;
                    if stream.write_all(&mqtt_3::release(mqtt_3::number(answer))).is_err() {
                        return;
                    }
                }
                mqtt_3::PUBCOMP => self.completed = mqtt_3::number(answer) + 1,
                other => panic!("{other:#x}"),
            }
        }
    }
}

/// What is acknowledged is stored: a client of MQTT 3.1.1 with more unreleased messages of QoS 2 than may be in flight loses none of them.
#[tokio::test(flavor = "multi_thread")]
async fn unreleased_messages_of_mqtt_3_beyond_the_limit_are_acknowledged_later() {
    const MESSAGES: usize = 50;
    let (mut broker, agent) = start(&json!({"inFlightMessages": 20})).await;
    let mut device = OldDevice { messages: MESSAGES, received: 0, completed: 0 };
    device.connect_and_send(&broker);
    assert_eq!(device.received, 20, "as many as may be in flight");
    wait_until("a count", || exceeded(&agent, "inflight") > 0.0);
    broker.kill();
    broker.start_again();
    for _ in 0..2 {
        device.connect_and_send(&broker);
    }
    assert_eq!(device.completed, MESSAGES);
    let worker = take_queue(&broker);
    worker.wait_for(&numbered(MESSAGES - 1, 10));
    let output = worker.output();
    let found: Vec<&str> = output.lines().filter(|line| *line != "queued").collect();
    let expected: Vec<String> = (0..MESSAGES).map(|number| numbered(number, 10)).collect();
    assert_eq!(found, expected, "each once, in their order");
}

/// Packets of MQTT 3.1.1. Those that the broker sends in these tests have four bytes.
mod mqtt_3 {
    pub const CONNACK: u8 = 0x20;
    pub const PUBREC: u8 = 0x50;
    pub const PUBCOMP: u8 = 0x70;

    fn text(text: &str) -> Vec<u8> {
        [&u16::try_from(text.len()).unwrap().to_be_bytes()[..], text.as_bytes()].concat()
    }

    fn packet(header: u8, body: &[u8]) -> Vec<u8> {
        assert!(body.len() < 128);
        [&[header, u8::try_from(body.len()).unwrap()][..], body].concat()
    }

    /// Packet identifiers begin with 1.
    fn id(number: usize) -> [u8; 2] {
        u16::try_from(number + 1).unwrap().to_be_bytes()
    }

    /// The number of the message that a packet answers.
    pub fn number(packet: [u8; 4]) -> usize {
        usize::from(u16::from_be_bytes([packet[2], packet[3]])) - 1
    }

    /// With a session that outlives the connection.
    pub fn connect(username: &str, password: &str) -> Vec<u8> {
        let body = [text("MQTT"), vec![4, 0b1100_0000, 0, 60], text(username), text(username), text(password)].concat();
        packet(0x10, &body)
    }

    /// With QoS 2.
    pub fn publish(number: usize, topic: &str, payload: &str) -> Vec<u8> {
        packet(0x34, &[&text(topic)[..], &id(number), payload.as_bytes()].concat())
    }

    pub fn release(number: usize) -> Vec<u8> {
        packet(0x62, &id(number))
    }
}
