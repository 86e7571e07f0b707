//! The worst messages of each format against a worker in a cgroup of its default memory limit. An innocent device publishes meanwhile.

#![allow(clippy::print_stdout, reason = "a measurement for the documentation")]

use std::time::{Duration, Instant};

use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use prost_reflect::prost::Message as _;
use prost_reflect::prost_types::field_descriptor_proto::{Label, Type};
use prost_reflect::prost_types::{DescriptorProto, FieldDescriptorProto, FileDescriptorProto, FileDescriptorSet};
use serde_json::{Value, json};

use super::common::innocent::{Connection, Innocent, Message};
use super::common::memory::{MemoryLimit, MemoryPeak};
use super::common::postgres::Postgres;
use super::common::worker::Chain;

/// The default memory limit of a worker.
const LIMIT: u64 = 128 * 1024 * 1024;

/// The default limit of a Gateway for a message, with some space for the topic.
const PAYLOAD: usize = 1024 * 1024 - 4096;

/// 2026-05-04T03:02:01.5Z, in milliseconds since 1970.
const TS: u64 = 1_777_863_721_500;

/// Milliseconds before [`TS`], each number on another day, as far as there are days since 1970.
const fn days(number: u64) -> u64 {
    number % 20_000 * 24 * 3600 * 1000
}

/// How long the stored rows of the innocent device may take after the end of the attack. The worker and the database share two processors
/// with the attacker, and the database stores the dead letters of the attacker.
const STORED: Duration = Duration::from_secs(90);

/// A format: its decoder, a good message, and the worst messages.
struct Case {
    format: &'static str,
    fields: Value,
    good: fn(u64) -> Vec<u8>,
    bad: Vec<Vec<u8>>,
}

fn repeat(begin: &[u8], element: impl Fn(u64) -> Vec<u8>, end: &[u8]) -> Vec<u8> {
    let mut payload = begin.to_vec();
    for number in 0.. {
        let next = element(number);
        if payload.len() + next.len() + end.len() > PAYLOAD {
            break;
        }
        payload.extend_from_slice(&next);
    }
    payload.extend_from_slice(end);
    payload
}

fn json_array(element: impl Fn(u64) -> String) -> Vec<u8> {
    let mut payload = repeat(b"[", |number| (element(number) + ",").into_bytes(), b"");
    payload.pop();
    payload.push(b']');
    payload
}

fn json_case() -> Case {
    let reading = |before: u64| format!(r#"{{"ts":{},"rms":1}}"#, TS - before);
    Case {
        format: "Json",
        fields: json!([{"name": "rms", "type": "Float64"}, {"name": "rest", "type": "Json"}, {"name": "state", "type": "Text"}]),
        good: |number| format!(r#"{{"ts":{},"rms":1}}"#, TS + number).into_bytes(),
        bad: vec![
            json_array(reading),
            json_array(|number| format!(r#"{{"ts":{}}}"#, TS - number)),
            format!("[{}]", (0..9_700).map(|day| reading(days(day))).collect::<Vec<_>>().join(",")).into_bytes(),
            [format!(r#"{{"ts":{TS},"rest":"#).as_bytes(), &json_array(|_| r#"{"":0}"#.to_owned())[..PAYLOAD - 100], b"]}"].concat(),
            json_array(|_| "{}".to_owned()),
            format!(r#"{{"ts":{TS},"state":"{}"}}"#, "x".repeat(PAYLOAD - 100)).into_bytes(),
            b"[".repeat(PAYLOAD),
        ],
    }
}

fn cbor_case() -> Case {
    fn reading(time: u64) -> Vec<u8> {
        [&b"\xa2\x62ts\x1b"[..], &time.to_be_bytes(), b"\x63rms\x01"].concat()
    }
    Case {
        format: "Cbor",
        fields: json!([{"name": "rms", "type": "Float64"}, {"name": "rest", "type": "Json"}]),
        good: |number| reading(TS + number),
        bad: vec![
            repeat(b"\x9f", |number| reading(TS - number), b"\xff"),
            repeat(b"\x9f", |_| b"\xa0".to_vec(), b"\xff"),
            repeat(&[&b"\xa2\x62ts\x1b"[..], &TS.to_be_bytes(), b"\x64rest\x9f"].concat(), |_| b"\xa1\x60\x00".to_vec(), b"\xff"),
            repeat(b"\x9f", |number| reading(TS - days(number)), b"\xff"),
        ],
    }
}

fn senml_case() -> Case {
    let record = |number: u64| format!(r#"{{"n":"rms","t":{},"v":1}}"#, TS / 1000 - number);
    Case {
        format: "SenMl",
        fields: json!([{"name": "rms", "type": "Float64"}]),
        good: |number| format!(r#"[{{"n":"rms","t":{}.{:03},"v":1}}]"#, TS / 1000 + number / 1000, number % 1000).into_bytes(),
        bad: vec![
            json_array(record),
            json_array(|number| record(days(number) / 1000)),
            json_array(|_| r#"{"n":"rms","v":1}"#.to_owned()),
            [format!(r#"[{{"bn":"{}"}},"#, "x".repeat(PAYLOAD / 2)).as_bytes(), &json_array(|_| r#"{"v":1}"#.to_owned())[1..PAYLOAD / 2]]
                .concat(),
        ],
    }
}

fn senml_cbor_case() -> Case {
    fn record(time: u64) -> Vec<u8> {
        [&b"\xa3\x00\x63rms\x06\x1a"[..], &u32::try_from(time).unwrap().to_be_bytes(), b"\x02\x01"].concat()
    }
    Case {
        format: "SenMlCbor",
        fields: json!([{"name": "rms", "type": "Float64"}]),
        good: |number| [&b"\x81"[..], &record(TS / 1000 + number)].concat(),
        bad: vec![
            repeat(b"\x9f", |number| record(TS / 1000 - number), b"\xff"),
            repeat(b"\x9f", |_| b"\xa2\x00\x63rms\x02\x01".to_vec(), b"\xff"),
        ],
    }
}

/// A metric with a name, a type (Double) and a value.
fn sparkplug(time: u64, metrics: &[u8]) -> Vec<u8> {
    let mut payload = b"\x08".to_vec();
    let mut rest = time;
    while rest > 0x7f {
        payload.push(u8::try_from(rest & 0x7f).unwrap() | 0x80);
        rest >>= 7;
    }
    payload.push(u8::try_from(rest).unwrap());
    payload.extend_from_slice(metrics);
    payload
}

const METRIC: &[u8] = b"\x12\x10\x0a\x03rms\x20\x0a\x69\0\0\0\0\0\0\x0c\x40";

fn sparkplug_case() -> Case {
    Case {
        format: "SparkplugB",
        fields: json!([{"name": "rms", "type": "Float64"}]),
        good: |number| sparkplug(TS + number, METRIC),
        bad: vec![
            repeat(&sparkplug(TS, b""), |_| b"\x12\0".to_vec(), b""),
            repeat(&sparkplug(TS, b""), |_| METRIC.to_vec(), b""),
            repeat(&sparkplug(TS, b""), |_| b"\x12\x02\x10\x01".to_vec(), b""),
        ],
    }
}

fn descriptor() -> Vec<u8> {
    let member = |name: &str, number, type_: Type, label: Label, message: Option<&str>| FieldDescriptorProto {
        name: Some(name.to_owned()),
        number: Some(number),
        label: Some(label.into()),
        r#type: Some(type_.into()),
        type_name: message.map(str::to_owned),
        ..FieldDescriptorProto::default()
    };
    let reading = DescriptorProto {
        name: Some("Reading".to_owned()),
        field: vec![member("ts", 1, Type::Fixed64, Label::Optional, None), member("rms", 2, Type::Double, Label::Optional, None)],
        ..DescriptorProto::default()
    };
    let batch = DescriptorProto {
        name: Some("Batch".to_owned()),
        field: vec![member("readings", 1, Type::Message, Label::Repeated, Some(".plant.Reading"))],
        ..DescriptorProto::default()
    };
    let file = FileDescriptorProto {
        name: Some("plant.proto".to_owned()),
        package: Some("plant".to_owned()),
        syntax: Some("proto3".to_owned()),
        message_type: vec![reading, batch],
        ..FileDescriptorProto::default()
    };
    FileDescriptorSet { file: vec![file] }.encode_to_vec()
}

fn protobuf_case() -> Case {
    fn reading(time: u64) -> Vec<u8> {
        [&b"\x0a\x12\x09"[..], &time.to_le_bytes(), b"\x11\0\0\0\0\0\0\xf0\x3f"].concat()
    }
    Case {
        format: "Protobuf",
        fields: json!([{"name": "rms", "type": "Float64"}]),
        good: |number| reading(TS + number),
        bad: vec![
            repeat(b"", |number| reading(TS - number), b""),
            repeat(b"", |_| b"\x0a\0".to_vec(), b""),
            repeat(b"", |number| reading(TS - days(number)), b""),
        ],
    }
}

fn plain_text_case() -> Case {
    Case {
        format: "PlainText",
        fields: json!([{"name": "state", "type": "Text"}]),
        good: |number| number.to_string().into_bytes(),
        bad: vec![vec![b'x'; PAYLOAD], vec![0xff; PAYLOAD], Vec::new()],
    }
}

fn topic(format: &str, line: &str, device: &str) -> String {
    if format == "SparkplugB" { format!("spBv1.0/{line}/DDATA/n/{device}") } else { format!("{line}/devices/{device}/telemetry") }
}

async fn start(case: &Case) -> (Chain, Option<MemoryLimit>) {
    let pattern = if case.format == "SparkplugB" { "spBv1.0/{line}/+/{node}/{device}" } else { "{line}/devices/{device}/telemetry" };
    let mut decode = json!({"format": case.format, "fields": case.fields});
    if matches!(case.format, "Json" | "Cbor" | "Protobuf") {
        decode["time"] = json!({"pointer": "/ts"});
    }
    if case.format == "Protobuf" {
        decode["readings"] = "/readings".into();
        decode["protobuf"] = json!({"configMapRef": {"name": "schema"}, "message": "plant.Batch"});
    }
    let limit = MemoryLimit::new(LIMIT);
    let mut chain = Chain::prepare(pattern, &decode, Postgres::shared().await).await;
    chain.configure("descriptor", if case.format == "Protobuf" { BASE64_STANDARD.encode(descriptor()).into() } else { Value::Null });
    chain.start_worker_within(limit.as_ref());
    chain.worker.wait_ready();
    (chain, limit)
}

/// Each bad message from a known device, with short and with long captures, and under names that no device has; and many small messages with
/// names of all lengths.
fn attack(case: &Case) -> Vec<Message> {
    let (long, longer, huge) = ("l".repeat(250), "l".repeat(3_000), "n".repeat(60_000));
    let mut messages = Vec::new();
    for payload in &case.bad {
        for (line, device) in [("a", "press-1"), (&long, "press-1"), (&longer, "press-1"), ("a", "nobody"), ("a", "press-1")] {
            messages.push((topic(case.format, line, device), payload.clone()));
        }
    }
    messages.extend((0..5_000).map(|number| (topic(case.format, "a", &format!("nobody-{number}")), (case.good)(number))));
    messages.extend((0..50).map(|number| (topic(case.format, "a", &format!("{huge}{number}")), (case.good)(number))));
    if case.format == "SparkplugB" {
        let births = (0..20_000).map(|node| (format!("spBv1.0/a/NBIRTH/node-{node}"), sparkplug(TS, METRIC)));
        messages.extend(births.chain((0..20).map(|node| (format!("spBv1.0/a/NBIRTH/big-{node}"), case.bad[1].clone()))));
    }
    messages
}

async fn survives(case: Case) {
    let (chain, limit) = start(&case).await;
    let peak = MemoryPeak::start(chain.worker.pid());
    let (format, good) = (case.format, case.good);
    let innocent = Innocent::start(chain.broker.port, "press-2", move |number| (topic(format, "b", "press-2"), good(number)));
    let messages = attack(&case);
    let attacks = messages.len();
    let port = chain.broker.port;
    tokio::task::spawn_blocking(move || Connection::open(port, "press-1").publish_all(messages.into_iter())).await.unwrap();
    let (published, slowest) = innocent.finish();
    let started = Instant::now();
    let stored = "SELECT count(*) FROM vibration JOIN fleetwright.device ON id = device_id WHERE name = 'press-2'";
    chain.wait_for_within(stored, i64::try_from(published).unwrap(), STORED).await;
    let delay = started.elapsed();
    let peak = peak.finish();
    println!(
        "{format}: {attacks} bad messages; {published} good ones, acknowledged in {slowest:?}, stored {delay:?} after the end; peak {} MiB{}",
        peak >> 20,
        if limit.is_some() { " in a cgroup" } else { "" }
    );
    assert!(slowest < Duration::from_secs(1), "{slowest:?}");
    assert_eq!(limit.map_or(0, |limit| limit.kills()), 0, "the worker stays below its memory limit");
    assert!(peak > 0 && peak < LIMIT, "{peak}");
    assert_eq!(chain.count("SELECT count(*) FROM fleetwright.dead_letter WHERE topic LIKE '%/press-2%'").await, 0);
    chain.worker.wait_ready();
}

#[tokio::test(flavor = "multi_thread")]
async fn the_worst_json_messages_harm_no_other_device() {
    survives(json_case()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_worst_cbor_messages_harm_no_other_device() {
    survives(cbor_case()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_worst_senml_messages_harm_no_other_device() {
    survives(senml_case()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_worst_senml_cbor_messages_harm_no_other_device() {
    survives(senml_cbor_case()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_worst_sparkplug_messages_harm_no_other_device() {
    survives(sparkplug_case()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_worst_protobuf_messages_harm_no_other_device() {
    survives(protobuf_case()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_worst_plain_text_messages_harm_no_other_device() {
    survives(plain_text_case()).await;
}
