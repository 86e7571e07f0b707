//! SenML (RFC 8428), as JSON and as CBOR: an array of records, each of which inherits from those before it.

use std::borrow::Cow;
use std::cell::RefCell;
use std::fmt;

use serde::de::{Deserialize, DeserializeSeed, Deserializer, Error, IgnoredAny, MapAccess, SeqAccess, Visitor};

use super::bounds::MAX_NAME_BYTES;
use super::dead_letter::{DeadLetterCause, Reason, excerpt};
use super::group_by_time::{Names, ReadingsByTime};
use super::reading::Message;
use super::time::Time;
use super::{Decoder, Raw, from_cbor, from_json};
use fleetwright_api::pipeline::TimeUnit;

/// The supported version of SenML (RFC 8428, 4.4).
const VERSION: f64 = 10.0;

/// Times below this are seconds from now, not since 1970 (RFC 8428, 4.5.3).
const RELATIVE_BELOW: f64 = 268_435_456.0;

/// Suffix of the metric of a field that takes the sum of a record instead of its value. No SenML name has this character.
const SUM: &str = "#sum";

/// Reads a pack in JSON.
pub(super) fn json<'de>(message: &mut Message<'_, 'de>, names: &Names, payload: &'de [u8]) -> Result<(), DeadLetterCause> {
    let exceeded = RefCell::default();
    let readings = from_json(payload, Resolver::new(message.decoder, message.arrival, names, &exceeded));
    finish(message, readings, exceeded)
}

/// Reads a pack in CBOR.
pub(super) fn cbor<'de>(message: &mut Message<'_, 'de>, names: &Names, payload: &'de [u8]) -> Result<(), DeadLetterCause> {
    let exceeded = RefCell::default();
    let readings = from_cbor(payload, Resolver::new(message.decoder, message.arrival, names, &exceeded));
    finish(message, readings, exceeded)
}

/// `exceeded` is the bound that the pack is beyond. Its error has no reason, because it passes through serde.
fn finish<'de>(
    message: &mut Message<'_, 'de>,
    readings: Result<ReadingsByTime<'de>, DeadLetterCause>,
    exceeded: RefCell<Option<DeadLetterCause>>,
) -> Result<(), DeadLetterCause> {
    let readings = readings.map_err(|error| exceeded.into_inner().unwrap_or(error))?;
    if readings.is_empty() {
        return Err(DeadLetterCause::new(Reason::MissingField, "expected a record with the name of a field, found none"));
    }
    readings.finish(message);
    Ok(())
}

/// The base values of the records read so far.
struct Resolver<'m, 'de> {
    names: &'m Names,
    /// The required unit of each field.
    units: Vec<Option<&'m str>>,
    arrival: Time,
    name: Cow<'de, str>,
    time: f64,
    unit: Option<Cow<'de, str>>,
    value: Option<Number>,
    sum: Option<Number>,
    readings: ReadingsByTime<'de>,
    exceeded: &'m RefCell<Option<DeadLetterCause>>,
}

impl<'m, 'de> Resolver<'m, 'de> {
    fn new(decoder: &'m Decoder, arrival: Time, names: &'m Names, exceeded: &'m RefCell<Option<DeadLetterCause>>) -> Self {
        Self {
            names,
            units: decoder.rules.iter().map(|rule| rule.unit.as_deref()).collect(),
            arrival,
            name: Cow::Borrowed(""),
            time: 0.0,
            unit: None,
            value: None,
            sum: None,
            readings: ReadingsByTime::default(),
            exceeded,
        }
    }

    /// Applies the base values of a record, and adds its values.
    fn resolve(&mut self, record: Record<'de>) -> Result<(), &'static str> {
        if record.version.is_some_and(|version| version.float() > VERSION) {
            return Err("expected SenML of version 10 or older");
        }
        if record.is_beyond {
            return Err("found a label that must be understood and is unknown");
        }
        self.name = record.base_name.unwrap_or_else(|| std::mem::take(&mut self.name));
        self.time = record.base_time.map_or(self.time, Number::float);
        self.unit = record.base_unit.or_else(|| self.unit.take());
        self.value = record.base_value.or(self.value);
        self.sum = record.base_sum.or(self.sum);
        let number = match (record.value, self.value) {
            (Some(value), base) => Some(base.map_or(value, |base| base.plus(value)).raw()),
            // A record with base values only has no value.
            (None, Some(base)) if record.name.is_some() && record.other.is_none() => Some(base.raw()),
            _ => None,
        };
        let sum = match (record.sum, self.sum) {
            (Some(sum), base) => Some(base.map_or(sum, |base| base.plus(sum)).raw()),
            _ => None,
        };
        let value = number.or(record.other);
        if value.is_none() && sum.is_none() {
            return Ok(());
        }
        let own = record.name.unwrap_or_default();
        // Each record repeats the base name.
        if self.name.len() + own.len() > MAX_NAME_BYTES {
            return Err("expected names of at most 1,024 bytes, found a longer one");
        }
        let whole = if self.name.is_empty() { own.clone() } else { Cow::Owned(format!("{}{own}", self.name)) };
        if whole.is_empty() {
            return Err("expected a name in every record, found one without");
        }
        let time = self.read_time(self.time + record.time.map_or(0.0, Number::float))?;
        let unit = record.unit.or_else(|| self.unit.clone());
        if let Some(value) = value {
            self.add(time, unit.as_deref(), &whole, &own, "", &value)?;
        }
        if let Some(sum) = sum {
            // The unit of a sum is the value's times seconds: no field is compared with it.
            self.add(time, None, &whole, &own, SUM, &sum)?;
        }
        Ok(())
    }

    fn read_time(&self, seconds: f64) -> Result<Option<Time>, &'static str> {
        const BEYOND: &str = "expected a time, found a number out of range";
        if seconds.abs() >= RELATIVE_BELOW {
            return Time::from_float(seconds, TimeUnit::Seconds).map(Some).ok_or(BEYOND);
        }
        #[allow(
            clippy::cast_possible_truncation,
            reason = "2^28 seconds are far within 64 bits of microseconds, and what is no number was sorted out"
        )]
        let microseconds = (seconds * 1e6).round() as i64;
        if seconds.is_nan() {
            return Err(BEYOND);
        }
        Ok((microseconds != 0).then(|| self.arrival.after(microseconds)))
    }

    fn add(
        &mut self,
        time: Option<Time>,
        unit: Option<&str>,
        whole: &str,
        own: &str,
        suffix: &str,
        value: &Raw<'de>,
    ) -> Result<(), &'static str> {
        let last = whole.rsplit(['/', ':']).next().unwrap_or_default();
        let slots = [whole, own, last]
            .into_iter()
            .map(|name| if suffix.is_empty() { self.names.slots(name) } else { self.names.slots(&format!("{name}{suffix}")) });
        let Some(slots) = slots.into_iter().find(|slots| !slots.is_empty()) else { return Ok(()) };
        // One name may have several fields, distinguished by their units (RFC 8428, 5.1.3).
        let fits = |slot: &usize| self.units[*slot].is_none_or(|wanted| unit.is_none_or(|unit| unit == wanted));
        let fitting: Vec<usize> = slots.iter().copied().filter(fits).collect();
        let added = if !fitting.is_empty() {
            self.readings.add(time, &fitting, value)
        } else if let (Some(wanted), Some(unit)) = (slots.iter().find_map(|slot| self.units[*slot]), unit) {
            let detail = format!("{}: expected the unit {}, found {}", excerpt(whole), excerpt(wanted), excerpt(unit));
            self.readings.refuse(time, DeadLetterCause::new(Reason::WrongUnit, &detail))
        } else {
            Ok(())
        };
        added.map_err(|cause| {
            *self.exceeded.borrow_mut() = Some(cause);
            "the message is beyond a bound"
        })
    }
}

impl<'de> DeserializeSeed<'de> for Resolver<'_, 'de> {
    type Value = ReadingsByTime<'de>;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<ReadingsByTime<'de>, D::Error> {
        deserializer.deserialize_seq(self)
    }
}

impl<'de> Visitor<'de> for Resolver<'_, 'de> {
    type Value = ReadingsByTime<'de>;

    fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("an array of SenML records")
    }

    fn visit_seq<A: SeqAccess<'de>>(mut self, mut sequence: A) -> Result<ReadingsByTime<'de>, A::Error> {
        while let Some(record) = sequence.next_element()? {
            self.resolve(record).map_err(A::Error::custom)?;
        }
        Ok(self.readings)
    }
}

/// A record (RFC 8428, table 1).
#[derive(Default)]
struct Record<'de> {
    base_name: Option<Cow<'de, str>>,
    base_time: Option<Number>,
    base_unit: Option<Cow<'de, str>>,
    base_value: Option<Number>,
    base_sum: Option<Number>,
    version: Option<Number>,
    name: Option<Cow<'de, str>>,
    unit: Option<Cow<'de, str>>,
    value: Option<Number>,
    /// A value that is not a number.
    other: Option<Raw<'de>>,
    sum: Option<Number>,
    time: Option<Number>,
    /// Whether it has an unknown label that must be understood (RFC 8428, 4.4).
    is_beyond: bool,
}

impl<'de> Deserialize<'de> for Record<'de> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(RecordVisitor)
    }
}

struct RecordVisitor;

impl<'de> Visitor<'de> for RecordVisitor {
    type Value = Record<'de>;

    fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("a SenML record")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Record<'de>, A::Error> {
        let mut record = Record::default();
        while let Some(Text(label)) = map.next_key()? {
            // A label is a text in JSON, and a number in CBOR (RFC 8428, table 4).
            match label.as_ref() {
                "bver" | "-1" => record.version = Some(map.next_value()?),
                "bn" | "-2" => record.base_name = Some(map.next_value::<Text<'_>>()?.0),
                "bt" | "-3" => record.base_time = Some(map.next_value()?),
                "bu" | "-4" => record.base_unit = Some(map.next_value::<Text<'_>>()?.0),
                "bv" | "-5" => record.base_value = Some(map.next_value()?),
                "bs" | "-6" => record.base_sum = Some(map.next_value()?),
                "n" | "0" => record.name = Some(map.next_value::<Text<'_>>()?.0),
                "u" | "1" => record.unit = Some(map.next_value::<Text<'_>>()?.0),
                "v" | "2" => record.value = Some(map.next_value()?),
                "vs" | "3" => record.other = Some(Raw::Text(map.next_value::<Text<'_>>()?.0)),
                "vb" | "4" => record.other = Some(Raw::Boolean(map.next_value()?)),
                "s" | "5" => record.sum = Some(map.next_value()?),
                "t" | "6" => record.time = Some(map.next_value()?),
                "vd" | "8" => {
                    map.next_value::<IgnoredAny>()?;
                    record.other = Some(Raw::Other("data"));
                }
                other => {
                    record.is_beyond |= other.ends_with('_');
                    map.next_value::<IgnoredAny>()?;
                }
            }
        }
        Ok(record)
    }
}

/// A text, borrowed if possible.
struct Text<'de>(Cow<'de, str>);

impl<'de> Deserialize<'de> for Text<'de> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_str(TextVisitor)
    }
}

struct TextVisitor;

impl<'de> Visitor<'de> for TextVisitor {
    type Value = Text<'de>;

    fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("a text")
    }

    fn visit_borrowed_str<E: Error>(self, text: &'de str) -> Result<Text<'de>, E> {
        Ok(Text(Cow::Borrowed(text)))
    }

    fn visit_str<E: Error>(self, text: &str) -> Result<Text<'de>, E> {
        Ok(Text(Cow::Owned(text.to_owned())))
    }
}

/// A number, an integer if it is written as one.
#[derive(Clone, Copy)]
enum Number {
    Whole(i128),
    Float(f64),
}

impl Number {
    #[allow(clippy::cast_precision_loss, reason = "SenML's numbers are doubles (RFC 8428, 4.3)")]
    fn float(self) -> f64 {
        match self {
            Self::Whole(number) => number as f64,
            Self::Float(number) => number,
        }
    }

    fn plus(self, other: Self) -> Self {
        match (self, other) {
            (Self::Whole(one), Self::Whole(other)) => one.checked_add(other).map_or(Self::Float(f64::NAN), Self::Whole),
            (one, other) => Self::Float(one.float() + other.float()),
        }
    }

    fn raw<'de>(self) -> Raw<'de> {
        match self {
            Self::Whole(number) => Raw::Integer(number),
            Self::Float(number) => Raw::Float(number),
        }
    }
}

impl<'de> Deserialize<'de> for Number {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(NumberVisitor)
    }
}

struct NumberVisitor;

impl Visitor<'_> for NumberVisitor {
    type Value = Number;

    fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("a number")
    }

    fn visit_i64<E: Error>(self, number: i64) -> Result<Number, E> {
        Ok(Number::Whole(number.into()))
    }

    fn visit_u64<E: Error>(self, number: u64) -> Result<Number, E> {
        Ok(Number::Whole(number.into()))
    }

    fn visit_i128<E: Error>(self, number: i128) -> Result<Number, E> {
        Ok(Number::Whole(number))
    }

    fn visit_f64<E: Error>(self, number: f64) -> Result<Number, E> {
        Ok(Number::Float(number))
    }
}
