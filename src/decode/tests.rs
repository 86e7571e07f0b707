use proptest::prelude::*;
use serde_json::json;

use super::dead_letter::Reason;
use super::time::Time;
use super::*;

pub(super) fn decoder(decode: &serde_json::Value) -> Decoder {
    Decoder::compile(&serde_json::from_value(decode.clone()).unwrap(), None).unwrap()
}

fn vibration() -> Decoder {
    decoder(&json!({
        "time": {"pointer": "/ts", "unit": "Milliseconds"},
        "fields": [
            {"name": "rms", "type": "Float64", "min": 0, "max": 200, "required": true},
            {"name": "count", "type": "Int64"},
            {"name": "running", "type": "Boolean", "pointer": "/state/running"},
            {"name": "state", "type": "Text", "pointer": "/state/name"},
        ],
    }))
}

const ARRIVAL: &str = "2026-05-04T12:00:00Z";

pub(super) type Readings = Vec<(Option<Time>, Vec<Value<'static>>)>;

pub(super) fn run(decoder: &Decoder, payload: &[u8]) -> (Outcome, Readings) {
    let mut readings = Vec::new();
    let outcome = decoder.decode(
        &SparkplugState::default(),
        "",
        payload,
        Parsed::default(),
        Time::from_text(ARRIVAL).unwrap(),
        0,
        &mut |time, values| {
            readings.push((time, values.iter().cloned().map(Value::into_owned).collect()));
        },
    );
    if matches!(outcome, Outcome::Malformed(_)) {
        readings.clear();
    }
    (outcome, readings)
}

pub(super) fn reason(outcome: &Outcome) -> Option<Reason> {
    match outcome {
        Outcome::Complete => None,
        Outcome::Partial(cause) | Outcome::Malformed(cause) => Some(cause.reason),
    }
}

#[test]
fn an_object_is_a_reading() {
    let payload =
        br#" {"ts":1777863721500,"rms":3,"other":{"deep":[1,{"x":null}]},"state":{"name":"r\u00fcn","running":true},"count":-7} "#;
    let (outcome, readings) = run(&vibration(), payload);
    assert_eq!(outcome, Outcome::Complete);
    let values = vec![Value::Float64(3.0), Value::Int64(-7), Value::Boolean(true), Value::Text("rün".into())];
    assert_eq!(readings, [(Time::from_text("2026-05-04T03:02:01.5Z"), values)]);
}

#[test]
fn what_is_not_utf8_does_not_matter_where_nobody_asks_for_it() {
    let payload = b"{\"ts\":1777863721500,\"rms\":1,\"site\":\"M\xfcnchen\",\"state\":{\"name\":\"idle\"}}";
    let (outcome, readings) = run(&vibration(), payload);
    assert_eq!((outcome, readings[0].1.last()), (Outcome::Complete, Some(&Value::Text("idle".into()))));
}

#[test]
fn a_field_is_found_among_few_and_among_many() {
    for count in [1, 15, 16, 40] {
        let fields: Vec<_> = (0..count).map(|number| json!({"name": format!("field{number}"), "type": "Int64"})).collect();
        let payload: serde_json::Map<_, _> = (0..count).map(|number| (format!("field{number}"), json!(number))).collect();
        let (_, readings) = run(&decoder(&json!({"fields": fields})), json!(payload).to_string().as_bytes());
        assert_eq!(readings[0].1, (0..count).map(Value::Int64).collect::<Vec<_>>(), "{count} fields");
    }
}

#[test]
fn absent_and_null_are_null() {
    let (outcome, readings) = run(&vibration(), br#"{"ts":1777863721500.25,"rms":0.1,"count":null,"state":{}}"#);
    assert_eq!(outcome, Outcome::Complete);
    assert_eq!(readings[0].0, Time::from_text("2026-05-04T03:02:01.50025Z"));
    assert_eq!(readings[0].1, [Value::Float64(0.1), Value::Null, Value::Null, Value::Null]);
}

#[test]
fn invalid_messages_are_refused_with_their_cause() {
    for (payload, expected) in [
        (r#"{"ts":1777863721500}"#, Reason::MissingField),
        (r#"{"ts":1777863721500,"rms":null}"#, Reason::MissingField),
        (r#"{"rms":1}"#, Reason::MissingTime),
        (r#"{"ts":null,"rms":1}"#, Reason::MissingTime),
        (r#"{"ts":"2026-05-04T03:02:01Z","rms":1}"#, Reason::WrongType),
        (r#"{"ts":true,"rms":1}"#, Reason::WrongType),
        (r#"{"ts":1777863721,"rms":1}"#, Reason::TimeOutOfRange),
        (r#"{"ts":1877863721500,"rms":1}"#, Reason::TimeOutOfRange),
        (r#"{"ts":1e300,"rms":1}"#, Reason::TimeOutOfRange),
        (r#"{"ts":1777863721500,"rms":"1"}"#, Reason::WrongType),
        (r#"{"ts":1777863721500,"rms":[1]}"#, Reason::WrongType),
        (r#"{"ts":1777863721500,"rms":{}}"#, Reason::WrongType),
        (r#"{"ts":1777863721500,"rms":true}"#, Reason::WrongType),
        (r#"{"ts":1777863721500,"rms":200.1}"#, Reason::OutOfRange),
        (r#"{"ts":1777863721500,"rms":-0.1}"#, Reason::OutOfRange),
        (r#"{"ts":1777863721500,"rms":1,"count":1.0}"#, Reason::WrongType),
        (r#"{"ts":1777863721500,"rms":1,"count":9223372036854775808}"#, Reason::OutOfRange),
        (r#"{"ts":1777863721500,"rms":1,"state":{"name":"a\u0000b"}}"#, Reason::OutOfRange),
        (r#"{"ts":1777863721500,"rms":1,"state":{"name":1}}"#, Reason::WrongType),
        (r#"{"ts":1777863721500,"rms":NaN}"#, Reason::Malformed),
        (r#"{"ts":1777863721500,"rms":1e999}"#, Reason::Malformed),
        (r#"{"ts":1777863721500,"rms":1"#, Reason::Malformed),
        (r#"{"ts":1777863721500,"rms":1} x"#, Reason::Malformed),
        ("", Reason::Malformed),
        ("7", Reason::Malformed),
        ("\"text\"", Reason::Malformed),
    ] {
        let (outcome, readings) = run(&vibration(), payload.as_bytes());
        assert_eq!((reason(&outcome), readings.len()), (Some(expected), 0), "{payload}");
    }
    assert_eq!(reason(&run(&vibration(), b"{\"ts\":1777863721500,\"rms\":1,\"state\":{\"name\":\"\xff\"}}").0), Some(Reason::Malformed));
}

#[test]
fn an_array_keeps_its_good_readings() {
    let payload = br#"[{"ts":1777863721500,"rms":1},{"ts":1777863721501,"rms":"x"},7,null,[],"a",true,1.5,{"ts":1777863721502,"rms":2}]"#;
    let (outcome, readings) = run(&vibration(), payload);
    let Outcome::Partial(cause) = outcome else { panic!("{outcome:?}") };
    assert_eq!(cause.reason, Reason::WrongType);
    assert!(cause.detail.contains("reading 1") && cause.detail.contains('7'), "{}", cause.detail);
    assert_eq!(readings.iter().map(|(_, values)| values[0].clone()).collect::<Vec<_>>(), [Value::Float64(1.0), Value::Float64(2.0)]);
    assert_eq!(run(&vibration(), b"[]"), (Outcome::Complete, vec![]));
}

#[test]
fn an_array_that_breaks_off_is_malformed() {
    let (outcome, _) = run(&vibration(), br#"[{"ts":1777863721500,"rms":1},{"ts":"#);
    assert!(matches!(outcome, Outcome::Malformed(_)), "{outcome:?}");
}

#[test]
fn pointers_reach_everywhere() {
    let decoder = decoder(&json!({"fields": [
        {"name": "a", "type": "Float64", "pointer": "/values/1"},
        {"name": "b", "type": "Int64", "pointer": "/values/2/x~1y"},
        {"name": "c", "type": "Text", "pointer": "/~0/"},
        {"name": "d", "type": "Int64", "pointer": "/values/2/x~1y"},
    ]}));
    let (outcome, readings) = run(&decoder, br#"{"values":[0,1.5,{"x/y":3}],"~":{"":"t"}}"#);
    assert_eq!(outcome, Outcome::Complete);
    assert_eq!(readings, [(None, vec![Value::Float64(1.5), Value::Int64(3), Value::Text("t".into()), Value::Int64(3)])]);
}

#[test]
fn a_pointer_that_is_none_is_refused() {
    let decode = serde_json::from_value(json!({"fields": [{"name": "a", "type": "Float64", "pointer": "a"}]})).unwrap();
    assert!(Decoder::compile(&decode, None).is_err());
}

proptest! {
    #[test]
    fn arbitrary_bytes_never_panic(payload in prop::collection::vec(any::<u8>(), 0..200)) {
        run(&vibration(), &payload);
    }

    /// Near JSON: the parts of a payload in any order.
    #[test]
    fn arbitrary_json_never_panics(parts in prop::collection::vec(prop::sample::select(vec![
        "{", "}", "[", "]", ",", ":", "\"ts\"", "\"rms\"", "\"state\"", "\"name\"", "1777863721500", "1.5", "null", "true", "\"\\u0000\"", "-1", "1e308",
    ]), 0..40)) {
        run(&vibration(), parts.concat().as_bytes());
    }

    /// What is written is what is read, to the last bit.
    #[test]
    fn values_are_exact(rms in 0.0_f64..200.0, count in any::<i64>(), name in "[^\0]{0,20}", running in any::<bool>()) {
        let payload = json!({"rms": rms, "count": count, "state": {"name": name, "running": running}, "ts": 1_777_863_721_500_i64}).to_string();
        let (outcome, readings) = run(&vibration(), payload.as_bytes());
        prop_assert_eq!(outcome, Outcome::Complete);
        prop_assert_eq!(&readings[0].1, &vec![Value::Float64(rms), Value::Int64(count), Value::Boolean(running), Value::Text(name.into())]);
    }
}
