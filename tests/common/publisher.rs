//! A device that records acknowledged messages and publishes the others again after a failure.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use bytes::BytesMut;
use rumqttc::mqttbytes::QoS;
use rumqttc::mqttbytes::v5::{Connect, ConnectAuth, ConnectReturnCode, Packet, PubAckReason, Publish};

/// Maximum number of unacknowledged messages.
const WINDOW: usize = 500;

/// The result of a publisher.
#[derive(Debug, Default)]
pub struct Published {
    /// Numbers of the acknowledged messages.
    pub acknowledged: BTreeSet<u64>,
    /// Numbers of the messages that were sent more than once.
    pub repeated: BTreeSet<u64>,
}

/// A publisher in the background.
pub struct Publisher {
    stop: Arc<AtomicBool>,
    count: Arc<AtomicU64>,
    result: Arc<Mutex<Published>>,
    thread: Option<JoinHandle<()>>,
}

impl Publisher {
    /// Publishes continuously; `message` returns topic and payload of a number.
    pub fn start(port: u16, username: &str, message: impl Fn(u64) -> (String, String) + Send + 'static) -> Self {
        let (stop, count, result) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)), Arc::new(Mutex::default()));
        let mut state = State {
            port,
            username: username.to_owned(),
            message: Box::new(message),
            next: 0,
            waiting: BTreeMap::new(),
            stop: stop.clone(),
            count: count.clone(),
            result: result.clone(),
        };
        let thread = std::thread::spawn(move || {
            while !state.is_finished() {
                if state.work().is_err() {
                    std::thread::sleep(Duration::from_millis(20));
                }
            }
        });
        Self { stop, count, result, thread: Some(thread) }
    }

    /// Number of acknowledged messages.
    pub fn acknowledged(&self) -> u64 {
        self.count.load(Ordering::Relaxed)
    }

    /// Stops publishing new messages, waits until all are acknowledged, and returns the result.
    pub fn finish(mut self) -> Published {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.take().unwrap().join().unwrap();
        std::mem::take(&mut self.result.lock().unwrap())
    }
}

struct State {
    port: u16,
    username: String,
    message: Box<dyn Fn(u64) -> (String, String) + Send>,
    next: u64,
    /// Message number and payload by packet identifier.
    waiting: BTreeMap<u16, u64>,
    stop: Arc<AtomicBool>,
    count: Arc<AtomicU64>,
    result: Arc<Mutex<Published>>,
}

impl State {
    fn is_finished(&self) -> bool {
        self.stop.load(Ordering::Relaxed) && self.waiting.is_empty()
    }

    fn work(&mut self) -> std::io::Result<()> {
        let mut stream = TcpStream::connect((Ipv4Addr::LOCALHOST, self.port))?;
        stream.set_read_timeout(Some(Duration::from_secs(5)))?;
        let mut output = BytesMut::new();
        let connect = Connect { keep_alive: 60, client_id: self.username.clone(), clean_start: true, properties: None };
        let auth = ConnectAuth::UsernamePassword { username: self.username.clone(), password: "password".into() };
        Packet::Connect(connect, None, auth).write(&mut output, None).unwrap();
        for (id, number) in std::mem::take(&mut self.waiting) {
            self.result.lock().unwrap().repeated.insert(number);
            self.put(&mut output, id, number);
        }
        let mut input = BytesMut::new();
        loop {
            self.fill(&mut output);
            stream.write_all(&output)?;
            output.clear();
            if self.is_finished() {
                return Ok(());
            }
            let mut chunk = [0; 8192];
            let read = stream.read(&mut chunk)?;
            if read == 0 {
                return Err(std::io::ErrorKind::UnexpectedEof.into());
            }
            input.extend_from_slice(&chunk[..read]);
            while let Ok(packet) = Packet::read(&mut input, None) {
                self.take(packet);
            }
        }
    }

    fn fill(&mut self, output: &mut BytesMut) {
        while self.waiting.len() < WINDOW && !self.stop.load(Ordering::Relaxed) {
            let free = (1..=u16::MAX).find(|id| !self.waiting.contains_key(id)).unwrap();
            self.put(output, free, self.next);
            self.next += 1;
        }
    }

    fn put(&mut self, output: &mut BytesMut, id: u16, number: u64) {
        let (topic, payload) = (self.message)(number);
        let mut publish = Publish::new(topic, QoS::AtLeastOnce, payload, None);
        publish.pkid = id;
        publish.write(output).unwrap();
        self.waiting.insert(id, number);
    }

    fn take(&mut self, packet: Packet) {
        match packet {
            Packet::ConnAck(answer) => assert_eq!(answer.code, ConnectReturnCode::Success),
            Packet::PubAck(answer) => {
                // The worker's session exists as long as anything is published.
                assert_eq!(answer.reason, PubAckReason::Success);
                if let Some(number) = self.waiting.remove(&answer.pkid) {
                    self.result.lock().unwrap().acknowledged.insert(number);
                    self.count.fetch_add(1, Ordering::Relaxed);
                }
            }
            _ => {}
        }
    }
}
