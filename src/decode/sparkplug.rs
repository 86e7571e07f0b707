//! Sparkplug B (Eclipse Sparkplug 3.0): a node's births name the metrics that its other messages give by alias alone, and type
//! those that they give by name; a node numbers its messages and those of its devices together.
//!
//! What the births said is kept in memory as long as the session. A message whose metrics no birth has named (as after a start of the worker, or
//! after a birth was lost, which QoS 0 allows) is refused whole, so that it can be replayed once there was a birth. Its node is
//! asked to be born again (`Node Control/Rebirth`), and so is one in whose numbers there is a gap.

use std::borrow::Cow;
use std::collections::HashMap;
use std::time::{Duration, Instant};

use prost::{Message as Encoded, Oneof};

use super::pack::{Names, Pack};
use super::reading::Message;
use super::refusal::{Reason, Refusal, excerpt};
use super::time::Time;
use super::wire::{Content, Wire};
use super::{Raw, malformed};
use fleetwright_api::pipeline::TimeUnit;
use fleetwright_api::topic::SPARKPLUG;

/// The most metrics that are remembered of all nodes of a broker; some 40 bytes each. A birth beyond it is not
/// remembered: what it holds becomes a row, but later messages that give its metrics by alias alone, or without a type, are refused
/// (`UnknownMetric`).
const MOST_METRICS: usize = 1_000_000;

/// How long a node is left alone after it was asked to be born again. A birth of thousands of metrics takes a slow node seconds,
/// and one that cannot do it need not be told every second.
const ASK_AGAIN_AFTER: Duration = Duration::from_mins(1);

/// The most nodes that are remembered as asked; beyond it all are forgotten. Some 100 bytes each.
const MOST_ASKED: usize = 10_000;

/// What the births of a broker's nodes have said.
#[derive(Debug, Default)]
pub struct Memory {
    nodes: HashMap<Box<str>, Node>,
    metrics: usize,
    gaps: u64,
    /// When each node was last asked to be born again.
    asked: HashMap<Box<str>, Instant>,
    /// The topics of those that are to be asked.
    rebirths: Vec<String>,
}

/// A node.
#[derive(Debug, Default)]
struct Node {
    /// The number of its last message.
    sequence: Option<u8>,
    /// What it and each of its devices were born with, by the name of the device; that of the node is empty.
    births: HashMap<Box<str>, Birth>,
}

/// What a birth has said.
#[derive(Debug, Default)]
struct Birth {
    /// For each alias the name, where a field wants it, and the type.
    aliases: HashMap<u64, (Option<Box<str>>, u32)>,
    /// The types of the metrics that fields want, by name.
    types: HashMap<Box<str>, u32>,
}

impl Memory {
    /// How many gaps in the numbers of messages there were since this was asked last: each may be a message that was lost.
    pub fn take_gaps(&mut self) -> u64 {
        std::mem::take(&mut self.gaps)
    }

    /// The topics of the commands by which nodes are to be asked to be born again; what to send there is [`rebirth`].
    pub fn take_rebirths(&mut self) -> Vec<String> {
        std::mem::take(&mut self.rebirths)
    }

    /// A message under this topic holds what no birth has told of.
    pub fn miss_birth(&mut self, topic: &str) {
        if let Some(topic) = Topic::read(topic) {
            self.ask_for_rebirth(&topic, Instant::now());
        }
    }

    fn ask_for_rebirth(&mut self, topic: &Topic<'_>, now: Instant) {
        if self.asked.get(topic.node.as_str()).is_some_and(|asked| now.duration_since(*asked) < ASK_AGAIN_AFTER) {
            return;
        }
        if self.asked.len() >= MOST_ASKED {
            self.asked.clear();
        }
        self.asked.insert(topic.node.as_str().into(), now);
        if let Some((group, node)) = topic.node.split_once('/') {
            self.rebirths.push(format!("{SPARKPLUG}/{group}/NCMD/{node}"));
        }
    }

    fn forget(&mut self, node: &str, device: Option<&str>) {
        let Some(known) = self.nodes.get_mut(node) else { return };
        // The end of a node is the end of its devices.
        let ended: Vec<Birth> = match device {
            Some(device) => known.births.remove(device).into_iter().collect(),
            None => known.births.drain().map(|(_, birth)| birth).collect(),
        };
        self.metrics -= ended.iter().map(Birth::len).sum::<usize>();
    }
}

impl Birth {
    fn len(&self) -> usize {
        self.aliases.len() + self.types.len()
    }
}

/// What a topic says: `spBv1.0/<group>/<kind>/<node>[/<device>]`.
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

/// Takes note of births, deaths and numbers; whether the message may hold readings of devices whose topics have so many levels.
pub(super) fn observe(names: &Names, memory: &mut Memory, topic: &str, levels: usize, payload: &[u8]) -> bool {
    let Some(place) = Topic::read(topic) else { return true };
    let is_wanted = levels == if place.device.is_some() { 5 } else { 4 };
    match place.kind {
        "NBIRTH" | "DBIRTH" => {
            memory.forget(&place.node, place.device);
            number(memory, &place, payload);
            if let Ok(payload) = Payload::decode(payload) {
                be_born(names, memory, &place, payload);
            }
            is_wanted
        }
        "NDATA" | "DDATA" => {
            number(memory, &place, payload);
            is_wanted
        }
        "DDEATH" => {
            number(memory, &place, payload);
            memory.forget(&place.node, place.device);
            false
        }
        // Written beforehand as the node's will: it has no number.
        "NDEATH" => {
            memory.forget(&place.node, None);
            false
        }
        // Commands to nodes and devices.
        "NCMD" | "DCMD" => false,
        _ => is_wanted,
    }
}

/// Compares the number of a message with the last one's.
fn number(memory: &mut Memory, topic: &Topic<'_>, payload: &[u8]) {
    const SEQUENCE: u32 = 3;
    let mut wire = Wire(payload);
    let mut found = None;
    while let Ok(Some((member, content))) = wire.next() {
        if let (SEQUENCE, Content::Varint(sequence)) = (member, content) {
            found = u8::try_from(sequence).ok();
        }
    }
    let Some(sequence) = found else { return };
    if topic.kind == "NBIRTH" {
        memory.nodes.entry(topic.node.as_str().into()).or_default().sequence = Some(sequence);
    } else if let Some(node) = memory.nodes.get_mut(topic.node.as_str()) {
        let has_gap = node.sequence.is_some_and(|last| last.wrapping_add(1) != sequence);
        node.sequence = Some(sequence);
        if has_gap {
            memory.gaps += 1;
            memory.ask_for_rebirth(topic, Instant::now());
        }
    }
}

fn be_born(names: &Names, memory: &mut Memory, topic: &Topic<'_>, payload: Payload) {
    let mut birth = Birth::default();
    for metric in payload.metrics {
        let type_ = metric.datatype.unwrap_or_default();
        let name = metric.name.filter(|name| !names.slots(name).is_empty());
        if let Some(name) = &name {
            birth.types.insert(name.as_str().into(), type_);
        }
        if let Some(alias) = metric.alias {
            birth.aliases.insert(alias, (name.map(String::into_boxed_str), type_));
        }
    }
    if memory.metrics + birth.len() <= MOST_METRICS {
        memory.metrics += birth.len();
        let node = memory.nodes.entry(topic.node.as_str().into()).or_default();
        node.births.insert(topic.device.unwrap_or_default().into(), birth);
    }
}

/// Reads the metrics of a message.
pub(super) fn decode<'de>(
    message: &mut Message<'_, 'de>,
    names: &Names,
    memory: &Memory,
    topic: &str,
    payload: &'de [u8],
) -> Result<(), Refusal> {
    let expected = || Refusal::new(Reason::TopicMismatch, "expected a topic of NBIRTH, NDATA, DBIRTH or DDATA");
    let topic = Topic::read(topic).filter(|topic| matches!(topic.kind, "NBIRTH" | "NDATA" | "DBIRTH" | "DDATA")).ok_or_else(expected)?;
    let payload = Payload::decode(payload).map_err(malformed)?;
    let birth = memory.nodes.get(topic.node.as_str()).and_then(|node| node.births.get(topic.device.unwrap_or_default()));
    let mut pack = Pack::default();
    for mut metric in payload.metrics {
        let (value, is_null) = (metric.value.take(), metric.is_null.unwrap_or_default());
        let Some((name, type_)) = resolve(&metric, birth, names)? else { continue };
        let time = match metric.timestamp.or(payload.timestamp) {
            Some(time) => Some(read_time(time).ok_or_else(|| malformed(format!("expected a time in milliseconds, found {time}")))?),
            None => None,
        };
        let value =
            read(value, is_null, type_).ok_or_else(|| unknown(&format!("no birth has told the type of the metric {}", excerpt(&name))))?;
        pack.add(time, names.slots(&name), &value);
    }
    pack.finish(message);
    Ok(())
}

/// What asks a node to be born again: the command `Node Control/Rebirth`, to be sent at QoS 0 and not retained.
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
    Payload { timestamp, metrics: vec![metric] }.encode_to_vec()
}

fn unknown(detail: &str) -> Refusal {
    Refusal::new(Reason::UnknownMetric, &format!("{detail} since the worker started or the node died"))
}

/// The name and type of a metric, if a field wants it.
fn resolve<'a>(metric: &'a Metric, birth: Option<&'a Birth>, names: &Names) -> Result<Option<(Cow<'a, str>, u32)>, Refusal> {
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

/// A value, as a slot takes it; `None` where the type must be known, and is not.
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

/// The payload of every message (sparkplug_b.proto of Eclipse Tahu), as far as it matters.
#[derive(Clone, PartialEq, Encoded)]
struct Payload {
    #[prost(uint64, optional, tag = "1")]
    timestamp: Option<u64>,
    #[prost(message, repeated, tag = "2")]
    metrics: Vec<Metric>,
}

#[derive(Clone, PartialEq, Encoded)]
struct Metric {
    #[prost(string, optional, tag = "1")]
    name: Option<String>,
    #[prost(uint64, optional, tag = "2")]
    alias: Option<u64>,
    #[prost(uint64, optional, tag = "3")]
    timestamp: Option<u64>,
    #[prost(uint32, optional, tag = "4")]
    datatype: Option<u32>,
    #[prost(bool, optional, tag = "7")]
    is_null: Option<bool>,
    #[prost(oneof = "Number", tags = "10, 11, 12, 13, 14, 15, 16, 17, 18, 19")]
    value: Option<Number>,
}

#[derive(Clone, PartialEq, Oneof)]
enum Number {
    #[prost(uint32, tag = "10")]
    Int(u32),
    #[prost(uint64, tag = "11")]
    Long(u64),
    #[prost(float, tag = "12")]
    Float(f32),
    #[prost(double, tag = "13")]
    Double(f64),
    #[prost(bool, tag = "14")]
    Boolean(bool),
    #[prost(string, tag = "15")]
    Text(String),
    #[prost(bytes, tag = "16")]
    Bytes(Vec<u8>),
    #[prost(bytes, tag = "17")]
    Dataset(Vec<u8>),
    #[prost(bytes, tag = "18")]
    Template(Vec<u8>),
    #[prost(bytes, tag = "19")]
    Extension(Vec<u8>),
}

#[cfg(test)]
#[path = "sparkplug_tests.rs"]
mod tests;
