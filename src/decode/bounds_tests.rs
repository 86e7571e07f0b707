use std::sync::Arc;

use fleetwright_api::pipeline::Format;
use fleetwright_api::topic::TopicPattern;
use serde_json::json;

use super::bounds::{MAX_CAPTURE_BYTES, MAX_DEVICE_BYTES, MAX_NAME_BYTES, MAX_READINGS, MAX_ROW_BYTES, MAX_VALUES};
use super::dead_letter::Reason;
use super::stream::Stream;
use super::tests::{decoder, reason, run};
use super::time::Time;
use super::*;

fn decoder_of(format: &str) -> Decoder {
    decoder(&json!({"format": format, "fields": [{"name": "n", "type": "Int64"}]}))
}

fn list(element: impl Fn(usize) -> String, count: usize) -> Vec<u8> {
    format!("[{}]", (0..count).map(element).collect::<Vec<_>>().join(",")).into_bytes()
}

#[test]
fn a_message_has_a_bounded_number_of_readings_and_values() {
    let senml = |number: usize| format!(r#"{{"n":"n","t":{},"v":1}}"#, 1_777_863_721 - number);
    let cbor = |count: usize| [&b"\x9f"[..], &b"\xa1\x61n\x01".repeat(count), b"\xff"].concat();
    let metrics = |count: usize| b"\x12\x0a\x0a\x01n\x18\x80\xc4\xca\xed\xf6\x33".repeat(count);
    for (format, within, beyond) in [
        ("Json", list(|_| r#"{"n":1}"#.to_owned(), MAX_READINGS), list(|_| r#"{"n":1}"#.to_owned(), MAX_READINGS + 1)),
        ("Json", list(|_| "[]".to_owned(), MAX_READINGS), list(|_| "[]".to_owned(), MAX_READINGS + 1)),
        ("Cbor", cbor(MAX_READINGS), cbor(MAX_READINGS + 1)),
        ("SenMl", list(senml, MAX_READINGS), list(senml, MAX_READINGS + 1)),
        ("SenMl", list(|_| senml(0), MAX_VALUES), list(|_| senml(0), MAX_VALUES + 1)),
    ] {
        let decoder = decoder_of(format);
        assert_ne!(reason(&run(&decoder, &within).0), Some(Reason::TooLarge), "{format}");
        let (outcome, _) = run(&decoder, &beyond);
        assert!(matches!(&outcome, Outcome::Malformed(cause) if cause.reason == Reason::TooLarge), "{format} {outcome:?}");
    }
    let sparkplug = |payload: &[u8]| {
        let (decoder, state) = (decoder_of("SparkplugB"), SparkplugState::default());
        let outcome = decoder.decode(&state, "spBv1.0/g/NDATA/n", payload, Parsed::default(), Time::now(), 0, &mut |_, _| ());
        reason(&outcome)
    };
    assert_ne!(sparkplug(&metrics(MAX_READINGS)), Some(Reason::TooLarge));
    assert_eq!(sparkplug(&metrics(MAX_READINGS + 1)), Some(Reason::TooLarge));
}

#[test]
fn the_rows_of_a_message_have_a_bounded_size() {
    let payload = list(|_| r#"{"n":1}"#.to_owned(), 10_000);
    let rows = |captures: usize| {
        let mut rows = 0;
        let (decoder, state) = (decoder_of("Json"), SparkplugState::default());
        let outcome = decoder.decode(&state, "", &payload, Parsed::default(), Time::now(), captures, &mut |_, _| rows += 1);
        (reason(&outcome), rows)
    };
    assert_eq!(rows(0), (None, 10_000));
    let (reason, rows) = rows(3_000);
    assert_eq!(reason, Some(Reason::TooLarge));
    assert!(rows <= MAX_ROW_BYTES / 3_000, "no row is written beyond the bound: {rows}");
}

#[test]
fn names_have_a_bounded_length() {
    let pack = |length: usize| format!(r#"[{{"bn":"{}/","n":"n","v":1}}]"#, "x".repeat(length)).into_bytes();
    assert_eq!(reason(&run(&decoder_of("SenMl"), &pack(MAX_NAME_BYTES - 2)).0), None);
    assert_eq!(reason(&run(&decoder_of("SenMl"), &pack(MAX_NAME_BYTES)).0), Some(Reason::Malformed));

    let topic = TopicPattern::compile("{line}/{device}", Format::Json).unwrap();
    let stream = Stream::new(Arc::new(topic), Arc::new(decoder_of("Json")));
    for (line, device, expected) in [
        (MAX_CAPTURE_BYTES, MAX_DEVICE_BYTES, Ok(MAX_DEVICE_BYTES)),
        (MAX_CAPTURE_BYTES + 1, 1, Err(Reason::TooLarge)),
        (1, MAX_DEVICE_BYTES + 1, Err(Reason::UnknownDevice)),
    ] {
        let topic = format!("{}/{}", "l".repeat(line), "d".repeat(device));
        let found = stream.read_topic(topic.as_bytes(), &mut Vec::new());
        assert_eq!(found.map(str::len).map_err(|cause| cause.reason), expected, "{line} {device}");
    }
}
