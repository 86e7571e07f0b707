//! Targets for the payload formats: any bytes give readings that their columns can store, or a refusal.

use std::sync::OnceLock;

use fleetwright::decode::sparkplug::SparkplugState;
use fleetwright::decode::time::Time;
use fleetwright::decode::{Decoder, Outcome, Value};
use serde_json::json;

use crate::descriptor;

/// Longest detail of a refusal, in characters: the limit that `fleetwright::decode` documents.
const MAX_DETAIL_CHARACTERS: usize = 500;

/// Topics of Sparkplug B messages. A message of that target begins with a byte that selects one of them.
pub const SPARKPLUG_TOPICS: [&str; 8] = [
    "spBv1.0/g/NBIRTH/n",
    "spBv1.0/g/DBIRTH/n/d",
    "spBv1.0/g/DDATA/n/d",
    "spBv1.0/g/NDATA/n",
    "spBv1.0/g/DDEATH/n/d",
    "spBv1.0/g/NDEATH/n",
    "spBv1.0/g/DDATA/n/other",
    "spBv1.0//x",
];

/// Levels of the topic of a Sparkplug device: `spBv1.0/{group}/+/{node}/{device}`.
const SPARKPLUG_LEVELS: usize = 5;

/// The conditions that each value must satisfy for every payload.
fn check(time: Option<Time>, values: &[Value<'_>]) {
    assert!(time.is_none_or(Time::is_in_range), "{time:?}");
    for value in values {
        match value {
            Value::Float64(number) => assert!(number.is_finite(), "{number}"),
            Value::Text(text) => assert!(!text.contains('\0'), "{text:?}"),
            Value::Timestamp(time) => assert!(time.is_in_range(), "{time:?}"),
            Value::Json(text) => {
                let parsed = serde_json::from_str::<serde_json::Value>(text);
                assert!(parsed.is_ok() && !text.contains('\0'), "{text:?}: {parsed:?}");
            }
            Value::Null | Value::Int64(_) | Value::Boolean(_) => {}
        }
    }
}

/// Decodes one message; the number of its readings, or 0 if it is refused.
fn decode(decoder: &Decoder, state: &mut SparkplugState, topic: &str, payload: &[u8]) -> usize {
    let mut readings = 0;
    let Some(parsed) = decoder.observe(state, topic, SPARKPLUG_LEVELS, payload) else { return 0 };
    let arrival = Time::from_text("2026-05-04T12:00:00Z").expect("a valid time");
    let outcome = decoder.decode(state, topic, payload, parsed, arrival, 0, &mut |time, values| {
        check(time, values);
        readings += 1;
    });
    match outcome {
        Outcome::Complete => readings,
        Outcome::Partial(refusal) | Outcome::Malformed(refusal) => {
            let characters = refusal.detail.chars().count();
            assert!(!refusal.detail.contains('\0') && characters <= MAX_DETAIL_CHARACTERS, "{refusal:?}");
            0
        }
    }
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

fn compile(spec: serde_json::Value, descriptor: Option<&[u8]>) -> Decoder {
    let spec = serde_json::from_value(spec).expect("a valid spec.decode");
    Decoder::compile(&spec, descriptor).expect("a decoder")
}

/// Decodes one message of a format without state.
fn single(decoder: &Decoder, payload: &[u8]) -> usize {
    decode(decoder, &mut SparkplugState::default(), "devices/d/telemetry", payload)
}

pub fn json(payload: &[u8]) -> usize {
    static DECODER: OnceLock<Decoder> = OnceLock::new();
    single(DECODER.get_or_init(|| compile(json!({"time": {"pointer": "/ts"}, "fields": fields(true)}), None)), payload)
}

pub fn cbor(payload: &[u8]) -> usize {
    static DECODER: OnceLock<Decoder> = OnceLock::new();
    let spec = || json!({"format": "Cbor", "time": {"pointer": "/1", "unit": "Seconds"}, "fields": fields(true)});
    single(DECODER.get_or_init(|| compile(spec(), None)), payload)
}

pub fn senml(payload: &[u8]) -> usize {
    static DECODER: OnceLock<Decoder> = OnceLock::new();
    single(DECODER.get_or_init(|| compile(json!({"format": "SenMl", "fields": fields(false)}), None)), payload)
}

pub fn senml_cbor(payload: &[u8]) -> usize {
    static DECODER: OnceLock<Decoder> = OnceLock::new();
    single(DECODER.get_or_init(|| compile(json!({"format": "SenMlCbor", "fields": fields(false)}), None)), payload)
}

pub fn plain_text(payload: &[u8]) -> usize {
    static DECODER: OnceLock<Decoder> = OnceLock::new();
    let fields = || json!([{"name": "value", "type": "Timestamp", "required": true}]);
    single(DECODER.get_or_init(|| compile(json!({"format": "PlainText", "fields": fields()}), None)), payload)
}

pub fn plain_number(payload: &[u8]) -> usize {
    static DECODER: OnceLock<Decoder> = OnceLock::new();
    let fields = || json!([{"name": "value", "type": "Float64", "scale": 1e290, "required": true}]);
    single(DECODER.get_or_init(|| compile(json!({"format": "PlainText", "fields": fields()}), None)), payload)
}

/// The input is a sequence of messages, since a message of Sparkplug B depends on the births before it. Each is a byte that selects the
/// topic, the length as 16 bits (big endian) and the payload; the last one may be shorter than its length.
pub fn sparkplug(mut input: &[u8]) -> usize {
    static DECODER: OnceLock<Decoder> = OnceLock::new();
    let decoder = DECODER.get_or_init(|| compile(json!({"format": "SparkplugB", "fields": fields(false)}), None));
    let (mut state, mut readings) = (SparkplugState::default(), 0);
    while let [topic, high, low, rest @ ..] = input {
        let length = usize::from(u16::from_be_bytes([*high, *low])).min(rest.len());
        let (payload, next) = rest.split_at(length);
        readings += decode(decoder, &mut state, SPARKPLUG_TOPICS[usize::from(*topic) % SPARKPLUG_TOPICS.len()], payload);
        input = next;
    }
    readings
}

pub fn protobuf(payload: &[u8]) -> usize {
    static DECODER: OnceLock<Decoder> = OnceLock::new();
    let spec = || {
        let mut fields = fields(false);
        fields.as_array_mut().expect("a list").push(json!({"name": "deep", "type": "Text", "pointer": "/below/state"}));
        let reference = json!({"configMapRef": {"name": "p"}, "message": "p.Reading"});
        json!({"format": "Protobuf", "protobuf": reference, "time": {"pointer": "/ts"}, "fields": fields})
    };
    single(DECODER.get_or_init(|| compile(spec(), Some(&descriptor::encoded()))), payload)
}
