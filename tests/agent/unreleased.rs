//! Messages of QoS 2 that the broker has accepted and their publisher has not released yet: the limit of a queue reserves space for them.

use std::io::Write;
use std::net::{Ipv4Addr, TcpStream};
use std::ops::Range;

use bytes::BytesMut;
use rumqttc::mqttbytes::QoS;
use rumqttc::mqttbytes::v5::{Packet, PubRecReason, PubRel, Publish};

use super::common::packets::{hello, login, next_packet};
use super::full::{Paho, assert_exactly, drain, numbered, users};
use super::*;

/// Size of each message, and limit of the queue: space for twenty messages and the few bytes of another one.
const BYTES: usize = 1000;
const BOUND: &str = "20000";

/// A device that releases its messages on request.
struct Device {
    stream: TcpStream,
    input: BytesMut,
}

impl Device {
    /// Logs in, with or without a persistent session.
    fn connect(broker: &Mosquitto, persistent: bool) -> Self {
        let stream = TcpStream::connect((Ipv4Addr::LOCALHOST, broker.port)).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        let mut device = Self { stream, input: BytesMut::new() };
        device.stream.write_all(&hello("press-1", login(("press-1", PASSWORD)), persistent)).unwrap();
        assert!(matches!(device.receive(), Packet::ConnAck(_)));
        device
    }

    fn send(&mut self, packet: &Packet) {
        let mut output = BytesMut::new();
        packet.clone().write(&mut output, None).unwrap();
        self.stream.write_all(&output).unwrap();
    }

    fn receive(&mut self) -> Packet {
        next_packet(&mut self.stream, &mut self.input).expect("an open connection")
    }

    /// Publishes messages with their number as packet identifier; returns the number of accepted messages.
    fn publish(&mut self, numbers: Range<u16>) -> usize {
        for number in numbers.clone() {
            let mut publish = Publish::new("devices/press-1/telemetry", QoS::ExactlyOnce, numbered(number.into(), BYTES), None);
            publish.pkid = number;
            self.send(&Packet::Publish(publish));
        }
        let accepted = PubRecReason::Success;
        let answers = numbers.map(|_| self.receive());
        answers.filter(|answer| matches!(answer, Packet::PubRec(answer) if answer.reason == accepted)).count()
    }

    fn release(&mut self, numbers: Range<u16>) {
        for number in numbers {
            self.send(&Packet::PubRel(PubRel::new(number, None)));
            assert!(matches!(self.receive(), Packet::PubComp(_)));
        }
    }
}

async fn start() -> (Mosquitto, Agent) {
    let site = Site::new(&json!({"limits": {"queuedBytesPerClient": BOUND}}));
    let (broker, agent) = site.start(&users(), None).await;
    leave_a_queue(&broker);
    (broker, agent)
}

/// The number of accepted messages of another device, out of ten.
fn room(broker: &Mosquitto, first: usize) -> usize {
    let mut other = Paho::modern(broker, "press-2");
    let answers = other.answers("devices/press-2/telemetry", first..first + 10, BYTES);
    answers.iter().filter(|answer| *answer == "published 0").count()
}

#[tokio::test(flavor = "multi_thread")]
async fn accepted_messages_of_qos_2_have_space_when_they_are_released() {
    let (mut broker, agent) = start().await;
    let mut device = Device::connect(&broker, false);
    assert_eq!(device.publish(1..16), 15);
    // A failed login with its name does not end its session.
    assert!(!broker.publish(("press-1", "wrong"), &["-t", "devices/press-1/telemetry", "-m", "1"]).status.success());
    assert_eq!(room(&broker, 100), 5);
    assert_eq!(device.publish(16..20), 0);
    device.release(1..16);
    broker.kill();
    broker.start_again();
    let output = drain(&broker, &agent).await;
    assert_exactly(&output, &(1..16), 1..20);
    assert_exactly(&output, &(100..105), 100..110);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_end_of_a_connection_frees_the_space_of_its_session() {
    let (broker, _agent) = start().await;
    let mut device = Device::connect(&broker, false);
    assert_eq!(device.publish(1..20), 19);
    assert_eq!(room(&broker, 100), 1);
    drop(device);
    wait_until("room", || room(&broker, 200) == 10);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_persistent_session_keeps_its_space_after_a_disconnect() {
    let (mut broker, agent) = start().await;
    assert_eq!(Device::connect(&broker, true).publish(1..20), 19);
    assert_eq!(room(&broker, 100), 1);
    broker.kill();
    broker.start_again();
    assert_eq!(room(&broker, 200), 0);

    // Its redelivered messages are already counted.
    let mut device = Device::connect(&broker, true);
    assert_eq!(device.publish(1..20), 19);
    device.release(1..20);
    assert_eq!(room(&broker, 300), 0);
    let output = drain(&broker, &agent).await;
    assert_exactly(&output, &(1..20), 1..20);
    assert_exactly(&output, &(100..101), 100..110);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_end_of_a_persistent_session_frees_its_space() {
    let (broker, _agent) = start().await;
    assert_eq!(Device::connect(&broker, true).publish(1..20), 19);
    assert_eq!(room(&broker, 100), 1);
    drop(Device::connect(&broker, false));
    wait_until("room", || room(&broker, 200) == 10);
}
