use std::path::PathBuf;

use super::*;

const ARRIVAL: &str = "2026-05-04T12:00:00Z";

fn arguments(folder: &tempfile::TempDir, yaml: &str) -> Arguments {
    let path: PathBuf = folder.path().join("pipeline.yaml");
    std::fs::write(&path, yaml).unwrap();
    Arguments {
        manifest: path.display().to_string(),
        pipeline: None,
        topic: vec!["devices/press-1/telemetry".to_owned()],
        message: vec!["{}".to_owned()],
        hex: false,
        base64: false,
        descriptor: None,
        arrival: Time::from_text(ARRIVAL),
    }
}

fn pipeline(name: &str, decode: &str) -> String {
    format!(
        "apiVersion: fleetwright.io/v1alpha1\nkind: Pipeline\nmetadata: {{name: {name}}}\nspec:\n  source: {{topic: \"devices/{{device}}/telemetry\"}}\n  \
         decode: {decode}\n  sink: {{timescale: {{connectionSecret: {{name: timescale}}, table: {name}}}}}\n"
    )
}

/// The lines of the output, their words separated by one space.
fn words(text: &str) -> Vec<String> {
    text.lines().map(|line| line.split_whitespace().collect::<Vec<_>>().join(" ")).filter(|line| !line.is_empty()).collect()
}

const FIELDS: &str = "{fields: [{name: rms, type: Float64, unit: mm/s, required: true}, {name: state, type: Text}]}";

#[test]
fn a_row_is_printed_with_types_and_units() {
    let folder = tempfile::tempdir().unwrap();
    let mut arguments = arguments(&folder, &pipeline("vibration", FIELDS));
    arguments.message = vec![r#"{"rms":3.25,"state":"l\u00e4uft\u001b[1m"}"#.to_owned()];
    let (text, is_good) = check(&arguments).unwrap();
    let expected = [
        // As in the worker: a microsecond after the time of the message itself.
        "time timestamp with time zone 2026-05-04T12:00:00.000001Z (arrival)",
        "device_id integer number of press-1",
        "rms double precision 3.25 mm/s",
        "state text \"läuft\\u{1b}[1m\"",
    ];
    assert!(is_good);
    assert_eq!(words(&text)[2..], expected);
    assert!(!text.contains('\u{1b}'));
}

#[test]
fn readings_without_a_time_are_a_microsecond_apart_as_in_the_worker() {
    let folder = tempfile::tempdir().unwrap();
    let mut arguments = arguments(&folder, &pipeline("vibration", FIELDS));
    // A message without times that is partly invalid is refused as a whole.
    let messages = [r#"[{"rms":1},{"rms":2}]"#, r#"[{"rms":4},{"rms":"x"},{"rms":5}]"#, r#"{"rms":3}"#];
    arguments.message = messages.map(str::to_owned).to_vec();
    let (text, is_good) = check(&arguments).unwrap();
    let times: Vec<_> =
        words(&text).into_iter().filter_map(|line| line.strip_prefix("time timestamp with time zone ").map(str::to_owned)).collect();
    assert_eq!(times.len(), 3);
    assert!(times.is_sorted() && times[0] != times[1] && times[1] != times[2], "{times:?}");
    assert!(!is_good && text.contains("WrongType"), "{text}");
}

#[test]
fn refused_messages_are_printed_with_their_reason() {
    let folder = tempfile::tempdir().unwrap();
    for (decode, topic, message, reason) in [
        (FIELDS, "devices/press-1/telemetry", "{", "refused: Malformed"),
        (FIELDS, "devices/press-1/telemetry", "{}", "refused: MissingField"),
        (FIELDS, "devices/press-1", "{}", "refused: TopicMismatch"),
        ("{time: {pointer: ts}, fields: [{name: rms, type: Float64}]}", "devices/press-1/telemetry", "{}", "InvalidSpec"),
        ("{fields: [{name: rms, type: Float64, pointr: /rms}]}", "devices/press-1/telemetry", "{}", "spec.decode.fields[0].pointr"),
        ("{fields: [{name: rms, type: Float32}]}", "devices/press-1/telemetry", "{}", "InvalidSpec"),
        ("{fields: [{name: time, type: Float64}]}", "devices/press-1/telemetry", "{}", "InvalidSpec"),
        (
            "{format: Protobuf, protobuf: {configMapRef: {name: schema}, message: a.B}, fields: [{name: rms, type: Float64}]}",
            "devices/press-1/telemetry",
            "",
            "DescriptorNotFound",
        ),
    ] {
        let mut arguments = arguments(&folder, &pipeline("vibration", decode));
        (arguments.topic, arguments.message) = (vec![topic.to_owned()], vec![message.to_owned()]);
        let (text, is_good) = check(&arguments).unwrap();
        assert!(!is_good && text.contains(reason), "{decode} {message}: {text}");
    }
}

#[test]
fn one_pipeline_of_several_is_chosen_by_name() {
    let folder = tempfile::tempdir().unwrap();
    let yaml = format!("{}---\n{}---\napiVersion: v1\nkind: Secret\nmetadata: {{name: a}}\n", pipeline("a", FIELDS), pipeline("b", FIELDS));
    let mut arguments = arguments(&folder, &yaml);
    arguments.message = vec![r#"{"rms":1}"#.to_owned()];
    for (name, is_found) in [(None, false), (Some("a"), true), (Some("b"), true), (Some("c"), false)] {
        arguments.pipeline = name.map(str::to_owned);
        let found =
            check(&arguments).ok().map(|(text, is_good)| is_good && text.contains(&format!("1 row of {}", name.unwrap_or_default())));
        assert_eq!(found, is_found.then_some(true), "{name:?}");
    }
    let items = [pipeline("a", FIELDS)].map(|text| serde_saphyr::from_str::<serde_json::Value>(&text).unwrap());
    let list = serde_json::json!({"apiVersion": "v1", "kind": "List", "items": items}).to_string();
    std::fs::write(&arguments.manifest, list).unwrap();
    arguments.pipeline = None;
    assert!(check(&arguments).unwrap().1);
}

#[test]
fn invalid_arguments_are_errors() {
    let folder = tempfile::tempdir().unwrap();
    let good = || arguments(&folder, &pipeline("vibration", FIELDS));
    let text = |list: &[&str]| list.iter().map(|text| (*text).to_owned()).collect::<Vec<_>>();
    for broken in [
        Arguments { manifest: "/nowhere/at/all".to_owned(), ..good() },
        Arguments { topic: text(&["devices/+/telemetry"]), ..good() },
        Arguments { topic: text(&["a", "b"]), ..good() },
        Arguments { message: text(&["-", "-"]), ..good() },
        Arguments { message: text(&["xyz"]), hex: true, ..good() },
        Arguments { descriptor: Some("/nowhere/at/all".to_owned()), ..good() },
    ] {
        assert!(check(&broken).is_err(), "{broken:?}");
    }
    for yaml in ["kind: [", "kind: Pipeline\napiVersion: other.io/v1\n", ""] {
        assert!(check(&arguments(&folder, yaml)).is_err(), "{yaml}");
    }
}
