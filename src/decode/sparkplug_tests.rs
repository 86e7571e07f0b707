use prost::Message as _;
use serde_json::json;

use super::*;
use crate::{Decoder, Outcome, Value};

const ARRIVAL: &str = "2026-05-04T12:00:00Z";
const MILLISECONDS: u64 = 1_777_863_721_500;

fn decoder() -> Decoder {
    let fields = json!([{"name": "pressure", "type": "Float64", "metric": "Inputs/Pressure"}, {"name": "level", "type": "Int64"}]);
    Decoder::compile(&serde_json::from_value(json!({"format": "SparkplugB", "fields": fields})).unwrap(), None).unwrap()
}

fn metric(name: Option<&str>, alias: Option<u64>, datatype: Option<u32>, value: Number) -> Metric {
    Metric { name: name.map(str::to_owned), alias, timestamp: None, datatype, is_null: None, value: Some(value) }
}

/// A payload with this number.
fn payload(sequence: u8, metrics: Vec<Metric>) -> Vec<u8> {
    let mut bytes = Payload { timestamp: Some(MILLISECONDS), metrics, seq: None }.encode_to_vec();
    bytes.extend([0x18, 0x80 | (sequence & 0x7f), sequence >> 7]);
    bytes
}

struct Host {
    decoder: Decoder,
    state: SparkplugState,
}

impl Host {
    fn new() -> Self {
        Self { decoder: decoder(), state: SparkplugState::default() }
    }

    /// The result for a message: `None` if it has no readings of devices.
    fn decode(&mut self, topic: &str, payload: &[u8]) -> Option<(Outcome, Vec<Vec<Value<'static>>>)> {
        let parsed = self.decoder.observe(&mut self.state, topic, 5, payload)?;
        let mut rows = Vec::new();
        let outcome =
            self.decoder.decode(&self.state, topic, payload, parsed, Time::from_text(ARRIVAL).unwrap(), 0, &mut |time, values| {
                assert_eq!(time, Time::from_text("2026-05-04T03:02:01.5Z"));
                rows.push(values.iter().cloned().map(Value::into_owned).collect());
            });
        Some((outcome, rows))
    }

    fn be_born(&mut self) {
        assert_eq!(self.decode("spBv1.0/g/NBIRTH/n", &payload(0, vec![])), None);
        let birth = vec![
            metric(Some("Inputs/Pressure"), Some(1), Some(10), Number::Double(1.5)),
            metric(Some("level"), Some(2), Some(1), Number::Int(0xf9)),
            metric(Some("unwanted"), Some(3), Some(12), Number::Text("x".to_owned())),
        ];
        let (outcome, rows) = self.decode("spBv1.0/g/DBIRTH/n/d", &payload(1, birth)).unwrap();
        assert_eq!((outcome, rows), (Outcome::Complete, vec![vec![Value::Float64(1.5), Value::Int64(-7)]]));
    }
}

fn data(alias: u64, sequence: u8) -> Vec<u8> {
    payload(sequence, vec![metric(None, Some(alias), None, Number::Int(0xfe))])
}

#[test]
fn births_name_and_type_what_data_gives_by_alias() {
    let mut host = Host::new();
    host.be_born();
    let row = |value| Some((Outcome::Complete, vec![vec![Value::Null, value]]));
    assert_eq!(host.decode("spBv1.0/g/DDATA/n/d", &data(2, 2)), row(Value::Int64(-2)));
    let named = payload(3, vec![metric(Some("level"), None, None, Number::Int(0x80))]);
    assert_eq!(host.decode("spBv1.0/g/DDATA/n/d", &named), row(Value::Int64(-128)));
    assert_eq!(
        host.decode("spBv1.0/g/DDATA/n/d", &payload(4, vec![metric(None, Some(3), None, Number::Text("y".to_owned()))])),
        Some((Outcome::Complete, vec![]))
    );
    assert_eq!(host.state.take_gaps(), 0);
}

fn is_unknown(found: Option<(Outcome, Vec<Vec<Value<'static>>>)>) -> bool {
    matches!(found, Some((Outcome::Malformed(cause), rows)) if cause.reason == Reason::UnknownMetric && rows.is_empty())
}

#[test]
fn what_no_birth_has_named_is_refused_whole() {
    let mut host = Host::new();
    assert!(is_unknown(host.decode("spBv1.0/g/DDATA/n/d", &data(2, 2))));
    let untyped = payload(3, vec![metric(Some("level"), None, None, Number::Int(1))]);
    assert!(is_unknown(host.decode("spBv1.0/g/DDATA/n/d", &untyped)));
    host.be_born();
    let mixed = payload(2, vec![metric(None, Some(2), None, Number::Int(1)), metric(None, Some(9), None, Number::Int(1))]);
    assert!(is_unknown(host.decode("spBv1.0/g/DDATA/n/d", &mixed)));
    assert!(is_unknown(host.decode("spBv1.0/g/DDATA/n/other", &data(2, 3))));
    for death in ["spBv1.0/g/DDEATH/n/d", "spBv1.0/g/NDEATH/n"] {
        host.be_born();
        assert_eq!(host.decode(death, &payload(2, vec![])), None);
        assert!(is_unknown(host.decode("spBv1.0/g/DDATA/n/d", &data(2, 3))), "{death}");
    }
    assert_eq!(host.state.bytes, 0);
}

#[test]
fn gaps_in_the_numbers_are_counted() {
    let mut host = Host::new();
    host.be_born();
    for (sequence, gaps) in [(2, 0), (4, 1), (5, 0), (255, 1), (0, 0), (1, 0)] {
        host.decode("spBv1.0/g/DDATA/n/d", &data(2, sequence));
        assert_eq!(host.state.take_gaps(), gaps, "{sequence}");
    }
    // The numbers are the node's: its own messages count too.
    assert_eq!(host.decode("spBv1.0/g/NDATA/n", &payload(2, vec![])), None);
    host.decode("spBv1.0/g/DDATA/n/d", &data(2, 3));
    assert_eq!(host.state.take_gaps(), 0);
}

#[test]
fn a_node_whose_birth_was_missed_is_commanded_once_a_minute() {
    let mut host = Host::new();
    host.be_born();
    let node = |name: &str| Topic { kind: "DDATA", node: format!("g/{name}"), device: Some("d") };
    let now = Instant::now();
    host.state.command_rebirth(&node("n"), now);
    host.state.command_rebirth(&node("n"), now + MIN_REBIRTH_INTERVAL / 2);
    host.state.command_rebirth(&node("m"), now + MIN_REBIRTH_INTERVAL / 2);
    assert_eq!(host.state.take_rebirths(), ["spBv1.0/g/NCMD/n", "spBv1.0/g/NCMD/m"]);
    host.state.command_rebirth(&node("n"), now + MIN_REBIRTH_INTERVAL);
    assert_eq!(host.state.take_rebirths(), ["spBv1.0/g/NCMD/n"]);
    assert!(host.state.take_rebirths().is_empty());
}

#[test]
fn a_gap_and_an_unknown_alias_ask_for_a_birth() {
    let mut host = Host::new();
    host.be_born();
    host.decode("spBv1.0/g/DDATA/n/d", &data(2, 2));
    assert!(host.state.take_rebirths().is_empty());
    host.decode("spBv1.0/g/DDATA/n/d", &data(2, 4));
    assert_eq!(host.state.take_rebirths(), ["spBv1.0/g/NCMD/n"]);

    let topic =
        fleetwright_api::topic::TopicPattern::compile("spBv1.0/{group}/+/{node}/{device}", fleetwright_api::pipeline::Format::SparkplugB);
    let mut stream = crate::stream::Stream::new(topic.unwrap().into(), decoder().into());
    let topic = b"spBv1.0/g/DDATA/n/d";
    let parsed = stream.observe(topic, &data(9, 2)).unwrap();
    assert!(matches!(stream.decode(topic, &data(9, 2), parsed, Time::now(), &mut |_| ()), Outcome::Malformed(_)));
    assert_eq!(stream.take_rebirths(), ["spBv1.0/g/NCMD/n"]);
}

#[test]
fn a_rebirth_is_asked_for_as_the_specification_says() {
    let command = Payload::decode(&*rebirth(Time::from_text("2026-05-04T03:02:01.5Z").unwrap())).unwrap();
    assert_eq!(command.timestamp, Some(MILLISECONDS));
    let [metric] = &command.metrics[..] else { panic!("one metric") };
    assert_eq!((metric.name.as_deref(), metric.datatype), (Some("Node Control/Rebirth"), Some(11)));
    assert_eq!(metric.value, Some(Number::Boolean(true)));
}
