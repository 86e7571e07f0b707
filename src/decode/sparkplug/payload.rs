//! The wire format of Sparkplug B.

use prost::{Message as Encoded, Oneof};

use crate::bounds::{MAX_READINGS, too_large};
use crate::dead_letter::DeadLetterCause;
use crate::malformed;
use crate::wire::{Content, Wire};

/// Parses a payload. Its metrics are counted first, because an empty one of two bytes takes a hundred bytes of memory.
pub fn parse(payload: &[u8]) -> Result<Payload, DeadLetterCause> {
    const METRIC: u32 = 2;
    let (mut wire, mut metrics) = (Wire(payload), 0);
    while let Ok(Some((member, _))) = wire.next() {
        metrics += usize::from(member == METRIC);
        if metrics > MAX_READINGS {
            return Err(too_large(&format!("at most {MAX_READINGS} metrics")));
        }
    }
    Payload::decode(payload).map_err(malformed)
}

/// The sequence number of a message. It counts also if the rest of the payload is malformed: otherwise the next message would seem to
/// follow a gap.
pub fn sequence(parsed: &Result<Payload, DeadLetterCause>, payload: &[u8]) -> Option<u8> {
    match parsed {
        Ok(payload) => payload.seq.and_then(|sequence| u8::try_from(sequence).ok()),
        Err(_) => scan_sequence(payload),
    }
}

/// The sequence number of a message whose metrics are not needed, or cannot be parsed.
pub fn scan_sequence(payload: &[u8]) -> Option<u8> {
    const SEQUENCE: u32 = 3;
    let mut wire = Wire(payload);
    let mut found = None;
    while let Ok(Some((member, content))) = wire.next() {
        if let (SEQUENCE, Content::Varint(sequence)) = (member, content) {
            found = u8::try_from(sequence).ok();
        }
    }
    found
}

/// The payload of every message: the fields of sparkplug_b.proto (Eclipse Tahu) that are used.
#[derive(Clone, PartialEq, Encoded)]
pub struct Payload {
    #[prost(uint64, optional, tag = "1")]
    pub timestamp: Option<u64>,
    #[prost(message, repeated, tag = "2")]
    pub metrics: Vec<Metric>,
    #[prost(uint64, optional, tag = "3")]
    pub seq: Option<u64>,
}

#[derive(Clone, PartialEq, Encoded)]
pub struct Metric {
    #[prost(string, optional, tag = "1")]
    pub name: Option<String>,
    #[prost(uint64, optional, tag = "2")]
    pub alias: Option<u64>,
    #[prost(uint64, optional, tag = "3")]
    pub timestamp: Option<u64>,
    #[prost(uint32, optional, tag = "4")]
    pub datatype: Option<u32>,
    #[prost(bool, optional, tag = "7")]
    pub is_null: Option<bool>,
    #[prost(oneof = "Number", tags = "10, 11, 12, 13, 14, 15, 16, 17, 18, 19")]
    pub value: Option<Number>,
}

#[derive(Clone, PartialEq, Oneof)]
pub enum Number {
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
