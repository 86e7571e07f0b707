//! MQTT 3.1.1 packets, as few as a load needs, and the load itself.

use std::collections::VecDeque;
use std::io::{ErrorKind, Read, Write};
use std::net::{Ipv4Addr, TcpStream};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};

/// Number of devices in the load.
pub const DEVICES: u64 = 1_000;

/// The most messages that are not acknowledged: enough that the broker never waits, and few enough that it need not queue.
const WINDOW: u64 = 1_000;

/// Bytes that a client has room for: what one read brings at most, and far more than the largest packet of these loads.
const ROOM: usize = 256 * 1024;

/// One session with a broker. It reads into one buffer that stays, so that a counting client shows what the broker takes, and not
/// what its own buffers cost.
pub struct Client {
    stream: TcpStream,
    buffer: Box<[u8]>,
    /// What was read and is not yet taken.
    unread: std::ops::Range<usize>,
}

impl Client {
    /// Logs in. A session that is not clean is kept.
    pub fn connect(port: u16, id: &str, clean: bool) -> anyhow::Result<Self> {
        let stream = TcpStream::connect((Ipv4Addr::LOCALHOST, port)).context("failed to reach the broker")?;
        stream.set_nodelay(true)?;
        let mut client = Self { stream, buffer: vec![0; ROOM].into(), unread: 0..0 };
        let mut body = b"\x00\x04MQTT\x04".to_vec();
        body.extend_from_slice(&[u8::from(clean) << 1, 0, 0]);
        put_text(&mut body, id);
        client.stream.write_all(&packet(0x10, &body))?;
        client.expect(2)?;
        Ok(client)
    }

    /// Subscribes at QoS 1.
    pub fn subscribe(&mut self, filter: &str) -> anyhow::Result<()> {
        let mut body = vec![0, 1];
        put_text(&mut body, filter);
        body.push(1);
        self.stream.write_all(&packet(0x82, &body))?;
        self.expect(9)
    }

    fn expect(&mut self, type_: u8) -> anyhow::Result<()> {
        let found = loop {
            if let Some(first) = self.take() {
                break first >> 4;
            }
            self.fill()?;
        };
        ensure!(found == type_, "expected a packet of type {type_}, found {found}");
        Ok(())
    }

    /// Reads once, behind what is not yet taken.
    fn fill(&mut self) -> anyhow::Result<()> {
        self.buffer.copy_within(self.unread.clone(), 0);
        self.unread = 0..self.unread.len();
        let read = self.stream.read(&mut self.buffer[self.unread.end..])?;
        ensure!(read > 0, "the broker closed the connection, or sent a packet of more than {ROOM} bytes");
        self.unread.end += read;
        Ok(())
    }

    fn unread(&self) -> &[u8] {
        &self.buffer[self.unread.clone()]
    }

    /// The first byte of the next whole packet.
    fn take(&mut self) -> Option<u8> {
        let (_, end) = bounds(self.unread())?;
        let first = self.unread()[0];
        self.unread.start += end;
        Some(first)
    }

    /// Publishes these packets, whose identifiers are in turn 1, 2, and so on, with a window; at a rate (messages a second) if
    /// there is one. Returns when all are acknowledged.
    pub fn publish(&mut self, packets: impl Iterator<Item = Vec<u8>>, rate: Option<f64>) -> anyhow::Result<()> {
        let (mut sent, mut acknowledged) = (0_u64, 0_u64);
        let started = Instant::now();
        let mut packets = packets.peekable();
        let mut output = Vec::new();
        while packets.peek().is_some() || acknowledged < sent {
            #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a number of messages")]
            let allowed = rate.map_or(u64::MAX, |rate| (rate * started.elapsed().as_secs_f64()) as u64 + 1);
            while sent < allowed.min(acknowledged + WINDOW) && output.len() < 65_536 {
                let Some(packet) = packets.next() else { break };
                output.extend_from_slice(&packet);
                sent += 1;
            }
            self.stream.write_all(&output)?;
            output.clear();
            if rate.is_some() && acknowledged == sent && packets.peek().is_some() {
                std::thread::sleep(Duration::from_micros(200));
                continue;
            }
            if acknowledged < sent {
                acknowledged += self.acknowledgements()? as u64;
            }
        }
        Ok(())
    }

    /// Reads once: how many PUBACKs have come.
    fn acknowledgements(&mut self) -> anyhow::Result<usize> {
        self.fill()?;
        let whole = self.unread.len() / 4;
        self.unread.start += whole * 4;
        Ok(whole)
    }

    /// Counts and acknowledges so many messages. Those of one read in one write; or, with a pause, those of that time, as a
    /// consumer does that acknowledges what it has stored.
    pub fn count(&mut self, messages: u64, pause: Option<Duration>) -> anyhow::Result<()> {
        let mut counted = 0;
        let mut output = Vec::new();
        let mut written = Instant::now();
        self.stream.set_read_timeout(pause)?;
        while counted < messages {
            while let Some((start, end)) = bounds(self.unread()) {
                let packet = &self.unread()[..end];
                if packet[0] >> 4 == 3 {
                    let topic = usize::from(u16::from_be_bytes([packet[start], packet[start + 1]]));
                    output.extend_from_slice(&[0x40, 2, packet[start + 2 + topic], packet[start + 3 + topic]]);
                    counted += 1;
                }
                self.unread.start += end;
            }
            if counted >= messages || pause.is_none_or(|pause| written.elapsed() >= pause) {
                self.stream.write_all(&output)?;
                output.clear();
                written = Instant::now();
            }
            if counted < messages {
                match self.fill() {
                    Err(error) if error.downcast_ref().is_some_and(|error: &std::io::Error| error.kind() == ErrorKind::WouldBlock) => {}
                    read => read?,
                }
            }
        }
        Ok(())
    }
}

/// Publishes these packets as a device does that loses nothing: what is not acknowledged when the connection ends is sent again
/// on the next. Tells how many are acknowledged; returns when all are.
pub fn deliver(port: u16, mut packets: impl Iterator<Item = Vec<u8>>, acknowledged: &AtomicU64) {
    let mut waiting = VecDeque::new();
    loop {
        let connected = Client::connect(port, "loader", true);
        match connected.and_then(|mut client| deliver_by(&mut client, &mut packets, &mut waiting, acknowledged)) {
            Ok(()) => return,
            // The broker is away.
            Err(_) => std::thread::sleep(Duration::from_millis(20)),
        }
    }
}

fn deliver_by(
    client: &mut Client,
    packets: &mut impl Iterator<Item = Vec<u8>>,
    waiting: &mut VecDeque<Vec<u8>>,
    acknowledged: &AtomicU64,
) -> anyhow::Result<()> {
    let mut output: Vec<u8> = waiting.iter().flatten().copied().collect();
    loop {
        while waiting.len() < usize::try_from(WINDOW)? {
            let Some(packet) = packets.next() else { break };
            output.extend_from_slice(&packet);
            waiting.push_back(packet);
        }
        if waiting.is_empty() {
            return Ok(());
        }
        client.stream.write_all(&output)?;
        output.clear();
        // Mosquitto acknowledges in the order in which it is sent to.
        let count = client.acknowledgements()?;
        waiting.drain(..count.min(waiting.len()));
        acknowledged.fetch_add(count as u64, Ordering::Relaxed);
    }
}

/// Where the body of the first packet begins and ends.
fn bounds(bytes: &[u8]) -> Option<(usize, usize)> {
    let mut length = 0;
    for (index, byte) in bytes.iter().skip(1).take(4).enumerate() {
        length |= usize::from(byte & 0x7f) << (7 * index);
        if byte & 0x80 == 0 {
            return (bytes.len() >= 2 + index + length).then_some((2 + index, 2 + index + length));
        }
    }
    None
}

fn packet(first: u8, body: &[u8]) -> Vec<u8> {
    let mut packet = vec![first];
    let mut rest = body.len();
    loop {
        let more = if rest > 0x7f { 0x80 } else { 0 };
        packet.push(u8::try_from(rest & 0x7f).unwrap_or(0) | more);
        rest >>= 7;
        if rest == 0 {
            break;
        }
    }
    packet.extend_from_slice(body);
    packet
}

fn put_text(body: &mut Vec<u8>, text: &str) {
    body.extend_from_slice(&u16::try_from(text.len()).unwrap_or(u16::MAX).to_be_bytes());
    body.extend_from_slice(text.as_bytes());
}

/// A PUBLISH at QoS 1.
pub fn publish(number: u64, topic: &str, payload: &str) -> Vec<u8> {
    let mut body = Vec::with_capacity(topic.len() + payload.len() + 4);
    put_text(&mut body, topic);
    let id = u16::try_from(number % 65_535 + 1).unwrap_or(1);
    body.extend_from_slice(&id.to_be_bytes());
    body.extend_from_slice(payload.as_bytes());
    packet(0x32, &body)
}
