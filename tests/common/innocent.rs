//! A device that publishes one message after the other and measures how long the broker takes to acknowledge each; and one that publishes
//! whatever it wants.

use std::io::Write;
use std::net::{Ipv4Addr, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use bytes::BytesMut;
use rumqttc::mqttbytes::QoS;
use rumqttc::mqttbytes::v5::{Packet, Publish};

use super::packets::{hello, login, next_packet};

/// The time between two messages of an innocent device.
const INTERVAL: Duration = Duration::from_millis(20);

/// Topic and payload of a message.
pub type Message = (String, Vec<u8>);

/// A connection that publishes with QoS 1.
pub struct Connection {
    stream: TcpStream,
    input: BytesMut,
}

impl Connection {
    pub fn open(port: u16, username: &str) -> Self {
        let mut stream = TcpStream::connect((Ipv4Addr::LOCALHOST, port)).unwrap();
        stream.set_nodelay(true).unwrap();
        stream.write_all(&hello(username, login((username, "password")), false)).unwrap();
        let mut input = BytesMut::new();
        assert!(matches!(next_packet(&mut stream, &mut input), Some(Packet::ConnAck(_))));
        Self { stream, input }
    }

    /// Publishes a message and waits for its acknowledgement.
    pub fn publish(&mut self, message: Message) {
        self.publish_all(std::iter::once(message));
    }

    /// Publishes messages, a hundred at a time, and waits for their acknowledgements.
    pub fn publish_all(&mut self, messages: impl Iterator<Item = Message>) {
        let (mut messages, mut output) = (messages.peekable(), BytesMut::new());
        while messages.peek().is_some() {
            let mut sent = 0;
            for (topic, payload) in messages.by_ref().take(100) {
                sent += 1;
                let mut publish = Publish::new(topic, QoS::AtLeastOnce, payload, None);
                publish.pkid = sent;
                publish.write(&mut output).unwrap();
            }
            self.stream.write_all(&output).unwrap();
            output.clear();
            for _ in 0..sent {
                let answer = next_packet(&mut self.stream, &mut self.input);
                assert!(matches!(answer, Some(Packet::PubAck(_))), "{answer:?}");
            }
        }
    }
}

/// An innocent device in the background.
pub struct Innocent {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<(u64, Duration)>,
}

impl Innocent {
    /// Publishes the messages with increasing numbers.
    pub fn start(port: u16, username: &str, message: impl Fn(u64) -> Message + Send + 'static) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = stop.clone();
        let mut connection = Connection::open(port, username);
        let thread = std::thread::spawn(move || {
            let (mut number, mut slowest) = (0, Duration::ZERO);
            while !stopped.load(Ordering::Relaxed) {
                let started = Instant::now();
                connection.publish(message(number));
                slowest = slowest.max(started.elapsed());
                number += 1;
                std::thread::sleep(INTERVAL);
            }
            (number, slowest)
        });
        Self { stop, thread }
    }

    /// The number of acknowledged messages, and the longest time until an acknowledgement.
    pub fn finish(self) -> (u64, Duration) {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().unwrap()
    }
}
