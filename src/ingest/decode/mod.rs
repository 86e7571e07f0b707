//! From a payload to readings: what a Pipeline's `decode` says, compiled once.
//!
//! The payload is read in one pass, without a value of its own for what stands in it: numbers, and texts that need no
//! unescaping, go from the payload into a reused slot a field, are checked, and are handed over as a reading.

mod check;
mod json;
mod pointer;
pub mod time;

use std::borrow::Cow;

use self::check::Rule;
use self::pointer::Node;
use self::time::Time;
use super::dead_letter::Refusal;
use crate::api::pipeline::{Decode, Format, TimeUnit};

/// A value that passed its checks.
#[derive(Clone, Debug, PartialEq)]
pub enum Value<'a> {
    /// Not there, or null.
    Null,
    /// Never NaN and never infinite: JSON has neither.
    Float64(f64),
    /// A whole number.
    Int64(i64),
    /// A truth value.
    Boolean(bool),
    /// A text without U+0000.
    Text(Cow<'a, str>),
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
    Array,
    Object,
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
}

/// What becomes of a message.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Outcome {
    /// Every reading was handed over.
    Complete,
    /// The good readings were handed over; of the others the first few are named.
    Partial(Refusal),
    /// The payload is not of the format: what was handed over before that showed must be dropped.
    Malformed(Refusal),
}

/// Decodes the payloads of a Pipeline.
#[derive(Clone, Debug)]
pub struct Decoder {
    root: Node,
    /// A rule a field, in the order of the columns.
    rules: Vec<Rule>,
    time: Option<TimeUnit>,
}

impl Decoder {
    /// Compiles `spec.decode`.
    ///
    /// # Errors
    /// When a pointer is none. The CRD lets no such pass.
    pub fn compile(decode: &Decode) -> Result<Self, CompileError> {
        let Format::Json = decode.format;
        let mut root = Node::default();
        for (slot, field) in decode.fields.iter().enumerate() {
            let pointer = field.pointer.clone().unwrap_or_else(|| format!("/{}", field.name));
            root.insert(&pointer, slot)?;
        }
        if let Some(time) = &decode.time {
            root.insert(&time.pointer, decode.fields.len())?;
        }
        let rules = decode.fields.iter().map(Rule::from).collect();
        Ok(Self { root, rules, time: decode.time.as_ref().map(|time| time.unit) })
    }

    /// Whether readings are timed by their arrival.
    #[must_use]
    pub fn takes_arrival_time(&self) -> bool {
        self.time.is_none()
    }

    /// Decodes a message that arrived at `arrival`, and hands each good reading over: its time, if the payload gives one,
    /// and a value a field, in the order of the fields.
    pub fn decode(&self, payload: &[u8], arrival: Time, reading: impl FnMut(Option<Time>, &[Value<'_>])) -> Outcome {
        json::decode(self, payload, arrival, reading)
    }
}

#[cfg(test)]
mod tests;
