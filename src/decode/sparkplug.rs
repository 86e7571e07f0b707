//! Sparkplug B (Eclipse Sparkplug 3.0): the births of a node define the metrics that its other messages refer to by alias, and the types
//! of metrics that they give by name. A node numbers its messages and those of its devices together.
//!
//! The content of births is kept in memory during the session. A message with metrics that no birth has defined (after a start of
//! the worker, or after a lost birth, which QoS 0 allows) is refused as a whole, so that it can be replayed after a birth. Its node receives
//! a rebirth command (`Node Control/Rebirth`), and so does a node with a gap in its sequence numbers.

pub(super) mod payload;

use std::borrow::Cow;
use std::collections::HashMap;
use std::time::{Duration, Instant};

use prost::Message as Encoded;

use self::payload::{Metric, Number, Payload, parse, scan_sequence, sequence};
use super::dead_letter::{DeadLetterCause, Reason, excerpt};
use super::group_by_time::{Names, ReadingsByTime};
use super::reading::Message;
use super::time::Time;
use super::{Parsed, Raw, malformed};
use fleetwright_api::pipeline::TimeUnit;
use fleetwright_api::topic::SPARKPLUG;

/// The most memory of the births of all nodes of a broker, in bytes: half a million metrics. A birth beyond it is decoded but not kept: later
/// messages that give its metrics by alias only, or without a type, are refused (`UnknownMetric`).
pub const MAX_BIRTH_BYTES: usize = 32 * 1024 * 1024;

/// The share of a node in it, so that one node does not displace the others: 60,000 metrics.
const NODE_SHARE: usize = 8;

/// Memory of a metric in a birth beside its name, in bytes (a table is two thirds full on average), of a birth, and of a node.
const METRIC_BYTES: usize = 64;
const BIRTH_BYTES: usize = 256;
const NODE_BYTES: usize = 256;

/// The shortest time between two rebirth commands to a node. A birth of thousands of metrics takes a slow node seconds, and a node
/// that cannot do it should not receive a command every second.
const MIN_REBIRTH_INTERVAL: Duration = Duration::from_mins(1);

/// The most nodes whose last rebirth command is kept, about 100 bytes each. Beyond it all are removed.
const MAX_COMMANDED_NODES: usize = 10_000;

/// The state of the nodes of a broker: what their births said, and their sequence numbers.
#[derive(Debug)]
pub struct SparkplugState {
    nodes: HashMap<Box<str>, Node>,
    /// Memory of the nodes and their births, and its limit.
    bytes: usize,
    max_bytes: usize,
    gaps: u64,
    /// The time of the last rebirth command to each node.
    commanded: HashMap<Box<str>, Instant>,
    /// The topics of the rebirth commands to send.
    rebirths: Vec<String>,
}

/// A node.
#[derive(Debug, Default)]
struct Node {
    /// The sequence number of its last message.
    sequence: Option<u8>,
    /// The births of the node and its devices, by the name of the device; that of the node is empty.
    births: HashMap<Box<str>, Birth>,
    /// Memory of the births.
    bytes: usize,
}

/// The content of a birth.
#[derive(Debug, Default)]
struct Birth {
    /// For each alias the type, and the name if a field uses it.
    aliases: HashMap<u64, (Option<Box<str>>, u32)>,
    /// The types of the metrics that fields use, by name.
    types: HashMap<Box<str>, u32>,
    /// Its memory.
    bytes: usize,
}

impl Default for SparkplugState {
    fn default() -> Self {
        Self::with_limit(MAX_BIRTH_BYTES)
    }
}

impl SparkplugState {
    /// A state whose births take at most this memory.
    #[must_use]
    pub fn with_limit(max_bytes: usize) -> Self {
        Self { nodes: HashMap::new(), bytes: 0, max_bytes, gaps: 0, commanded: HashMap::new(), rebirths: Vec::new() }
    }

    /// The number of gaps in the sequence numbers since the last call: each may be a lost message.
    pub fn take_gaps(&mut self) -> u64 {
        std::mem::take(&mut self.gaps)
    }

    /// The topics of the rebirth commands to send since the last call; the payload is [`rebirth`].
    pub fn take_rebirths(&mut self) -> Vec<String> {
        std::mem::take(&mut self.rebirths)
    }

    /// A message with this topic has metrics that no birth has described.
    pub fn request_rebirth(&mut self, topic: &str) {
        if let Some(topic) = Topic::read(topic) {
            self.command_rebirth(&topic, Instant::now());
        }
    }

    fn command_rebirth(&mut self, topic: &Topic<'_>, now: Instant) {
        if self.commanded.get(topic.node.as_str()).is_some_and(|commanded| now.duration_since(*commanded) < MIN_REBIRTH_INTERVAL) {
            return;
        }
        if self.commanded.len() >= MAX_COMMANDED_NODES {
            self.commanded.clear();
        }
        self.commanded.insert(topic.node.as_str().into(), now);
        if let Some((group, node)) = topic.node.split_once('/') {
            self.rebirths.push(format!("{SPARKPLUG}/{group}/NCMD/{node}"));
        }
    }

    fn forget(&mut self, node: &str, device: Option<&str>) {
        let Some(known) = self.nodes.get_mut(node) else { return };
        if let Some(device) = device {
            let ended = known.births.remove(device).map_or(0, |birth| birth.bytes);
            known.bytes -= ended;
            self.bytes -= ended;
        } else {
            // The end of a node is the end of its devices. Its sequence number is unknown until its next birth.
            self.bytes -= known.bytes + NODE_BYTES + node.len();
            self.nodes.remove(node);
        }
    }

    /// The node, if there is memory for `bytes` more of it. A node that is not known is added.
    fn node(&mut self, name: &str, bytes: usize) -> Option<&mut Node> {
        let known = self.nodes.get(name).map(|node| node.bytes);
        let more = bytes + if known.is_none() { NODE_BYTES + name.len() } else { 0 };
        if self.bytes + more > self.max_bytes || known.unwrap_or(0) + bytes > self.max_bytes / NODE_SHARE {
            return None;
        }
        self.bytes += more;
        let node = self.nodes.entry(name.into()).or_default();
        node.bytes += bytes;
        Some(node)
    }
}

/// The levels of a topic: `spBv1.0/<group>/<kind>/<node>[/<device>]`.
struct Topic<'a> {
    kind: &'a str,
    /// Group and node.
    node: String,
    device: Option<&'a str>,
}

impl<'a> Topic<'a> {
    fn read(topic: &'a str) -> Option<Self> {
        let levels: Vec<&str> = topic.split('/').collect();
        match levels[..] {
            [_, group, kind, node] => Some(Self { kind, node: format!("{group}/{node}"), device: None }),
            [_, group, kind, node, device] => Some(Self { kind, node: format!("{group}/{node}"), device: Some(device) }),
            _ => None,
        }
    }
}

/// Observes births, deaths and sequence numbers. `None` if the message has no readings of devices whose topics have `levels` levels;
/// otherwise the payload, if it was parsed.
pub(super) fn observe(names: &Names, state: &mut SparkplugState, topic: &str, levels: usize, payload: &[u8]) -> Option<Parsed> {
    let Some(place) = Topic::read(topic) else { return Some(Parsed::default()) };
    let is_wanted = levels == if place.device.is_some() { 5 } else { 4 };
    match place.kind {
        "NBIRTH" | "DBIRTH" => {
            state.forget(&place.node, place.device);
            let parsed = parse(payload);
            check_sequence(state, &place, sequence(&parsed, payload));
            if let Ok(payload) = &parsed {
                add_birth(names, state, &place, payload);
            }
            is_wanted.then(|| Parsed::of(parsed))
        }
        "NDATA" | "DDATA" if is_wanted => {
            let parsed = parse(payload);
            check_sequence(state, &place, sequence(&parsed, payload));
            Some(Parsed::of(parsed))
        }
        "NDATA" | "DDATA" => {
            check_sequence(state, &place, scan_sequence(payload));
            None
        }
        "DDEATH" => {
            check_sequence(state, &place, scan_sequence(payload));
            state.forget(&place.node, place.device);
            None
        }
        // The will of the node, which was written at its login: it has no sequence number.
        "NDEATH" => {
            state.forget(&place.node, None);
            None
        }
        // Commands to nodes and devices.
        "NCMD" | "DCMD" => None,
        _ => is_wanted.then(Parsed::default),
    }
}

/// Compares the sequence number of a message with that of the node's last message.
fn check_sequence(state: &mut SparkplugState, topic: &Topic<'_>, sequence: Option<u8>) {
    let Some(sequence) = sequence else { return };
    if topic.kind == "NBIRTH" {
        if let Some(node) = state.node(&topic.node, 0) {
            node.sequence = Some(sequence);
        }
    } else if let Some(node) = state.nodes.get_mut(topic.node.as_str()) {
        let has_gap = node.sequence.is_some_and(|last| last.wrapping_add(1) != sequence);
        node.sequence = Some(sequence);
        if has_gap {
            state.gaps += 1;
            state.command_rebirth(topic, Instant::now());
        }
    }
}

fn add_birth(names: &Names, state: &mut SparkplugState, topic: &Topic<'_>, payload: &Payload) {
    let mut birth = Birth { bytes: BIRTH_BYTES + topic.device.unwrap_or_default().len(), ..Birth::default() };
    for metric in &payload.metrics {
        let type_ = metric.datatype.unwrap_or_default();
        let name = metric.name.as_deref().filter(|name| !names.slots(name).is_empty());
        if let Some(name) = name {
            birth.types.insert(name.into(), type_);
            birth.bytes += METRIC_BYTES + name.len();
        }
        if let Some(alias) = metric.alias {
            birth.aliases.insert(alias, (name.map(Box::from), type_));
            birth.bytes += METRIC_BYTES + name.map_or(0, str::len);
        }
    }
    if let Some(node) = state.node(&topic.node, birth.bytes) {
        node.births.insert(topic.device.unwrap_or_default().into(), birth);
    }
}

/// Reads the metrics of a message.
pub(super) fn decode(
    message: &mut Message<'_, '_>,
    names: &Names,
    state: &SparkplugState,
    topic: &str,
    payload: &[u8],
    parsed: Parsed,
) -> Result<(), DeadLetterCause> {
    let expected = || DeadLetterCause::new(Reason::TopicMismatch, "expected a topic of NBIRTH, NDATA, DBIRTH or DDATA");
    let topic = Topic::read(topic).filter(|topic| matches!(topic.kind, "NBIRTH" | "NDATA" | "DBIRTH" | "DDATA")).ok_or_else(expected)?;
    let payload = match parsed.sparkplug {
        Some(parsed) => parsed,
        None => parse(payload),
    }?;
    let birth = state.nodes.get(topic.node.as_str()).and_then(|node| node.births.get(topic.device.unwrap_or_default()));
    let mut readings = ReadingsByTime::default();
    for mut metric in payload.metrics {
        let (value, is_null) = (metric.value.take(), metric.is_null.unwrap_or_default());
        let Some((name, type_)) = resolve(&metric, birth, names)? else { continue };
        let time = match metric.timestamp.or(payload.timestamp) {
            Some(time) => Some(read_time(time).ok_or_else(|| malformed(format!("expected a time in milliseconds, found {time}")))?),
            None => None,
        };
        let value = read(value, is_null, type_)
            .ok_or_else(|| unknown(&format!("no birth has defined the type of the metric {}", excerpt(&name))))?;
        readings.add(time, names.slots(&name), &value)?;
    }
    readings.finish(message);
    Ok(())
}

/// The payload of the command `Node Control/Rebirth`, to be published with QoS 0 and not retained.
#[must_use]
pub fn rebirth(now: Time) -> Vec<u8> {
    const BOOLEAN: u32 = 11;
    let timestamp = now.to_milliseconds();
    let metric = Metric {
        name: Some("Node Control/Rebirth".to_owned()),
        timestamp,
        datatype: Some(BOOLEAN),
        value: Some(Number::Boolean(true)),
        ..Metric::default()
    };
    Payload { timestamp, metrics: vec![metric], seq: None }.encode_to_vec()
}

fn unknown(detail: &str) -> DeadLetterCause {
    DeadLetterCause::new(Reason::UnknownMetric, &format!("{detail} since the worker started or the node died"))
}

/// The name and type of a metric, if a field uses it.
fn resolve<'a>(metric: &'a Metric, birth: Option<&'a Birth>, names: &Names) -> Result<Option<(Cow<'a, str>, u32)>, DeadLetterCause> {
    let type_ = metric.datatype.filter(|type_| *type_ != 0);
    if let Some(name) = metric.name.as_deref().filter(|name| !name.is_empty()) {
        let known = || birth.and_then(|birth| birth.types.get(name).copied()).unwrap_or_default();
        return Ok((!names.slots(name).is_empty()).then(|| (Cow::Borrowed(name), type_.unwrap_or_else(known))));
    }
    let alias = metric.alias.ok_or_else(|| malformed("expected a metric with a name or an alias, found one without"))?;
    match birth.and_then(|birth| birth.aliases.get(&alias)) {
        Some((name, known)) => Ok(name.as_deref().map(|name| (Cow::Borrowed(name), type_.unwrap_or(*known)))),
        None => Err(unknown(&format!("no birth has named the alias {alias}"))),
    }
}

fn read_time(milliseconds: u64) -> Option<Time> {
    Time::from_integer(milliseconds.into(), TimeUnit::Milliseconds)
}

/// A value for a slot; `None` if it depends on the type, which is unknown.
fn read<'de>(value: Option<Number>, is_null: bool, type_: u32) -> Option<Raw<'de>> {
    let Some(value) = value.filter(|_| !is_null) else { return Some(Raw::Null) };
    #[allow(clippy::cast_possible_truncation, reason = "smaller types stand in the low bits of a larger one (Sparkplug 3.0, 6.4.16)")]
    Some(match (value, type_) {
        (Number::Int(number), 1) => Raw::Integer((number as u8).cast_signed().into()),
        (Number::Int(number), 2) => Raw::Integer((number as u16).cast_signed().into()),
        (Number::Int(number), 3) => Raw::Integer(number.cast_signed().into()),
        (Number::Int(number), 5..=7) => Raw::Integer(number.into()),
        (Number::Long(number), 4) => Raw::Integer(number.cast_signed().into()),
        (Number::Long(number), 7 | 8) => Raw::Integer(number.into()),
        (Number::Long(number), 13) => read_time(number).map_or(Raw::Other("a time beyond 64 bits"), Raw::Time),
        (Number::Int(_) | Number::Long(_), 0) => return None,
        (Number::Int(_) | Number::Long(_), _) => Raw::Other("a whole number where its birth said another type"),
        (Number::Float(number), _) => Raw::Float(number.into()),
        (Number::Double(number), _) => Raw::Float(number),
        (Number::Boolean(truth), _) => Raw::Boolean(truth),
        (Number::Text(text), _) => Raw::Text(Cow::Owned(text)),
        (Number::Bytes(_), _) => Raw::Other("bytes"),
        (Number::Dataset(_), _) => Raw::Other("a data set"),
        (Number::Template(_), _) => Raw::Other("a template"),
        (Number::Extension(_), _) => Raw::Other("an extension"),
    })
}

#[cfg(test)]
#[path = "sparkplug_tests.rs"]
mod tests;
