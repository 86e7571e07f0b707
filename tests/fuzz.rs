//! No bytes make a decoder panic or yield a value outside the range of its type: valid messages of each format are mutated for a minute.
//!
//! `FLEETWRIGHT_FUZZ_SECONDS` is the time for each format (7: with all of them a minute; never more), `FLEETWRIGHT_FUZZ_SEED` a seed
//! that a failure has printed.

#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "helpers of tests fail by panicking, and say what failed")]

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::time::{Duration, Instant};

use fleetwright::decode::sparkplug::SparkplugState;
use fleetwright::decode::time::Time;
use fleetwright::decode::{Decoder, Outcome, Value};
use prost_reflect::prost::Message;
use prost_reflect::prost_types::field_descriptor_proto::{Label, Type};
use prost_reflect::prost_types::{DescriptorProto, FieldDescriptorProto, FileDescriptorProto, FileDescriptorSet};
use serde_json::json;

/// Number of tests that share a minute.
const FORMATS: u64 = 8;

/// 2026-05-04T03:02:01.5Z, in milliseconds.
const MILLISECONDS: u64 = 1_777_863_721_500;

const SPARKPLUG_TOPICS: [&str; 8] = [
    "spBv1.0/g/NBIRTH/n",
    "spBv1.0/g/DBIRTH/n/d",
    "spBv1.0/g/DDATA/n/d",
    "spBv1.0/g/NDATA/n",
    "spBv1.0/g/DDEATH/n/d",
    "spBv1.0/g/NDEATH/n",
    "spBv1.0/g/DDATA/n/other",
    "spBv1.0//x",
];

/// SplitMix64 (Steele, Lea, Flood 2014).
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// A number below `bound`, or 0.
    fn below(&mut self, bound: usize) -> usize {
        usize::try_from(self.next() % u64::try_from(bound.max(1)).unwrap()).unwrap()
    }

    fn bytes(&mut self, most: usize) -> Vec<u8> {
        (0..self.below(most)).map(|_| self.next().to_le_bytes()[0]).collect()
    }

    /// A part of something of this length.
    fn range(&mut self, length: usize) -> std::ops::Range<usize> {
        let start = self.below(length + 1);
        start..start + self.below((length - start + 1).min(20))
    }
}

fn mutate(random: &mut Random, corpus: &[Vec<u8>]) -> Vec<u8> {
    let mut message = corpus[random.below(corpus.len())].clone();
    for _ in 0..random.below(6) {
        let at = random.below(message.len());
        match random.below(8) {
            0 if !message.is_empty() => message[at] ^= 1 << random.below(8),
            1 if !message.is_empty() => message[at] = [0, 1, 0x7f, 0x80, 0xff, b'"', b'\\', b'{'][random.below(8)],
            2 => message.truncate(at),
            3 => drop(message.drain(random.range(message.len()))),
            4 => {
                let part = message[random.range(message.len())].to_vec();
                message.splice(at..at, part);
            }
            5 => drop(message.splice(at..at, random.bytes(12))),
            6 => {
                let other = &corpus[random.below(corpus.len())];
                message.truncate(at);
                message.extend_from_slice(&other[random.below(other.len())..]);
            }
            _ => message = random.bytes(64),
        }
    }
    message
}

/// Checks that every value is in the range of its type.
fn check_reading(time: Option<Time>, values: &[Value<'_>]) {
    assert!(time.is_none_or(Time::is_in_range), "{time:?}");
    for value in values {
        match value {
            Value::Float64(number) => assert!(number.is_finite(), "{number}"),
            Value::Text(text) => assert!(!text.contains('\0'), "{text:?}"),
            Value::Timestamp(time) => assert!(time.is_in_range(), "{time:?}"),
            Value::Json(text) => {
                let parsed = serde_json::from_str::<serde::de::IgnoredAny>(text);
                assert!(parsed.is_ok() && !text.contains('\0'), "{text:?}: {parsed:?}");
            }
            Value::Null | Value::Int64(_) | Value::Boolean(_) => {}
        }
    }
}

/// Decodes one message; returns the number of readings.
fn decode(decoder: &Decoder, state: &mut SparkplugState, topic: &str, payload: &[u8]) -> usize {
    let mut readings = 0;
    let Some(parsed) = decoder.observe(state, topic, 5, payload) else { return 0 };
    let arrival = Time::from_text("2026-05-04T12:00:00Z").unwrap();
    let outcome = decoder.decode(state, topic, payload, parsed, arrival, &mut |time, values| {
        check_reading(time, values);
        readings += 1;
    });
    match outcome {
        Outcome::Complete => readings,
        Outcome::Partial(refusal) | Outcome::Malformed(refusal) => {
            assert!(!refusal.detail.contains('\0') && refusal.detail.chars().count() <= 500, "{refusal:?}");
            0
        }
    }
}

fn fuzz(spec: serde_json::Value, descriptor: Option<&[u8]>, corpus: &[Vec<u8>]) {
    let number = |name: &str| std::env::var(name).ok().map(|text| text.parse::<u64>().unwrap());
    let seconds = number("FLEETWRIGHT_FUZZ_SECONDS").unwrap_or(7).min(60 / FORMATS);
    let seed = number("FLEETWRIGHT_FUZZ_SEED").unwrap_or(1);
    let decoder = Decoder::compile(&serde_json::from_value(spec).unwrap(), descriptor).unwrap();
    let (mut random, mut state) = (Random(seed), SparkplugState::default());

    // Mutations of a refused corpus would not reach the decoder.
    for (index, message) in corpus.iter().enumerate() {
        let topic = SPARKPLUG_TOPICS[1 + index.min(1)];
        assert_ne!(decode(&decoder, &mut state, topic, message), 0, "message {index} is refused");
    }
    let (until, mut rounds) = (Instant::now() + Duration::from_secs(seconds), 0_u64);
    while Instant::now() < until || rounds < 1_000 {
        let payload = mutate(&mut random, corpus);
        let topic = SPARKPLUG_TOPICS[random.below(SPARKPLUG_TOPICS.len())];
        if let Err(panic) = catch_unwind(AssertUnwindSafe(|| decode(&decoder, &mut state, topic, &payload))) {
            let hex = payload.iter().map(|byte| format!("{byte:02x}")).collect::<Vec<_>>().concat();
            println!("FLEETWRIGHT_FUZZ_SEED={seed}, round {rounds}, topic {topic}, payload {hex}");
            resume_unwind(panic);
        }
        rounds += 1;
    }
    println!("{rounds} messages");
}

fn fields(with_json: bool) -> serde_json::Value {
    let mut fields = vec![
        json!({"name": "rms", "type": "Float64", "scale": 1e300, "offset": -1, "min": -1e308}),
        json!({"name": "count", "type": "Int64"}),
        json!({"name": "running", "type": "Boolean"}),
        json!({"name": "state", "type": "Text"}),
        json!({"name": "at", "type": "Timestamp", "timeUnit": "Seconds"}),
    ];
    if with_json {
        fields.extend([json!({"name": "rest", "type": "Json"}), json!({"name": "deep", "type": "Text", "pointer": "/rest/0/a"})]);
    }
    fields.into()
}

fn bytes(texts: &[&str]) -> Vec<Vec<u8>> {
    texts.iter().map(|text| text.as_bytes().to_vec()).collect()
}

#[test]
fn json() {
    let corpus = bytes(&[
        r#"{"ts":1777863721500,"rms":0.5,"count":-7,"running":true,"state":"l\u00e4uft","at":1777863721.5,"rest":[{"a":"x"},null]}"#,
        r#"[{"ts":1777863721500.25,"rms":1e-3},{"ts":1777863721501,"rest":{"a":{"b":[1,2.5,"\ud83d\ude00"]}}}]"#,
    ]);
    fuzz(json!({"time": {"pointer": "/ts"}, "fields": fields(true)}), None, &corpus);
}

#[test]
fn cbor() {
    let corpus = [
        b"\xa4\x01\xc1\xfb\x41\xda\x7e\x03\x0a\x60\x00\x00\x63rms\xf9\x3e\x00\x62at\x1a\x69\xf7\xf9\xe9\x64rest\x82\x07\xa1\x61y\xf6"
            .to_vec(),
        b"\x82\xa3\x01\x1a\x69\xf7\xf9\xe9\x65count\x26\x65state\x62on\xbf\x01\x1a\x69\xf7\xf9\xe9\x67running\xf5\xff".to_vec(),
    ];
    fuzz(json!({"format": "Cbor", "time": {"pointer": "/1", "unit": "Seconds"}, "fields": fields(true)}), None, &corpus);
}

#[test]
fn senml() {
    let corpus = bytes(&[
        r#"[{"bn":"urn:dev:ow:1:","bt":1.777863721e9,"bu":"A","bver":5,"bv":1,"bs":2,"n":"rms","u":"V","v":0.5},{"n":"count","t":-5,"v":1}]"#,
        r#"[{"n":"running","vb":true},{"n":"state","vs":"caf\u00e9"},{"n":"rms","t":-60,"v":1e-3,"s":4,"ut":60},{"n":"x","vd":"QUJD"}]"#,
    ]);
    fuzz(json!({"format": "SenMl", "fields": fields(false)}), None, &corpus);
}

#[test]
fn senml_cbor() {
    // {-2: "urn:", 0: "count", 2: 7}, {0: "rms", 2: 1.5}; then with a base time (-3), a text (3) and a relative time (6).
    let corpus = [
        b"\x82\xa3\x21\x64urn:\x00\x65count\x02\x07\xa2\x00\x63rms\x02\xf9\x3e\x00".to_vec(),
        b"\x82\xa3\x22\xfb\x41\xda\x7e\x03\x0a\x60\x00\x00\x00\x63rms\x02\xfb\x3f\xf3\x33\x33\x33\x33\x33\x33\xa3\x00\x65state\x03\x62on\x06\x24"
            .to_vec(),
    ];
    fuzz(json!({"format": "SenMlCbor", "fields": fields(false)}), None, &corpus);
}

#[test]
fn plain_text() {
    let corpus = bytes(&["2026-05-04T03:02:01.5Z", "2026-05-04T03:02:01+02:00"]);
    let fields = |type_: &str| json!([{"name": "value", "type": type_, "required": true}]);
    fuzz(json!({"format": "PlainText", "fields": fields("Timestamp")}), None, &corpus);
}

#[test]
fn plain_text_numbers() {
    let corpus = bytes(&["1.5", " -7e10 \n", "1"]);
    let fields = json!([{"name": "value", "type": "Float64", "scale": 1e290, "required": true}]);
    fuzz(json!({"format": "PlainText", "fields": fields}), None, &corpus);
}

fn varint(mut number: u64) -> Vec<u8> {
    let mut bytes = Vec::new();
    while number >= 0x80 {
        bytes.push(number.to_le_bytes()[0] | 0x80);
        number >>= 7;
    }
    bytes.push(number.to_le_bytes()[0]);
    bytes
}

/// A payload of Sparkplug B with these metrics, encoded.
fn sparkplug(sequence: u8, metrics: &[&[u8]]) -> Vec<u8> {
    let mut payload = [vec![0x08], varint(MILLISECONDS)].concat();
    for metric in metrics {
        payload.push(0x12);
        payload.extend(varint(metric.len() as u64));
        payload.extend_from_slice(metric);
    }
    payload.extend([0x18, sequence]);
    payload
}

#[test]
fn sparkplug_b() {
    // Name, alias, type and value; then by alias alone.
    let birth = sparkplug(1, &[b"\x0a\x05count\x10\x02\x20\x03\x50\x07", b"\x0a\x05state\x10\x03\x20\x0c\x7a\x02on"]);
    let data = sparkplug(2, &[b"\x10\x02\x50\x08", b"\x10\x03\x7a\x03off"]);
    let at = [b"\x0a\x02at\x20\x0d\x58".to_vec(), varint(MILLISECONDS)].concat();
    let named = sparkplug(3, &[b"\x0a\x07running\x20\x0b\x70\x01", &at]);
    fuzz(json!({"format": "SparkplugB", "fields": fields(false)}), None, &[birth, data, named]);
}

/// `p.Reading`, whose member `below` is one too, and a google.protobuf.Timestamp.
fn descriptor() -> Vec<u8> {
    let member = |name: &str, number, type_: Type, of: Option<&str>| FieldDescriptorProto {
        name: Some(name.to_owned()),
        number: Some(number),
        label: Some(Label::Optional.into()),
        r#type: Some(type_.into()),
        type_name: of.map(str::to_owned),
        ..FieldDescriptorProto::default()
    };
    let file = |name: &str, package: &str, message: &str, field| FileDescriptorProto {
        name: Some(name.to_owned()),
        package: Some(package.to_owned()),
        syntax: Some("proto3".to_owned()),
        message_type: vec![DescriptorProto { name: Some(message.to_owned()), field, ..DescriptorProto::default() }],
        ..FileDescriptorProto::default()
    };
    let time = vec![member("seconds", 1, Type::Int64, None), member("nanos", 2, Type::Int32, None)];
    let reading = vec![
        member("ts", 1, Type::Message, Some(".google.protobuf.Timestamp")),
        member("rms", 2, Type::Double, None),
        member("count", 3, Type::Sint64, None),
        member("running", 4, Type::Bool, None),
        member("state", 5, Type::String, None),
        member("at", 6, Type::Fixed32, None),
        member("below", 7, Type::Message, Some(".p.Reading")),
    ];
    let mut own = file("p.proto", "p", "Reading", reading);
    own.dependency.push("google/protobuf/timestamp.proto".to_owned());
    let file = vec![file("google/protobuf/timestamp.proto", "google.protobuf", "Timestamp", time), own];
    FileDescriptorSet { file }.encode_to_vec()
}

#[test]
fn protobuf() {
    let seconds = [vec![0x08], varint(MILLISECONDS / 1000)].concat();
    let time = [&[0x0a, 6][..], &seconds].concat();
    let full = [&time[..], b"\x11\0\0\0\0\0\0\xf0\x3f\x18\x0d\x20\x01\x2a\x02on\x35\xe9\xf9\xf7\x69\x3a\x04\x2a\x02ok"].concat();
    let mut fields = fields(false);
    fields.as_array_mut().unwrap().push(json!({"name": "deep", "type": "Text", "pointer": "/below/state"}));
    let reference = json!({"configMapRef": {"name": "p"}, "message": "p.Reading"});
    fuzz(
        json!({"format": "Protobuf", "protobuf": reference, "time": {"pointer": "/ts"}, "fields": fields}),
        Some(&descriptor()),
        &[full, time],
    );
}
