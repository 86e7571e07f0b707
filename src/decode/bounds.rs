//! The bounds of a message. What is beyond one is refused before it costs memory, so that no message exhausts a worker.
//!
//! They are constants because they follow from the default memory limit of a worker (128 MiB), and because a larger message can be sent as
//! several: no JSON message within the default limit of a Gateway (1 MiB) that has a time in each reading reaches one of them.

use std::cell::Cell;
use std::fmt;

use serde::de::{Deserialize, DeserializeSeed, Deserializer, Error, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Number, Value as Json};

use super::Value;
use super::dead_letter::{DeadLetterCause, Reason};

/// The most readings of a message. 1 MiB of JSON has no more, because a reading with a time takes more than 20 bytes.
pub const MAX_READINGS: usize = 50_000;

/// The most values of a message in a format that groups them by time. Each takes about 100 bytes until its reading is complete.
pub const MAX_VALUES: usize = 100_000;

/// The most bytes of the rows of a message, including the captures of the topic, which each row repeats. Twice what a session holds of
/// other messages.
pub const MAX_ROW_BYTES: usize = 8 * 1024 * 1024;

/// The most memory of a value of the type Json while it is read, in bytes: an array of 250,000 numbers.
const MAX_JSON_BYTES: usize = 16 * 1024 * 1024;

/// The longest name of a device, in bytes: that of a Kubernetes object.
pub const MAX_DEVICE_BYTES: usize = 253;

/// The longest capture of a topic other than the device, in bytes. It suffices for the name of any Kubernetes object.
pub const MAX_CAPTURE_BYTES: usize = 256;

/// The longest name of a SenML record, in bytes. The `metric` of a field has at most 256 characters, of at most 4 bytes each.
pub(super) const MAX_NAME_BYTES: usize = 1024;

/// Bytes of a row beside its values: its index entry, the number of columns, time and device.
const ROW_BYTES: usize = 54;

/// Bytes of a column beside its text: its length, and a number.
const COLUMN_BYTES: usize = 12;

/// The cause of a message beyond a bound.
#[must_use]
pub fn too_large(expected: &str) -> DeadLetterCause {
    DeadLetterCause::new(Reason::TooLarge, &format!("expected {expected}, found more: send several messages"))
}

/// What a message may still use.
#[derive(Debug)]
pub(super) struct Budget {
    readings: usize,
    bytes: usize,
    /// The bytes of each row beside its texts.
    row: usize,
}

impl Budget {
    /// The budget of a message whose rows have this number of fields and of bytes of captures.
    pub fn new(fields: usize, capture_bytes: usize) -> Self {
        Self { readings: MAX_READINGS, bytes: MAX_ROW_BYTES, row: ROW_BYTES + fields * COLUMN_BYTES + capture_bytes }
    }

    /// Takes a reading that is refused.
    pub fn take_refused(&mut self) -> Result<(), DeadLetterCause> {
        match self.readings.checked_sub(1) {
            Some(readings) => self.readings = readings,
            None => return Err(too_large(&format!("at most {MAX_READINGS} readings"))),
        }
        Ok(())
    }

    /// Takes a reading with these values.
    pub fn take(&mut self, values: &[Value<'_>]) -> Result<(), DeadLetterCause> {
        self.take_refused()?;
        let texts = values.iter().map(|value| match value {
            Value::Text(text) | Value::Json(text) => text.len(),
            _ => 0,
        });
        match self.bytes.checked_sub(self.row + texts.sum::<usize>()) {
            Some(bytes) => self.bytes = bytes,
            None => return Err(too_large(&format!("rows of at most {MAX_ROW_BYTES} bytes together"))),
        }
        Ok(())
    }
}

/// Memory of a JSON value, in bytes, with the unused part of the array that contains it.
const JSON_VALUE_BYTES: usize = 64;

/// Memory of a JSON object, in bytes: the first node of its map.
const JSON_OBJECT_BYTES: usize = 640;

/// Reads a JSON value whose memory is bounded: an object of a few bytes takes a hundred times as much.
pub(super) fn read_json<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Json, D::Error> {
    JsonSeed(&Cell::new(MAX_JSON_BYTES)).deserialize(deserializer)
}

#[derive(Clone, Copy)]
struct JsonSeed<'b>(&'b Cell<usize>);

impl JsonSeed<'_> {
    fn take<E: Error>(self, bytes: usize) -> Result<(), E> {
        match self.0.get().checked_sub(bytes) {
            Some(left) => self.0.set(left),
            None => return Err(E::custom(format!("a value of the type Json needs more than {MAX_JSON_BYTES} bytes of memory"))),
        }
        Ok(())
    }

    fn text<E: Error>(self, text: &str) -> Result<Json, E> {
        self.take(text.len())?;
        Ok(Json::String(text.to_owned()))
    }
}

impl<'de> DeserializeSeed<'de> for JsonSeed<'_> {
    type Value = Json;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Json, D::Error> {
        self.take(JSON_VALUE_BYTES)?;
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for JsonSeed<'_> {
    type Value = Json;

    fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("a value that JSON can express")
    }

    fn visit_bool<E: Error>(self, truth: bool) -> Result<Json, E> {
        Ok(Json::Bool(truth))
    }

    fn visit_i64<E: Error>(self, number: i64) -> Result<Json, E> {
        Ok(number.into())
    }

    fn visit_u64<E: Error>(self, number: u64) -> Result<Json, E> {
        Ok(number.into())
    }

    fn visit_f64<E: Error>(self, number: f64) -> Result<Json, E> {
        Ok(Number::from_f64(number).map_or(Json::Null, Json::Number))
    }

    fn visit_str<E: Error>(self, text: &str) -> Result<Json, E> {
        self.text(text)
    }

    fn visit_unit<E: Error>(self) -> Result<Json, E> {
        Ok(Json::Null)
    }

    fn visit_none<E: Error>(self) -> Result<Json, E> {
        Ok(Json::Null)
    }

    fn visit_some<D: Deserializer<'de>>(self, deserializer: D) -> Result<Json, D::Error> {
        deserializer.deserialize_any(self)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut sequence: A) -> Result<Json, A::Error> {
        let mut elements = Vec::new();
        while let Some(element) = sequence.next_element_seed(self)? {
            elements.push(element);
        }
        Ok(Json::Array(elements))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Json, A::Error> {
        self.take(JSON_OBJECT_BYTES)?;
        let mut members = Map::new();
        while let Some(Key(key)) = map.next_key()? {
            self.take(key.len())?;
            members.insert(key, map.next_value_seed(self)?);
        }
        Ok(Json::Object(members))
    }
}

/// A key of an object.
struct Key(String);

impl<'de> Deserialize<'de> for Key {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer).map(Self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_budget_ends_with_the_readings_or_with_the_bytes() {
        let mut budget = Budget::new(1, 0);
        for _ in 0..MAX_READINGS {
            assert_eq!(budget.take(&[Value::Int64(1)]), Ok(()));
        }
        assert_eq!(budget.take(&[Value::Int64(1)]).map_err(|cause| cause.reason), Err(Reason::TooLarge));

        let mut budget = Budget::new(1, 3_000);
        let fitting = (0..MAX_READINGS).take_while(|_| budget.take(&[Value::Int64(1)]).is_ok()).count();
        assert!((2_000..3_000).contains(&fitting), "each row repeats the captures: {fitting}");

        let text = "x".repeat(MAX_ROW_BYTES);
        assert!(Budget::new(1, 0).take(&[Value::Text(text.as_str().into())]).is_err());
    }

    #[test]
    fn json_is_read_as_serde_json_does_up_to_its_memory() {
        let text = r#"{"a":[1,-2,1.5,null,true,"x\n",{"b":{}}],"a2":18446744073709551615}"#;
        let read = |text: &str| read_json(&mut serde_json::Deserializer::from_str(text)).map_err(|error| error.to_string());
        assert_eq!(read(text), Ok(serde_json::from_str(text).unwrap()));
        assert!(read(&format!("[{}0]", r#"{"":0},"#.repeat(100_000))).is_err());
        assert!(read(&format!("[{}0]", "0,".repeat(200_000))).is_ok());
    }
}
