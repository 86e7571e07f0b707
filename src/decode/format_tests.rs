//! Each format, by the examples of its own specification.

use prost_reflect::prost::Message as _;
use prost_reflect::prost_types::{
    DescriptorProto, EnumDescriptorProto, EnumValueDescriptorProto, FieldDescriptorProto, FileDescriptorProto, FileDescriptorSet,
    field_descriptor_proto::{Label, Type},
};
use prost_reflect::{DescriptorPool, DynamicMessage};
use serde_json::json;

use super::dead_letter::Reason;
use super::tests::{Readings, decoder, reason, run};
use super::time::Time;
use super::*;

#[allow(clippy::unnecessary_wraps, reason = "a reading's time may be none")]
fn time(text: &str) -> Option<Time> {
    Some(Time::from_text(text).unwrap())
}

fn floats(readings: &Readings) -> Vec<(Option<Time>, Vec<f64>)> {
    let number = |value: &Value<'_>| if let Value::Float64(number) = value { *number } else { f64::NAN };
    readings.iter().map(|(time, values)| (*time, values.iter().map(number).collect())).collect()
}

fn senml(fields: &[(&str, &str)]) -> serde_json::Value {
    let fields: Vec<_> = fields.iter().map(|(name, type_)| json!({"name": name, "type": type_})).collect();
    json!({"format": "SenMl", "time": {"maxAge": "9999d", "maxAhead": "999999w"}, "fields": fields})
}

/// RFC 8428, 5.1.1 and 5.1.2.
#[test]
fn senml_resolves_records_as_in_its_examples() {
    let by_name = json!({"format": "SenMl", "fields": [{"name": "t", "type": "Float64", "metric": "urn:dev:ow:10e2073a01080063"}]});
    let (outcome, readings) = run(&decoder(&by_name), br#"[{"n":"urn:dev:ow:10e2073a01080063","u":"Cel","v":23.1}]"#);
    assert_eq!((outcome, floats(&readings)), (Outcome::Complete, vec![(None, vec![23.1])]));

    let two = decoder(&senml(&[("voltage", "Float64"), ("current", "Float64")]));
    let pack = br#"[{"bn":"urn:dev:ow:10e2073a01080063:","n":"voltage","u":"V","v":120.1},{"n":"current","u":"A","v":1.2}]"#;
    assert_eq!(floats(&run(&two, pack).1), [(None, vec![120.1, 1.2])]);

    let pack = br#"[{"bn":"urn:dev:ow:10e2073a0108006:","bt":1.276020076001e+09,"bu":"A","bver":5,"n":"voltage","u":"V","v":120.1},
        {"n":"current","t":-5,"v":1.2},{"n":"current","t":-4,"v":1.3},{"n":"current","t":-3,"v":1.4},{"n":"current","v":1.7}]"#;
    let (outcome, readings) = run(&two, pack);
    assert_eq!((outcome, readings.len()), (Outcome::Complete, 4));
    assert_eq!(readings[0], (time("2010-06-08T18:01:16.001Z"), vec![Value::Float64(120.1), Value::Float64(1.7)]));
    assert_eq!(readings[1], (time("2010-06-08T18:01:11.001Z"), vec![Value::Null, Value::Float64(1.2)]));

    let relative = br#"[{"bn":"urn:dev:ow:10e2073a01080063:current","bu":"A","v":1.2,"t":-60},{"v":1.3}]"#;
    let (_, readings) = run(&two, relative);
    assert_eq!(readings[0].0, time("2026-05-04T11:59:00Z"));
    assert_eq!(readings[1].0, None);
}

/// RFC 8428, 5.1.3, and the same resolved, 5.1.4: one name, distinguished by units.
#[test]
fn senml_distinguishes_measurements_of_one_name_by_their_units() {
    let name = "urn:dev:ow:10e2073a01080063";
    let field = |field: &str, unit: &str| json!({"name": field, "type": "Float64", "metric": name, "unit": unit});
    let fields = [field("humidity", "%RH"), field("longitude", "lon"), field("latitude", "lat"), field("battery", "%EL")];
    let decoder = decoder(&json!({"format": "SenMl", "time": {"maxAge": "9999d"}, "fields": fields}));
    let pack = br#"[{"bn":"urn:dev:ow:10e2073a01080063","bt":1.320067464e+09,"bu":"%RH","v":20},{"u":"lon","v":24.30621},
        {"u":"lat","v":60.07965},{"t":60,"v":20.3},{"u":"lon","t":60,"v":24.30622},{"u":"lat","t":60,"v":60.07965},{"t":120,"v":20.7},
        {"u":"lon","t":120,"v":24.30623},{"u":"lat","t":120,"v":60.07966},{"u":"%EL","t":150,"v":98},{"t":180,"v":21.2},
        {"u":"lon","t":180,"v":24.30628},{"u":"lat","t":180,"v":60.07967}]"#;
    let number = Value::Float64;
    let expected = [
        (time("2011-10-31T13:24:24Z"), vec![number(20.0), number(24.30621), number(60.07965), Value::Null]),
        (time("2011-10-31T13:25:24Z"), vec![number(20.3), number(24.30622), number(60.07965), Value::Null]),
        (time("2011-10-31T13:26:24Z"), vec![number(20.7), number(24.30623), number(60.07966), Value::Null]),
        (time("2011-10-31T13:26:54Z"), vec![Value::Null, Value::Null, Value::Null, number(98.0)]),
        (time("2011-10-31T13:27:24Z"), vec![number(21.2), number(24.30628), number(60.07967), Value::Null]),
    ];
    assert_eq!(run(&decoder, pack), (Outcome::Complete, expected.to_vec()));

    let units = ["%RH", "lon", "lat", "%EL"];
    let records = expected.iter().flat_map(|(at, values)| {
        let seconds = at.unwrap().0 / 1_000_000;
        values.iter().zip(units).filter_map(move |(value, unit)| match value {
            Value::Float64(number) => Some(json!({"n": name, "u": unit, "t": seconds, "v": number})),
            _ => None,
        })
    });
    let resolved = json!(records.collect::<Vec<_>>()).to_string();
    assert_eq!(run(&decoder, resolved.as_bytes()), (Outcome::Complete, expected.to_vec()));
}

/// RFC 8428, 5.1.5.
#[test]
fn senml_has_values_of_several_types() {
    let decode = json!({"format": "SenMl", "fields": [
        {"name": "temp", "type": "Float64", "unit": "Cel"}, {"name": "label", "type": "Text"}, {"name": "open", "type": "Boolean"},
    ]});
    let pack = br#"[{"bn":"urn:dev:ow:10e2073a01080063:","n":"temp","u":"Cel","v":23.1},{"n":"label","vs":"Machine Room"},
        {"n":"open","vb":false},{"n":"nfv-reader","vd":"aGkgCg"}]"#;
    let (outcome, readings) = run(&decoder(&decode), pack);
    assert_eq!(outcome, Outcome::Complete);
    assert_eq!(readings, [(None, vec![Value::Float64(23.1), Value::Text("Machine Room".into()), Value::Boolean(false)])]);
    // No column takes data.
    let data = json!({"format": "SenMl", "fields": [{"name": "data", "type": "Text", "metric": "nfv-reader"}]});
    assert_eq!(reason(&run(&decoder(&data), pack).0), Some(Reason::WrongType));
}

/// RFC 8428, 5.1.6 and 5.1.7.
#[test]
fn senml_speaks_of_several_things() {
    let field = |name: &str, metric: &str| json!({"name": name, "type": "Float64", "metric": metric});
    let collection =
        br#"[{"bn":"2001:db8::2/","bt":1.320078429e+09,"n":"temperature","u":"Cel","v":25.2},{"n":"humidity","u":"%RH","v":30},
        {"bn":"2001:db8::1/","n":"temperature","u":"Cel","v":12.3},{"n":"humidity","u":"%RH","v":67}]"#;
    let thermostat = br#"[{"bn":"urn:dev:ow:10e2073a01080063:"},{"n":"temp","u":"Cel","v":23.1},{"n":"heat","u":"/","v":1},
        {"n":"fan","u":"/","v":0}]"#;
    let on = br#"[{"bt":1.320078429e+09,"bu":"/","n":"2001:db8::3","v":1},{"n":"2001:db8::4","v":1}]"#;
    let off = br#"[{"bt":1.320078429e+09,"bu":"/","n":"2001:db8::3","v":0.5},{"n":"2001:db8::4","v":0.5},
        {"n":"2001:db8::3","t":0.1,"v":0},{"n":"2001:db8::4","t":0.1,"v":0}]"#;
    let (at, later) = (time("2011-10-31T16:27:09Z"), time("2011-10-31T16:27:09.1Z"));
    let lights = [field("one", "2001:db8::3"), field("other", "2001:db8::4")];
    for (fields, pack, expected) in [
        (
            vec![field("warm", "2001:db8::2/temperature"), field("cold", "2001:db8::1/temperature"), field("wet", "2001:db8::1/humidity")],
            &collection[..],
            vec![(at, vec![25.2, 12.3, 67.0])],
        ),
        (vec![field("temp", "temp"), field("heat", "heat"), field("fan", "fan")], thermostat, vec![(None, vec![23.1, 1.0, 0.0])]),
        (lights.to_vec(), on, vec![(at, vec![1.0, 1.0])]),
        (lights.to_vec(), off, vec![(at, vec![0.5, 0.5]), (later, vec![0.0, 0.0])]),
    ] {
        let (outcome, readings) = run(&decoder(&json!({"format": "SenMl", "time": {"maxAge": "9999d"}, "fields": fields})), pack);
        assert_eq!((outcome, floats(&readings)), (Outcome::Complete, expected));
    }
}

/// RFC 8428, 6: the CBOR of an example of 5.1.2.
#[test]
fn senml_in_cbor_is_the_same() {
    let hex = "87a721781b75726e3a6465763a6f773a3130653230373361303130383030363a22fb41d303a15b00106223614120050067766f6c74616765016156\
               02fb405e066666666666a3006763757272656e74062402fb3ff3333333333333a3006763757272656e74062302fb3ff4cccccccccccda300676375\
               7272656e74062202fb3ff6666666666666a3006763757272656e74062102f93e00a3006763757272656e74062002fb3ff999999999999aa3006763\
               757272656e74060002fb3ffb333333333333";
    let hex: String = hex.split_whitespace().collect();
    let payload: Vec<u8> = (0..hex.len()).step_by(2).map(|index| u8::from_str_radix(&hex[index..index + 2], 16).unwrap()).collect();
    let mut decode = senml(&[("voltage", "Float64"), ("current", "Float64")]);
    decode["format"] = "SenMlCbor".into();
    let (outcome, readings) = run(&decoder(&decode), &payload);
    assert_eq!((outcome, readings.len()), (Outcome::Complete, 6));
    assert_eq!(readings[0], (time("2010-06-08T18:01:16.001Z"), vec![Value::Float64(120.1), Value::Float64(1.7)]));
    assert_eq!(readings[4], (time("2010-06-08T18:01:14.001Z"), vec![Value::Null, Value::Float64(1.5)]));
}

#[test]
fn senml_has_bases_sums_and_every_type() {
    let decode = json!({"format": "SenMl", "fields": [
        {"name": "open", "type": "Boolean"}, {"name": "label", "type": "Text"}, {"name": "count", "type": "Int64"},
        {"name": "energy", "type": "Float64", "unit": "J"}, {"name": "total", "type": "Float64", "metric": "energy#sum"},
    ]});
    let pack =
        br#"[{"bn":"urn:x:","bv":100,"bs":1000,"bver":10},{"n":"open","vb":false},{"n":"label","vs":"caf\u00e9"},{"n":"count","v":5},
        {"n":"energy","u":"J","v":0.5,"s":1.5},{"n":"unknown","vd":"QUJD"}]"#;
    let (outcome, readings) = run(&decoder(&decode), pack);
    assert_eq!(outcome, Outcome::Complete);
    let expected = [Value::Boolean(false), Value::Text("café".into()), Value::Int64(105), Value::Float64(100.5), Value::Float64(1001.5)];
    assert_eq!(readings[0].1, expected);
}

#[test]
fn senml_that_is_refused() {
    let decode = json!({"format": "SenMl", "fields": [{"name": "t", "type": "Float64", "unit": "Cel"}]});
    for (pack, expected) in [
        (r#"[{"bver":11,"n":"t","v":1}]"#, Reason::Malformed),
        (r#"[{"n":"t","v":1,"must_":1}]"#, Reason::Malformed),
        (r#"[{"v":1}]"#, Reason::Malformed),
        (r#"{"n":"t","v":1}"#, Reason::Malformed),
        (r#"[{"n":"t","v":"1"}]"#, Reason::Malformed),
        (r#"[{"n":"other","v":1}]"#, Reason::MissingField),
        ("[]", Reason::MissingField),
        (r#"[{"n":"t","vs":"1"}]"#, Reason::WrongType),
        (r#"[{"n":"t","u":"K","v":1}]"#, Reason::WrongUnit),
        (r#"[{"n":"a:t","v":1},{"n":"b:t","v":2}]"#, Reason::Conflict),
        (r#"[{"n":"t","t":4e9,"v":1}]"#, Reason::TimeOutOfRange),
        (r#"[{"n":"t","t":1e300,"v":1}]"#, Reason::Malformed),
    ] {
        let (outcome, readings) = run(&decoder(&decode), pack.as_bytes());
        assert_eq!((reason(&outcome), readings.len()), (Some(expected), 0), "{pack}");
    }
}

#[test]
fn cbor_maps_are_read_as_objects() {
    let decode = json!({"format": "Cbor", "time": {"pointer": "/1", "unit": "Seconds"}, "fields": [
        {"name": "rms", "type": "Float64"}, {"name": "at", "type": "Timestamp"}, {"name": "rest", "type": "Json", "pointer": "/x"},
        {"name": "first", "type": "Int64", "pointer": "/x/0"},
    ]});
    // {1: 1(1777863721.5), "rms": 1.5 (half), "at": 0("2013-03-21T20:04:00Z"), "x": [7, {"y": null}]}
    let payload =
        b"\xa4\x01\xc1\xfb\x41\xda\x7e\x03\x0a\x60\x00\x00\x63rms\xf9\x3e\x00\x62at\xc0\x742013-03-21T20:04:00Z\x61x\x82\x07\xa1\x61y\xf6";
    let (outcome, readings) = run(&decoder(&decode), payload);
    assert_eq!(outcome, Outcome::Complete);
    assert_eq!(readings[0].0, time("2026-05-04T03:02:01.5Z"));
    let at = Value::Timestamp(time("2013-03-21T20:04:00Z").unwrap());
    assert_eq!(readings[0].1, [Value::Float64(1.5), at, Value::Json(r#"[7,{"y":null}]"#.into()), Value::Int64(7)]);
    let nan = run(&decoder(&decode), b"\xa2\x01\x1a\x69\xf7\xf9\xe9\x63rms\xf9\x7e\x00").0;
    assert_eq!(reason(&nan), Some(Reason::OutOfRange));
}

#[test]
fn plain_text_is_one_value() {
    for (type_, payload, expected) in [
        ("Float64", " 1.5\n", Ok(Value::Float64(1.5))),
        ("Float64", "7", Ok(Value::Float64(7.0))),
        ("Float64", "inf", Err(Reason::WrongType)),
        ("Float64", "NaN", Err(Reason::WrongType)),
        ("Float64", "1e999", Err(Reason::OutOfRange)),
        ("Float64", "", Err(Reason::Malformed)),
        ("Int64", "-7", Ok(Value::Int64(-7))),
        ("Int64", "7.5", Err(Reason::WrongType)),
        ("Boolean", "ON", Ok(Value::Boolean(true))),
        ("Boolean", "0", Ok(Value::Boolean(false))),
        ("Boolean", "maybe", Err(Reason::WrongType)),
        ("Text", " a ", Ok(Value::Text(" a ".into()))),
        ("Timestamp", "2026-05-04T03:02:01.5Z", Ok(Value::Timestamp(time("2026-05-04T03:02:01.5Z").unwrap()))),
    ] {
        let decode = json!({"format": "PlainText", "fields": [{"name": "value", "type": type_, "required": true}]});
        let (outcome, readings) = run(&decoder(&decode), payload.as_bytes());
        match expected {
            Ok(value) => assert_eq!((outcome, readings), (Outcome::Complete, vec![(None, vec![value])]), "{payload}"),
            Err(expected) => assert_eq!((reason(&outcome), readings.len()), (Some(expected), 0), "{payload}"),
        }
    }
}

#[test]
fn fields_have_scales_defaults_times_and_json() {
    let decode = json!({"time": {"pointer": "/ts", "maxAge": "1h", "maxAhead": "1m"}, "fields": [
        {"name": "t", "type": "Float64", "scale": 0.1, "offset": -40, "min": -40, "max": 85},
        {"name": "mode", "type": "Text", "default": "auto"},
        {"name": "since", "type": "Timestamp", "timeUnit": "Seconds"},
        {"name": "tags", "type": "Json", "default": {}},
    ]});
    let decoder = decoder(&decode);
    let payload = br#"{"ts":1777896000000,"t":650,"since":1777863721.5,"tags":{"a":[1,"\\u0000"]}}"#;
    let (outcome, readings) = run(&decoder, payload);
    assert_eq!(outcome, Outcome::Complete);
    let since = Value::Timestamp(time("2026-05-04T03:02:01.5Z").unwrap());
    assert_eq!(readings[0].1, [Value::Float64(25.0), Value::Text("auto".into()), since, Value::Json(r#"{"a":[1,"\\u0000"]}"#.into())]);
    assert_eq!(run(&decoder, br#"{"ts":1777896000000}"#).1[0].1[3], Value::Json("{}".into()));
    for (payload, expected) in [
        (r#"{"ts":1777896060001}"#, Reason::TimeOutOfRange),
        (r#"{"ts":1777892399999}"#, Reason::TimeOutOfRange),
        (r#"{"ts":1777896000000,"t":1251}"#, Reason::OutOfRange),
        (r#"{"ts":1777896000000,"since":"2026-05-04T03:02:01.5Z"}"#, Reason::WrongType),
        (r#"{"ts":1777896000000,"since":1e15}"#, Reason::OutOfRange),
        (r#"{"ts":1777896000000,"tags":["\u0000"]}"#, Reason::OutOfRange),
    ] {
        assert_eq!(reason(&run(&decoder, payload.as_bytes()).0), Some(expected), "{payload}");
    }
}

#[test]
fn readings_may_stand_deeper() {
    let decode = json!({"readings": "/data/points", "fields": [{"name": "v", "type": "Int64"}]});
    let (outcome, readings) = run(&decoder(&decode), br#"{"id":1,"data":{"points":[{"v":1},{"v":2}],"v":9}}"#);
    assert_eq!((outcome, readings), (Outcome::Complete, vec![(None, vec![Value::Int64(1)]), (None, vec![Value::Int64(2)])]));
    assert_eq!(reason(&run(&decoder(&decode), br#"{"data":{}}"#).0), Some(Reason::MissingField));
    assert_eq!(reason(&run(&decoder(&decode), br#"{"data":[1]}"#).0), Some(Reason::Malformed));
}

fn member(name: &str, number: i32, type_: Type, type_name: Option<&str>) -> FieldDescriptorProto {
    FieldDescriptorProto {
        name: Some(name.to_owned()),
        number: Some(number),
        label: Some(Label::Optional.into()),
        r#type: Some(type_.into()),
        type_name: type_name.map(str::to_owned),
        ..FieldDescriptorProto::default()
    }
}

/// `plant.Reading` and `plant.Batch`, a list of them.
fn descriptor() -> Vec<u8> {
    let reading = DescriptorProto {
        name: Some("Reading".to_owned()),
        field: vec![
            member("at", 1, Type::Sint64, None),
            member("rms", 2, Type::Float, None),
            member("count", 3, Type::Int32, None),
            member("state", 4, Type::Enum, Some(".plant.State")),
            member("below", 5, Type::Message, Some(".plant.Reading")),
            member("label", 6, Type::String, None),
        ],
        ..DescriptorProto::default()
    };
    let mut list = member("readings", 7, Type::Message, Some(".plant.Reading"));
    list.label = Some(Label::Repeated.into());
    let batch = DescriptorProto { name: Some("Batch".to_owned()), field: vec![list], ..DescriptorProto::default() };
    let value = |name: &str, number| EnumValueDescriptorProto { name: Some(name.to_owned()), number: Some(number), options: None };
    let state = EnumDescriptorProto {
        name: Some("State".to_owned()),
        value: vec![value("IDLE", 0), value("RUNNING", 1)],
        ..EnumDescriptorProto::default()
    };
    let file = FileDescriptorProto {
        name: Some("plant.proto".to_owned()),
        package: Some("plant".to_owned()),
        syntax: Some("proto3".to_owned()),
        message_type: vec![reading, batch],
        enum_type: vec![state],
        ..FileDescriptorProto::default()
    };
    FileDescriptorSet { file: vec![file] }.encode_to_vec()
}

fn protobuf(changes: &serde_json::Value) -> Result<Decoder, CompileError> {
    let mut decode = json!({
        "format": "Protobuf", "protobuf": {"configMapRef": {"name": "schema"}, "message": "plant.Reading"},
        "time": {"pointer": "/at"},
        "fields": [
            {"name": "rms", "type": "Float64"}, {"name": "count", "type": "Int64"}, {"name": "state", "type": "Text"},
            {"name": "number", "type": "Int64", "pointer": "/below/state"}, {"name": "deep", "type": "Text", "pointer": "/below/label"},
        ],
    });
    for (key, value) in changes.as_object().unwrap() {
        decode[key] = value.clone();
    }
    Decoder::compile(&serde_json::from_value(decode).unwrap(), Some(&descriptor()))
}

/// The encoder is prost-reflect's, which knows nothing of the reader.
fn encode(name: &str, value: &serde_json::Value) -> Vec<u8> {
    let pool = DescriptorPool::decode(descriptor().as_slice()).unwrap();
    let message = pool.get_message_by_name(name).unwrap();
    fill(DynamicMessage::new(message), value).encode_to_vec()
}

fn fill(mut message: DynamicMessage, value: &serde_json::Value) -> DynamicMessage {
    use prost_reflect::{Kind, ReflectMessage, Value as Member};
    for (name, value) in value.as_object().unwrap() {
        let field = message.descriptor().get_field_by_name(name).unwrap();
        let one = |value: &serde_json::Value| match field.kind() {
            Kind::Sint64 => Member::I64(value.as_i64().unwrap()),
            #[allow(clippy::cast_possible_truncation, reason = "a test's own number")]
            Kind::Float => Member::F32(value.as_f64().unwrap() as f32),
            Kind::Int32 => Member::I32(value.as_i64().unwrap().try_into().unwrap()),
            Kind::Enum(_) => Member::EnumNumber(value.as_i64().unwrap().try_into().unwrap()),
            Kind::Message(below) => Member::Message(fill(DynamicMessage::new(below), value)),
            _ => Member::String(value.as_str().unwrap().to_owned()),
        };
        let member = if field.is_list() { Member::List(value.as_array().unwrap().iter().map(one).collect()) } else { one(value) };
        message.set_field(&field, member);
    }
    message
}

#[test]
fn protobuf_is_read_by_its_description() {
    let decoder = protobuf(&json!({})).unwrap();
    let payload = encode(
        "plant.Reading",
        &json!({"at": 1_777_863_721_500_i64, "rms": 1.5, "count": -7, "state": 1, "below": {"state": 1, "label": "ü"}}),
    );
    let (outcome, readings) = run(&decoder, &payload);
    assert_eq!(outcome, Outcome::Complete);
    let values = vec![Value::Float64(1.5), Value::Int64(-7), Value::Text("RUNNING".into()), Value::Int64(1), Value::Text("ü".into())];
    assert_eq!(readings, [(time("2026-05-04T03:02:01.5Z"), values)]);

    // What proto3 leaves out is zero; what stands in a message that is not there is not there.
    let (_, readings) = run(&decoder, &encode("plant.Reading", &json!({"at": 1_777_863_721_500_i64})));
    assert_eq!(readings[0].1, [Value::Float64(0.0), Value::Int64(0), Value::Text("IDLE".into()), Value::Null, Value::Null]);
    assert_eq!(reason(&run(&decoder, b"\x08").0), Some(Reason::Malformed));
    assert_eq!(reason(&run(&decoder, b"\x10\x01").0), Some(Reason::Malformed));

    let batch = json!({"protobuf": {"configMapRef": {"name": "schema"}, "message": "plant.Batch"}, "readings": "/readings"});
    let payload =
        encode("plant.Batch", &json!({"readings": [{"at": 1_777_863_721_500_i64, "rms": 1.0}, {"at": 1_777_863_721_501_i64, "rms": 2.0}]}));
    assert_eq!(run(&protobuf(&batch).unwrap(), &payload).1.len(), 2);
}

#[test]
fn protobuf_fields_that_do_not_fit() {
    let field = |field: serde_json::Value| json!({"fields": [field]});
    for changes in [
        json!({"protobuf": {"configMapRef": {"name": "schema"}, "message": "plant.Nothing"}}),
        json!({"time": {"pointer": "/label"}}),
        json!({"readings": "/below/rms"}),
        field(json!({"name": "nothing", "type": "Float64"})),
        field(json!({"name": "label", "type": "Float64"})),
        field(json!({"name": "rms", "type": "Int64"})),
        field(json!({"name": "rms", "type": "Float64", "pointer": "/rms/deeper"})),
        field(json!({"name": "below", "type": "Text"})),
    ] {
        assert!(matches!(protobuf(&changes), Err(CompileError::Describe(_))), "{changes}");
    }
}
