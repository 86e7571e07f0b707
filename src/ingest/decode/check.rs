//! The checks of a field: type, range, presence.

use super::{Raw, Value};
use crate::api::pipeline::{Field, FieldType, TimeUnit};
use crate::ingest::dead_letter::{Reason, Refusal, excerpt};
use crate::ingest::decode::time::Time;

/// What a field's value must be.
#[derive(Clone, Debug)]
pub(super) struct Rule {
    name: String,
    type_: FieldType,
    min: Option<f64>,
    max: Option<f64>,
    required: bool,
}

impl From<&Field> for Rule {
    fn from(field: &Field) -> Self {
        Self { name: field.name.clone(), type_: field.type_, min: field.min, max: field.max, required: field.required }
    }
}

impl Rule {
    /// Checks what stands in the payload. Leaves an absent value in its place.
    pub fn check<'a>(&self, raw: &mut Raw<'a>) -> Result<Value<'a>, Refusal> {
        #[allow(clippy::cast_precision_loss, reason = "an integer may stand for a Float64, as everywhere in JSON")]
        let value = match (std::mem::replace(raw, Raw::Absent), self.type_) {
            (Raw::Absent | Raw::Null, _) if !self.required => return Ok(Value::Null),
            (Raw::Float(number), FieldType::Float64) => Value::Float64(number),
            (Raw::Integer(number), FieldType::Float64) => Value::Float64(number as f64),
            (Raw::Integer(number), FieldType::Int64) => match i64::try_from(number) {
                Ok(number) => Value::Int64(number),
                Err(_) => return Err(self.refuse(Reason::OutOfRange, "a number of 64 bits", &number.to_string())),
            },
            (Raw::Boolean(truth), FieldType::Boolean) => Value::Boolean(truth),
            (Raw::Text(text), FieldType::Text) if text.contains('\0') => {
                return Err(self.refuse(Reason::OutOfRange, "a text without U+0000, which PostgreSQL does not store", &excerpt(&text)));
            }
            (Raw::Text(text), FieldType::Text) => Value::Text(text),
            (Raw::Absent, _) => return Err(self.refuse(Reason::MissingField, "a value", "nothing")),
            (Raw::Null, _) => return Err(self.refuse(Reason::MissingField, "a value", "null")),
            (found, _) => return Err(self.refuse(Reason::WrongType, type_name(self.type_), &describe(&found))),
        };
        self.check_range(&value)?;
        Ok(value)
    }

    fn check_range(&self, value: &Value<'_>) -> Result<(), Refusal> {
        if self.min.is_none() && self.max.is_none() {
            return Ok(());
        }
        #[allow(clippy::cast_precision_loss, reason = "the bounds are doubles themselves")]
        let (number, shown) = match value {
            Value::Float64(number) => (*number, number as &dyn std::fmt::Display),
            Value::Int64(number) => (*number as f64, number as &dyn std::fmt::Display),
            _ => return Ok(()),
        };
        if let Some(min) = self.min.filter(|min| number < *min) {
            return Err(self.refuse(Reason::OutOfRange, &format!("at least {min}"), &shown.to_string()));
        }
        if let Some(max) = self.max.filter(|max| number > *max) {
            return Err(self.refuse(Reason::OutOfRange, &format!("at most {max}"), &shown.to_string()));
        }
        Ok(())
    }

    fn refuse(&self, reason: Reason, expected: &str, found: &str) -> Refusal {
        Refusal::new(reason, &format!("field {}: expected {expected}, found {found}", self.name))
    }
}

/// Checks the time of a reading.
pub(super) fn check_time(raw: &mut Raw<'_>, unit: TimeUnit, arrival: Time) -> Result<Time, Refusal> {
    let raw = std::mem::replace(raw, Raw::Absent);
    let expected = match unit {
        TimeUnit::Seconds => "seconds since 1970",
        TimeUnit::Milliseconds => "milliseconds since 1970",
        TimeUnit::Microseconds => "microseconds since 1970",
        TimeUnit::Nanoseconds => "nanoseconds since 1970",
        TimeUnit::Rfc3339 => "a text as in RFC 3339",
    };
    let refuse = |reason, expected: &str| Err(Refusal::new(reason, &format!("time: expected {expected}, found {}", describe(&raw))));
    let time = match (&raw, unit) {
        (Raw::Absent | Raw::Null, _) => return refuse(Reason::MissingTime, expected),
        (Raw::Text(text), TimeUnit::Rfc3339) => Time::from_text(text),
        (_, TimeUnit::Rfc3339) => return refuse(Reason::WrongType, expected),
        (Raw::Integer(number), _) => Time::from_integer(*number, unit),
        (Raw::Float(number), _) => Time::from_float(*number, unit),
        _ => return refuse(Reason::WrongType, expected),
    };
    match time {
        Some(time) if time.is_plausible(arrival) => Ok(time),
        None if unit == TimeUnit::Rfc3339 => refuse(Reason::WrongType, expected),
        _ => refuse(Reason::TimeOutOfRange, &format!("{expected}, from the year 2000 to a day after the arrival")),
    }
}

fn type_name(type_: FieldType) -> &'static str {
    match type_ {
        FieldType::Float64 => "a number",
        FieldType::Int64 => "a whole number",
        FieldType::Boolean => "true or false",
        FieldType::Text => "a text",
    }
}

fn describe(raw: &Raw<'_>) -> String {
    match raw {
        Raw::Absent => "nothing".to_owned(),
        Raw::Null => "null".to_owned(),
        Raw::Boolean(truth) => truth.to_string(),
        Raw::Integer(number) => number.to_string(),
        Raw::Float(number) => format!("{number:?}"),
        Raw::Text(text) => format!("the text {}", excerpt(text)),
        Raw::Array => "an array".to_owned(),
        Raw::Object => "an object".to_owned(),
    }
}
