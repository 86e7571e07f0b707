//! Decodes the payload of a message into readings with typed values, by a Pipeline's `decode`, which is compiled once. Knows no database.
//!
//! A payload is read in one pass, without an intermediate representation: numbers, and texts without escapes, go from the payload into
//! a reused slot per field, are checked, and are passed to the observer of readings ([`stream::ReadingObserver`]). That is the point where
//! the values of a message are known, and where every consumer of them attaches.
//!
//! A crate because every reading passes through it: it is compiled for speed, the rest of the program for size. So nothing here is
//! generic over types of a caller: such code would be compiled with the caller.

pub mod bounds;
mod cbor;
mod check;
pub mod dead_letter;
mod document;
mod group_by_time;
mod plain_text;
mod pointer;
pub mod protobuf;
mod reading;
mod senml;
pub mod sparkplug;
pub mod stream;
pub mod time;
mod wire;

use std::borrow::Cow;

use serde::de::DeserializeSeed;

use self::check::{Rule, Timing};
use self::dead_letter::{DeadLetterCause, Reason};
use self::group_by_time::Names;
use self::pointer::Node;
use self::protobuf::Reader;
use self::reading::{Message, OnReading};
use self::sparkplug::SparkplugState;
use self::time::Time;
use fleetwright_api::condition::Cause;
use fleetwright_api::duration;
use fleetwright_api::pipeline::{Decode, Format};
use fleetwright_api::reason::Reason as ConditionReason;

/// A value that passed its checks.
#[derive(Clone, Debug, PartialEq)]
pub enum Value<'a> {
    /// Absent, or null.
    Null,
    /// Never NaN and never infinite.
    Float64(f64),
    /// A whole number.
    Int64(i64),
    /// A truth value.
    Boolean(bool),
    /// A text without U+0000.
    Text(Cow<'a, str>),
    /// A time from 4713 BC on.
    Timestamp(Time),
    /// JSON as text; no string of it holds U+0000.
    Json(Cow<'a, str>),
}

/// The value in a payload that the pointer of a field refers to.
#[derive(Clone, Debug, PartialEq)]
enum Raw<'a> {
    Absent,
    Null,
    Boolean(bool),
    Integer(i128),
    Float(f64),
    Text(Cow<'a, str>),
    /// A time whose unit the format defines.
    Time(Time),
    /// JSON as text.
    Json(String),
    /// A value that no type of a field accepts: its description.
    Other(&'static str),
}

/// Why a `decode` cannot be compiled.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
pub enum CompileError {
    /// A text is not a pointer.
    #[error("failed to read the pointer {pointer:?}: expected a JSON pointer (RFC 6901) such as /values/rms")]
    ReadPointer {
        /// The pointer.
        pointer: String,
    },

    /// A text is not a duration.
    #[error("failed to read the duration {text:?}: expected {}", duration::EXPECTED)]
    ReadDuration {
        /// The text.
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

    /// The format sends only changed values.
    #[error(
        "failed to use the default of the field {field}: Sparkplug B sends only changed values, so that the default would replace values that have not changed; remove it"
    )]
    DefaultChange {
        /// The field.
        field: String,
    },

    /// The FileDescriptorSet does not fit.
    #[error(transparent)]
    Describe(#[from] protobuf::DescribeError),
}

impl CompileError {
    /// The cause for the condition of the Pipeline. An error in the FileDescriptorSet is corrected in its ConfigMap, not in the Pipeline.
    #[must_use]
    pub fn cause(&self) -> Cause {
        let reason = if matches!(self, Self::Describe(_)) { ConditionReason::DescriptorMismatch } else { ConditionReason::InvalidSpec };
        Cause::new(reason, self.to_string())
    }
}

/// The result of decoding a message.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Outcome {
    /// Every reading was passed on.
    Complete,
    /// The valid readings were passed on. The cause names the first of the others.
    Partial(DeadLetterCause),
    /// The message is invalid as a whole: readings that were passed on before must be discarded.
    Malformed(DeadLetterCause),
}

/// The payload of a message as far as [`Decoder::observe`] parsed it; by default, not at all.
#[derive(Debug, Default)]
pub struct Parsed {
    sparkplug: Option<Result<sparkplug::payload::Payload, DeadLetterCause>>,
}

impl Parsed {
    fn of(payload: Result<sparkplug::payload::Payload, DeadLetterCause>) -> Self {
        Self { sparkplug: Some(payload) }
    }
}

/// Decodes the payloads of a Pipeline.
#[derive(Clone, Debug)]
pub struct Decoder {
    plan: Plan,
    /// A rule for each field, in the order of the fields.
    rules: Vec<Rule>,
    timing: Timing,
}

/// The compiled form of a format.
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

/// The positions of the readings and their fields in a document.
#[derive(Clone, Debug)]
struct Document {
    readings: Vec<String>,
    root: Node,
}

impl Decoder {
    /// Compiles `spec.decode`. `descriptor` is the FileDescriptorSet of the format Protobuf.
    ///
    /// # Errors
    /// When it is invalid in a way that the schema of the CRD does not exclude.
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

    /// Whether readings have their time of arrival, or may have it: then no key identifies a redelivery.
    #[must_use]
    pub fn takes_arrival_time(&self) -> bool {
        match self.plan {
            Plan::Json(_) | Plan::Cbor(_) | Plan::Protobuf(_) => !self.timing.is_in_payload,
            Plan::PlainText | Plan::SenMl(_) | Plan::SenMlCbor(_) | Plan::SparkplugB(_) => true,
        }
    }

    /// Observes a message, in the order of arrival, before it is decoded. `None` if it has no readings of devices with topics of
    /// `levels` levels. Only Sparkplug B has a state between messages; its payload is parsed here, and only once.
    pub fn observe(&self, state: &mut SparkplugState, topic: &str, levels: usize, payload: &[u8]) -> Option<Parsed> {
        match &self.plan {
            Plan::SparkplugB(names) => sparkplug::observe(names, state, topic, levels, payload),
            _ => Some(Parsed::default()),
        }
    }

    /// Decodes a message that arrived at `arrival`, and passes each valid reading to `on_reading`: its time, if the payload has one, and
    /// a value for each field, in the order of the fields. `parsed` is what [`Self::observe`] returned, or the default. `capture_bytes` is
    /// the length of what each row repeats of the topic; it counts for the bounds of the message.
    #[allow(clippy::too_many_arguments, reason = "each is a part of the message")]
    pub fn decode<'a>(
        &'a self,
        state: &SparkplugState,
        topic: &str,
        payload: &[u8],
        parsed: Parsed,
        arrival: Time,
        capture_bytes: usize,
        on_reading: &'a mut OnReading<'a>,
    ) -> Outcome {
        let mut message = Message::new(self, arrival, capture_bytes, on_reading);
        let read = match &self.plan {
            Plan::Json(document) => document::json(&mut message, document, payload),
            Plan::Cbor(document) => document::cbor(&mut message, document, payload),
            Plan::SenMl(names) => senml::json(&mut message, names, payload),
            Plan::SenMlCbor(names) => senml::cbor(&mut message, names, payload),
            Plan::SparkplugB(names) => sparkplug::decode(&mut message, names, state, topic, payload, parsed),
            Plan::PlainText => plain_text::decode(&mut message, payload),
            Plan::Protobuf(reader) => reader.decode(&mut message, payload).map_err(|error| malformed(error.0)),
        };
        message.outcome(read)
    }
}

/// Reads a payload that is one JSON text and nothing else.
///
/// Text is read a fifth faster than bytes, each of whose strings must be checked for UTF-8 separately. Bytes that are not UTF-8 may still
/// be valid in the members that fields use.
fn from_json<'de, S: DeserializeSeed<'de>>(payload: &'de [u8], seed: S) -> Result<S::Value, DeadLetterCause> {
    match std::str::from_utf8(payload) {
        Ok(text) => read_json(serde_json::Deserializer::from_str(text), seed),
        Err(_) => read_json(serde_json::Deserializer::from_slice(payload), seed),
    }
}

fn read_json<'de, R: serde_json::de::Read<'de>, S: DeserializeSeed<'de>>(
    mut deserializer: serde_json::Deserializer<R>,
    seed: S,
) -> Result<S::Value, DeadLetterCause> {
    let value = seed.deserialize(&mut deserializer).map_err(malformed)?;
    deserializer.end().map_err(malformed)?;
    Ok(value)
}

/// Reads a payload that is one CBOR data item and nothing else.
fn from_cbor<'de, S: DeserializeSeed<'de>>(payload: &'de [u8], seed: S) -> Result<S::Value, DeadLetterCause> {
    let mut deserializer = cbor::Deserializer::new(payload);
    let value = seed.deserialize(&mut deserializer).map_err(malformed)?;
    deserializer.end().map_err(malformed)?;
    Ok(value)
}

#[allow(clippy::needless_pass_by_value, reason = "it stands in `map_err`")]
fn malformed(detail: impl ToString) -> DeadLetterCause {
    DeadLetterCause::new(Reason::Malformed, &detail.to_string())
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
mod bounds_tests;
#[cfg(test)]
mod format_tests;
#[cfg(test)]
mod tests;
