//! From a payload to readings: what a Pipeline's `decode` says, compiled once; and on to the rows of a COPY.
//!
//! The payload is read in one pass, without a value of its own for what stands in it: numbers, and texts that need no
//! unescaping, go from the payload into a reused slot a field, are checked, and are handed over as a reading.
//!
//! A crate of its own because each reading goes through it: it is compiled for speed, where all the rest is compiled for its size.
//! So nothing here is generic in what the callers bring: that would be compiled with them.

mod cbor;
mod check;
mod pack;
mod plain_text;
mod pointer;
pub mod protobuf;
mod reading;
pub mod refusal;
pub mod rows;
mod senml;
pub mod sparkplug;
pub mod stream;
pub mod time;
mod walk;
mod wire;

use std::borrow::Cow;

use serde::de::DeserializeSeed;

use self::check::{Rule, Timing};
use self::pack::Names;
use self::pointer::Node;
use self::protobuf::Reader;
use self::reading::Message;
pub use self::reading::Take;
use self::refusal::{Reason, Refusal};
use self::sparkplug::Memory;
use self::time::Time;
use fleetwright_api::condition::Cause;
use fleetwright_api::pipeline::{Decode, Format};
use fleetwright_api::reason::Reason as ConditionReason;

/// A value that passed its checks.
#[derive(Clone, Debug, PartialEq)]
pub enum Value<'a> {
    /// Not there, or null.
    Null,
    /// Never NaN and never infinite.
    Float64(f64),
    /// A whole number.
    Int64(i64),
    /// A truth value.
    Boolean(bool),
    /// A text without U+0000.
    Text(Cow<'a, str>),
    /// A time that PostgreSQL can hold.
    Timestamp(Time),
    /// JSON as text; no string of it holds U+0000.
    Json(Cow<'a, str>),
}

/// What stands in a payload where a field points to.
#[derive(Clone, Debug, PartialEq)]
enum Raw<'a> {
    Absent,
    Null,
    Boolean(bool),
    Integer(i128),
    Float(f64),
    Text(Cow<'a, str>),
    /// A time whose unit the format knows.
    Time(Time),
    /// JSON as text.
    Json(String),
    /// What no column takes, by its name.
    Other(&'static str),
}

/// Why a `decode` cannot be compiled.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
pub enum CompileError {
    /// A pointer is none.
    #[error("failed to read the pointer {pointer:?}: expected a JSON pointer (RFC 6901) such as /values/rms")]
    ReadPointer {
        /// The pointer.
        pointer: String,
    },

    /// A length of time is none.
    #[error("failed to read the length of time {text:?}: expected a number with s, m, h, d or w, as in 30d")]
    ReadDuration {
        /// What stands there.
        text: String,
    },

    /// A default is not of the field's type.
    #[error("failed to use the default of the field {field}: {detail}")]
    ReadDefault {
        /// The field.
        field: String,
        /// What was expected and found.
        detail: String,
    },

    /// The format sends only what has changed.
    #[error(
        "failed to use the default of the field {field}: Sparkplug B sends only what has changed, so that it would stand in for values that did not; remove it"
    )]
    DefaultChange {
        /// The field.
        field: String,
    },

    /// The description of the Protocol Buffers messages.
    #[error(transparent)]
    Describe(#[from] protobuf::DescribeError),
}

impl CompileError {
    /// Why the Pipeline cannot be carried out. What is wrong with a description is for its ConfigMap to mend, not for the Pipeline.
    #[must_use]
    pub fn cause(&self) -> Cause {
        let reason = if matches!(self, Self::Describe(_)) { ConditionReason::DescriptorMismatch } else { ConditionReason::InvalidSpec };
        Cause::new(reason, self.to_string())
    }
}

/// What becomes of a message.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Outcome {
    /// Every reading was handed over.
    Complete,
    /// The good readings were handed over; of the others the first few are named.
    Partial(Refusal),
    /// Nothing of it counts: what was handed over before that showed must be dropped.
    Malformed(Refusal),
}

/// Decodes the payloads of a Pipeline.
#[derive(Clone, Debug)]
pub struct Decoder {
    plan: Plan,
    /// A rule a field, in the order of the columns.
    rules: Vec<Rule>,
    timing: Timing,
}

/// What is peculiar to a format.
#[derive(Clone, Debug)]
enum Plan {
    Json(Document),
    Cbor(Document),
    SenMl(Names),
    SenMlCbor(Names),
    SparkplugB(Names),
    PlainText,
    Protobuf(Reader),
}

/// Where in a document the readings and their fields stand.
#[derive(Clone, Debug)]
struct Document {
    readings: Vec<String>,
    root: Node,
}

impl Decoder {
    /// Compiles `spec.decode`. `descriptor` is the FileDescriptorSet of the format Protobuf.
    ///
    /// # Errors
    /// When it makes no sense in a way that the CRD cannot see.
    pub fn compile(decode: &Decode, descriptor: Option<&[u8]>) -> Result<Self, CompileError> {
        let rules = decode.fields.iter().map(Rule::compile).collect::<Result<_, _>>()?;
        let plan = match decode.format {
            Format::Json => Plan::Json(Document::compile(decode)?),
            Format::Cbor => Plan::Cbor(Document::compile(decode)?),
            Format::SenMl => Plan::SenMl(Names::compile(decode)),
            Format::SenMlCbor => Plan::SenMlCbor(Names::compile(decode)),
            Format::SparkplugB => {
                if let Some(field) = decode.fields.iter().find(|field| field.default.is_some()) {
                    return Err(CompileError::DefaultChange { field: field.name.clone() });
                }
                Plan::SparkplugB(Names::compile(decode))
            }
            Format::PlainText => Plan::PlainText,
            Format::Protobuf => Plan::Protobuf(Reader::compile(decode, &Document::compile(decode)?, descriptor)?),
        };
        Ok(Self { plan, rules, timing: Timing::compile(decode)? })
    }

    /// Whether readings are timed by their arrival, or may be: then nothing but the worker's own ledger tells a redelivery.
    #[must_use]
    pub fn takes_arrival_time(&self) -> bool {
        match self.plan {
            Plan::Json(_) | Plan::Cbor(_) | Plan::Protobuf(_) => !self.timing.is_in_payload,
            Plan::PlainText | Plan::SenMl(_) | Plan::SenMlCbor(_) | Plan::SparkplugB(_) => true,
        }
    }

    /// Takes note of a message, in the order of arrival, before it is decoded; `false` when it says nothing about the devices
    /// of `levels` levels of topic, and needs no decoding. Only Sparkplug B has a use for it.
    pub fn observe(&self, memory: &mut Memory, topic: &str, levels: usize, payload: &[u8]) -> bool {
        match &self.plan {
            Plan::SparkplugB(names) => sparkplug::observe(names, memory, topic, levels, payload),
            _ => true,
        }
    }

    /// Decodes a message that arrived at `arrival`, and hands each good reading over.
    pub fn decode<'a>(&'a self, memory: &Memory, topic: &str, payload: &[u8], arrival: Time, take: &'a mut Take<'a>) -> Outcome {
        let mut message = Message::new(self, arrival, take);
        let read = match &self.plan {
            Plan::Json(document) => walk::json(&mut message, document, payload),
            Plan::Cbor(document) => walk::cbor(&mut message, document, payload),
            Plan::SenMl(names) => senml::json(&mut message, names, payload),
            Plan::SenMlCbor(names) => senml::cbor(&mut message, names, payload),
            Plan::SparkplugB(names) => sparkplug::decode(&mut message, names, memory, topic, payload),
            Plan::PlainText => plain_text::decode(&mut message, payload),
            Plan::Protobuf(reader) => reader.decode(&mut message, payload).map_err(|error| malformed(error.0)),
        };
        message.outcome(read)
    }
}

/// Reads a payload that is one JSON text and nothing else.
///
/// A text is read a fifth faster than bytes, whose every string must be proven to be UTF-8. What is none may still be JSON where
/// it matters: in a member that nobody asks for.
fn from_json<'de, S: DeserializeSeed<'de>>(payload: &'de [u8], seed: S) -> Result<S::Value, Refusal> {
    match std::str::from_utf8(payload) {
        Ok(text) => read_json(serde_json::Deserializer::from_str(text), seed),
        Err(_) => read_json(serde_json::Deserializer::from_slice(payload), seed),
    }
}

fn read_json<'de, R: serde_json::de::Read<'de>, S: DeserializeSeed<'de>>(
    mut deserializer: serde_json::Deserializer<R>,
    seed: S,
) -> Result<S::Value, Refusal> {
    let value = seed.deserialize(&mut deserializer).map_err(malformed)?;
    deserializer.end().map_err(malformed)?;
    Ok(value)
}

/// Reads a payload that is one CBOR data item and nothing else.
fn from_cbor<'de, S: DeserializeSeed<'de>>(payload: &'de [u8], seed: S) -> Result<S::Value, Refusal> {
    let mut deserializer = cbor::Deserializer::new(payload);
    let value = seed.deserialize(&mut deserializer).map_err(malformed)?;
    deserializer.end().map_err(malformed)?;
    Ok(value)
}

#[allow(clippy::needless_pass_by_value, reason = "it stands in `map_err`")]
fn malformed(detail: impl ToString) -> Refusal {
    Refusal::new(Reason::Malformed, &detail.to_string())
}

impl Document {
    fn compile(decode: &Decode) -> Result<Self, CompileError> {
        let mut root = Node::default();
        for (slot, field) in decode.fields.iter().enumerate() {
            let pointer = field.pointer.clone().unwrap_or_else(|| format!("/{}", field.name));
            root.insert(&pointer, slot, field.type_ == fleetwright_api::pipeline::FieldType::Json)?;
        }
        if let Some(pointer) = decode.time.as_ref().and_then(|time| time.pointer.as_ref()) {
            root.insert(pointer, decode.fields.len(), false)?;
        }
        let readings = decode.readings.as_deref().map(pointer::tokens).transpose()?.unwrap_or_default();
        Ok(Self { readings, root })
    }
}

#[cfg(test)]
mod format_tests;
#[cfg(test)]
mod tests;
