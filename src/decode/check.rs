//! The checks of a field: type, range, presence.

use std::borrow::Cow;

use super::dead_letter::{DeadLetterCause, Reason, excerpt};
use super::time::Time;
use super::{CompileError, Raw, Value};
use fleetwright_api::duration;
use fleetwright_api::pipeline::{Decode, Field, FieldType, TimeUnit};

/// The rule for the value of a field.
#[derive(Clone, Debug)]
pub(super) struct Rule {
    name: String,
    type_: FieldType,
    time_unit: TimeUnit,
    /// Factor and addend of a Float64.
    adjustment: Option<(f64, f64)>,
    min: Option<f64>,
    max: Option<f64>,
    required: bool,
    default: Value<'static>,
    /// The required unit of a value, if the payload has units.
    pub unit: Option<String>,
}

impl Rule {
    /// Compiles a field.
    pub fn compile(field: &Field) -> Result<Self, CompileError> {
        let adjusted = field.scale.is_some() || field.offset.is_some();
        let mut rule = Self {
            name: field.name.clone(),
            type_: field.type_,
            time_unit: TimeUnit::Rfc3339,
            adjustment: None,
            min: field.min,
            max: field.max,
            required: field.required,
            default: Value::Null,
            unit: field.unit.clone().filter(|_| !adjusted),
        };
        if let Some(default) = &field.default {
            let checked = rule.check(&mut Raw::of_json(default, field.type_ == FieldType::Json));
            rule.default = checked
                .map(Value::into_owned)
                .map_err(|cause| CompileError::ReadDefault { field: field.name.clone(), detail: cause.detail })?;
        }
        rule.time_unit = field.time_unit.unwrap_or(TimeUnit::Rfc3339);
        rule.adjustment = adjusted.then(|| (field.scale.unwrap_or(1.0), field.offset.unwrap_or(0.0)));
        Ok(rule)
    }

    /// The type of the field.
    pub fn type_(&self) -> FieldType {
        self.type_
    }

    /// Checks a value of the payload, and replaces it by an absent one.
    pub fn check<'a>(&self, raw: &mut Raw<'a>) -> Result<Value<'a>, DeadLetterCause> {
        #[allow(clippy::cast_precision_loss, reason = "an integer may stand for a Float64, as everywhere in JSON")]
        let value = match (std::mem::replace(raw, Raw::Absent), self.type_) {
            (Raw::Absent | Raw::Null, _) if self.default != Value::Null => return Ok(self.default.clone()),
            (Raw::Absent | Raw::Null, _) if !self.required => return Ok(Value::Null),
            (Raw::Absent, _) => return Err(self.refuse(Reason::MissingField, "a value", "nothing")),
            (Raw::Null, _) => return Err(self.refuse(Reason::MissingField, "a value", "null")),
            (Raw::Float(number), FieldType::Float64) => self.float(number)?,
            (Raw::Integer(number), FieldType::Float64) => self.float(number as f64)?,
            (Raw::Integer(number), FieldType::Int64) => match i64::try_from(number) {
                Ok(number) => Value::Int64(number),
                Err(_) => return Err(self.refuse(Reason::OutOfRange, "a number of 64 bits", &number.to_string())),
            },
            (Raw::Boolean(truth), FieldType::Boolean) => Value::Boolean(truth),
            (Raw::Text(text), FieldType::Text) if text.contains('\0') => return Err(self.refuse_nul(&text)),
            (Raw::Text(text), FieldType::Text) => Value::Text(text),
            (Raw::Json(text), FieldType::Json) if text.contains("\\u0000") && holds_nul(&text) => return Err(self.refuse_nul(&text)),
            (Raw::Json(text), FieldType::Json) => Value::Json(Cow::Owned(text)),
            (found, FieldType::Timestamp) => self.timestamp(&found)?,
            (found, _) => return Err(self.refuse(Reason::WrongType, type_name(self.type_), &describe(&found))),
        };
        self.check_range(&value)?;
        Ok(value)
    }

    fn float(&self, number: f64) -> Result<Value<'static>, DeadLetterCause> {
        let adjusted = self.adjustment.map_or(number, |(scale, offset)| number * scale + offset);
        if adjusted.is_finite() {
            Ok(Value::Float64(adjusted))
        } else {
            Err(self.refuse(Reason::OutOfRange, "a finite number", &adjusted.to_string()))
        }
    }

    fn timestamp(&self, raw: &Raw<'_>) -> Result<Value<'static>, DeadLetterCause> {
        match read_time(raw, self.time_unit) {
            Read::Time(time) if time.is_in_range() => Ok(Value::Timestamp(time)),
            Read::Time(_) => Err(self.refuse(Reason::OutOfRange, "a time from 4713 BC to 294247 AD", &describe(raw))),
            Read::Beyond => Err(self.refuse(Reason::OutOfRange, unit_name(self.time_unit), &describe(raw))),
            Read::Nothing => Err(self.refuse(Reason::WrongType, unit_name(self.time_unit), &describe(raw))),
        }
    }

    fn check_range(&self, value: &Value<'_>) -> Result<(), DeadLetterCause> {
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

    fn refuse_nul(&self, text: &str) -> DeadLetterCause {
        self.refuse(Reason::OutOfRange, "a text without U+0000", &excerpt(text))
    }

    /// The cause for refusing the value of this field.
    pub fn refuse(&self, reason: Reason, expected: &str, found: &str) -> DeadLetterCause {
        DeadLetterCause::new(reason, &format!("field {}: expected {expected}, found {found}", self.name))
    }
}

/// Whether a string in this JSON has U+0000: its escape, unless preceded by another backslash.
fn holds_nul(json: &str) -> bool {
    let mut escaped = false;
    json.char_indices().any(|(index, character)| {
        let begins = character == '\\' && !escaped;
        let found = escaped && json[index..].starts_with("u0000");
        escaped = begins;
        found
    })
}

/// The accepted times, and their unit.
#[derive(Clone, Debug)]
pub(super) struct Timing {
    /// Whether a pointer refers to the time.
    pub is_in_payload: bool,
    unit: TimeUnit,
    max_age: i64,
    max_ahead: i64,
    /// The bounds, for the detail of a cause.
    bounds: String,
}

impl Timing {
    /// Compiles the times of a `decode`.
    pub fn compile(decode: &Decode) -> Result<Self, CompileError> {
        let time = decode.time.clone().unwrap_or_default();
        Ok(Self {
            is_in_payload: time.pointer.is_some(),
            unit: time.unit,
            max_age: microseconds(&time.max_age)?,
            max_ahead: microseconds(&time.max_ahead)?,
            bounds: format!("from {} before the arrival (maxAge) to {} after it", time.max_age, time.max_ahead),
        })
    }

    /// Whether a reading that arrived at `arrival` can have this time. A clock that was never set starts in 1970, and a
    /// time in the wrong unit is near 1970: neither is accepted.
    fn admits(&self, time: Time, arrival: Time) -> bool {
        time >= Time::YEAR_2000 && time >= arrival.after(-self.max_age) && time <= arrival.after(self.max_ahead)
    }

    /// Checks a time that the format defines.
    pub fn check_known(&self, time: Time, arrival: Time) -> Result<Time, DeadLetterCause> {
        if self.admits(time, arrival) {
            return Ok(time);
        }
        Err(DeadLetterCause::new(Reason::TimeOutOfRange, &format!("time: expected one {}, found {time}", self.bounds)))
    }

    /// Checks the time to which a pointer refers.
    pub fn check(&self, raw: &mut Raw<'_>, arrival: Time) -> Result<Time, DeadLetterCause> {
        let raw = std::mem::replace(raw, Raw::Absent);
        let expected = unit_name(self.unit);
        let refuse =
            |reason, expected: &str| Err(DeadLetterCause::new(reason, &format!("time: expected {expected}, found {}", describe(&raw))));
        match read_time(&raw, self.unit) {
            Read::Time(time) if self.admits(time, arrival) => Ok(time),
            Read::Time(_) | Read::Beyond => refuse(Reason::TimeOutOfRange, &format!("{expected}, {}", self.bounds)),
            Read::Nothing if matches!(raw, Raw::Absent | Raw::Null) => refuse(Reason::MissingTime, expected),
            Read::Nothing => refuse(Reason::WrongType, expected),
        }
    }
}

/// The microseconds of a duration.
fn microseconds(text: &str) -> Result<i64, CompileError> {
    duration::microseconds(text).ok_or_else(|| CompileError::ReadDuration { text: text.to_owned() })
}

/// A value as a time.
enum Read {
    Time(Time),
    /// A number beyond 64 bits of microseconds.
    Beyond,
    /// Not a time, or one in another unit.
    Nothing,
}

fn read_time(raw: &Raw<'_>, unit: TimeUnit) -> Read {
    let number = |time: Option<Time>| time.map_or(Read::Beyond, Read::Time);
    match (raw, unit) {
        (Raw::Time(time), _) => Read::Time(*time),
        (Raw::Text(text), TimeUnit::Rfc3339) => Time::from_text(text).map_or(Read::Nothing, Read::Time),
        (_, TimeUnit::Rfc3339) => Read::Nothing,
        (Raw::Integer(value), _) => number(Time::from_integer(*value, unit)),
        (Raw::Float(value), _) => number(Time::from_float(*value, unit)),
        _ => Read::Nothing,
    }
}

fn unit_name(unit: TimeUnit) -> &'static str {
    match unit {
        TimeUnit::Seconds => "seconds since 1970",
        TimeUnit::Milliseconds => "milliseconds since 1970",
        TimeUnit::Microseconds => "microseconds since 1970",
        TimeUnit::Nanoseconds => "nanoseconds since 1970",
        TimeUnit::Rfc3339 => "a text as in RFC 3339",
    }
}

fn type_name(type_: FieldType) -> &'static str {
    match type_ {
        FieldType::Float64 => "a number",
        FieldType::Int64 => "a whole number",
        FieldType::Boolean => "true or false",
        FieldType::Text => "a text",
        FieldType::Timestamp => "a time",
        FieldType::Json => "a JSON value",
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
        Raw::Time(time) => format!("the time {time}"),
        Raw::Json(text) => format!("the JSON {}", excerpt(text)),
        Raw::Other(name) => (*name).to_owned(),
    }
}

impl Raw<'static> {
    /// A JSON value for a field; `whole` for a field that accepts any value.
    pub fn of_json(value: &serde_json::Value, whole: bool) -> Self {
        use serde_json::Value as Json;
        match value {
            Json::Null => Self::Null,
            _ if whole => Self::Json(value.to_string()),
            Json::Bool(truth) => Self::Boolean(*truth),
            Json::Number(number) => match (number.as_i64(), number.as_u64(), number.as_f64()) {
                (Some(number), ..) => Self::Integer(number.into()),
                (_, Some(number), _) => Self::Integer(number.into()),
                (.., number) => number.map_or(Self::Other("a number beyond 64 bits"), Self::Float),
            },
            Json::String(text) => Self::Text(Cow::Owned(text.clone())),
            Json::Array(_) => Self::Other("an array"),
            Json::Object(_) => Self::Other("an object"),
        }
    }
}

impl Value<'_> {
    /// The value without what it borrows.
    #[must_use]
    pub fn into_owned(self) -> Value<'static> {
        match self {
            Self::Null => Value::Null,
            Self::Float64(number) => Value::Float64(number),
            Self::Int64(number) => Value::Int64(number),
            Self::Boolean(truth) => Value::Boolean(truth),
            Self::Text(text) => Value::Text(Cow::Owned(text.into_owned())),
            Self::Timestamp(time) => Value::Timestamp(time),
            Self::Json(text) => Value::Json(Cow::Owned(text.into_owned())),
        }
    }
}
