//! Sessions and subscriptions of a killed broker.

use std::io::Write;

use bytes::BytesMut;
use rumqttc::mqttbytes::QoS;
use rumqttc::mqttbytes::v5::{ConnectAuth, Packet, PubAckReason, Publish, Subscribe, SubscribeFilter};

use super::*;
use crate::common::packets::{hello, next_packet};
use crate::device::Stream;

/// Sessions that start in one iteration of the broker's main loop.
const SESSIONS: u16 = 200;

/// The packets that start the session `topic` and subscribe to the topic.
fn subscription(topic: &str) -> BytesMut {
    let mut packets = hello(topic, ConnectAuth::None, true);
    let mut subscribe = Subscribe::new(SubscribeFilter::new(topic, QoS::AtLeastOnce), None);
    subscribe.pkid = 1;
    subscribe.write(&mut packets).unwrap();
    packets
}

/// Whether this connection receives the acknowledgement of a subscription before it ends.
fn is_subscribed(stream: &mut dyn Stream) -> bool {
    let mut input = BytesMut::new();
    std::iter::from_fn(|| next_packet(stream, &mut input)).any(|packet| matches!(packet, Packet::SubAck(_)))
}

/// The topics without a subscriber, from the reason codes that the broker sends to a publisher.
fn without_subscriber(endpoint: &Endpoint, topics: &[String]) -> Vec<String> {
    let mut stream = endpoint.connect().unwrap();
    let (mut input, mut output) = (BytesMut::new(), hello("publisher", ConnectAuth::None, true));
    for (id, topic) in (1..).zip(topics) {
        let mut publish = Publish::new(topic, QoS::AtLeastOnce, "1", None);
        publish.pkid = id;
        publish.write(&mut output).unwrap();
    }
    stream.write_all(&output).unwrap();
    let mut missing = Vec::new();
    for packet in std::iter::from_fn(|| next_packet(&mut *stream, &mut input)).skip(1).take(topics.len()) {
        let Packet::PubAck(answer) = packet else { panic!("{packet:?}") };
        if answer.reason == PubAckReason::NoMatchingSubscribers {
            missing.push(topics[usize::from(answer.pkid) - 1].clone());
        }
    }
    missing
}

#[test]
fn a_killed_broker_keeps_acknowledged_subscriptions() {
    let (mut broker, endpoint) = broker();
    let (mut acknowledged, mut lost) = (0, Vec::new());
    for round in 0..ROUNDS {
        let topics: Vec<String> = (0..SESSIONS).map(|number| format!("load/{round}/{number}")).collect();
        let mut streams: Vec<_> = topics.iter().map(|_| endpoint.connect().unwrap()).collect();
        // The broker receives all packets at once, and is killed while it processes them.
        broker.pause();
        for (stream, topic) in streams.iter_mut().zip(&topics) {
            stream.write_all(&subscription(topic)).unwrap();
        }
        broker.resume();
        assert!(is_subscribed(&mut *streams[0]));
        broker.kill();
        let others = streams.iter_mut().zip(&topics).skip(1).filter_map(|(stream, topic)| is_subscribed(&mut **stream).then_some(topic));
        let subscribed: Vec<String> = topics[..1].iter().chain(others).cloned().collect();
        broker.start_again();
        let missing = without_subscriber(&endpoint, &subscribed);
        println!("round {round}: {} of {} are missing", missing.len(), subscribed.len());
        acknowledged += subscribed.len();
        lost.extend(missing);
    }
    assert!(lost.is_empty(), "{} of {acknowledged} acknowledged subscriptions are lost: {lost:?}", lost.len());
}
