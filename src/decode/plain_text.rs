//! Payloads that are a single value as text.

use std::borrow::Cow;

use super::dead_letter::DeadLetterCause;
use super::reading::Message;
use super::{Raw, malformed};
use fleetwright_api::pipeline::FieldType;

pub(super) fn decode<'de>(message: &mut Message<'_, 'de>, payload: &'de [u8]) -> Result<(), DeadLetterCause> {
    let text = std::str::from_utf8(payload).map_err(|error| malformed(format!("expected UTF-8: {error}")))?;
    let type_ = message.decoder.rules.first().map_or(FieldType::Text, super::check::Rule::type_);
    if let Some(slot) = message.slots.first_mut() {
        *slot = read(text, type_)?;
    }
    message.finish(None);
    Ok(())
}

/// What the text is as a value of this type; a text, where it is none.
fn read(text: &str, type_: FieldType) -> Result<Raw<'_>, DeadLetterCause> {
    if type_ == FieldType::Text {
        return Ok(Raw::Text(Cow::Borrowed(text)));
    }
    let text = text.trim();
    if text.is_empty() {
        return Err(malformed("expected a value, found nothing"));
    }
    let is = |words: [&str; 3]| words.iter().any(|word| text.eq_ignore_ascii_case(word));
    let integer = || text.parse::<i128>().ok().map(Raw::Integer);
    // Words such as `inf`, which Rust takes for numbers, are none here.
    let float = || text.parse::<f64>().ok().filter(|_| text.ends_with(|end: char| end.is_ascii_digit() || end == '.')).map(Raw::Float);
    let value = match type_ {
        FieldType::Boolean if is(["true", "on", "1"]) => Some(Raw::Boolean(true)),
        FieldType::Boolean if is(["false", "off", "0"]) => Some(Raw::Boolean(false)),
        FieldType::Int64 | FieldType::Timestamp => integer().or_else(float),
        FieldType::Float64 => float(),
        FieldType::Boolean | FieldType::Text | FieldType::Json => None,
    };
    Ok(value.unwrap_or(Raw::Text(Cow::Borrowed(text))))
}
