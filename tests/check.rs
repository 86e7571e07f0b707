//! The role `check` as a process: standard input, output and exit status.

#![allow(clippy::unwrap_used, reason = "helpers of tests fail by panicking")]

use std::io::Write;
use std::process::{Command, Output, Stdio};

use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use prost_reflect::prost::Message;
use prost_reflect::prost_types::field_descriptor_proto::{Label, Type};
use prost_reflect::prost_types::{DescriptorProto, FieldDescriptorProto, FileDescriptorProto, FileDescriptorSet};

fn check(arguments: &[&str], input: &str) -> Output {
    let mut process = Command::new(env!("CARGO_BIN_EXE_fleetwright"))
        .arg("check")
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    process.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
    process.wait_with_output().unwrap()
}

/// The columns and values of the only row, their words separated by one space.
fn row(output: &Output) -> Vec<String> {
    let text = String::from_utf8(output.stdout.clone()).unwrap();
    text.lines().filter(|line| line.starts_with("  ")).skip(1).map(|line| line.split_whitespace().collect::<Vec<_>>().join(" ")).collect()
}

#[test]
fn the_full_sample_has_a_row_and_a_dead_letter() {
    let sample = concat!(env!("CARGO_MANIFEST_DIR"), "/config/samples/pipeline-full.yaml");
    let topic = ["--topic", "plants/berlin/line-3/press-1", "--arrival", "2026-05-04T12:00:00Z"];
    let good = r#"{"header":{"ts":"2026-05-04T11:59:58.5+00:00"},"values":{"rms":32,"cycles":7},"tags":{"a":[1]}}"#;
    let output = check(&[&[sample, "--message", "-"], &topic[..]].concat(), good);
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    let expected = [
        "time timestamp with time zone 2026-05-04T11:59:58.5Z",
        "device_id integer number of press-1",
        "plant text \"berlin\"",
        "rms double precision 3.2 mm/s",
        "cycles bigint 7",
        "running boolean NULL",
        "state text \"unknown\"",
        "serviced timestamp with time zone NULL",
        "tags jsonb {\"a\":[1]}",
    ];
    assert_eq!(row(&output), expected);

    let output = check(&[&[sample, "--message", "@/dev/stdin"], &topic[..]].concat(), r#"{"values":{"rms":32}}"#);
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    assert!(String::from_utf8(output.stdout).unwrap().contains("MissingTime"));
}

#[test]
fn invalid_arguments_exit_with_status_2() {
    for arguments in
        [&["-", "--topic", "a"][..], &["-", "--topic", "a", "--message", "{}"], &["/nowhere", "--topic", "a", "--message", "7"]]
    {
        let output = check(arguments, "");
        assert_eq!((output.status.code(), output.stdout.len()), (Some(2), 0), "{output:?}");
        assert!(!output.stderr.is_empty());
    }
}

/// `plant.Reading` with one member, `rms`.
fn descriptor() -> Vec<u8> {
    let member = FieldDescriptorProto {
        name: Some("rms".to_owned()),
        number: Some(1),
        label: Some(Label::Optional.into()),
        r#type: Some(Type::Double.into()),
        ..FieldDescriptorProto::default()
    };
    let message = DescriptorProto { name: Some("Reading".to_owned()), field: vec![member], ..DescriptorProto::default() };
    let file = FileDescriptorProto {
        name: Some("plant.proto".to_owned()),
        package: Some("plant".to_owned()),
        syntax: Some("proto3".to_owned()),
        message_type: vec![message],
        ..FileDescriptorProto::default()
    };
    FileDescriptorSet { file: vec![file] }.encode_to_vec()
}

#[test]
fn protobuf_takes_its_descriptor_from_a_file_or_from_the_config_map_beside_it() {
    let folder = tempfile::tempdir().unwrap();
    let pipeline = "apiVersion: fleetwright.io/v1alpha1\nkind: Pipeline\nmetadata: {name: vibration}\nspec:\n  source: {topic: \"devices/{device}\"}\n  \
                    decode:\n    format: Protobuf\n    protobuf: {configMapRef: {name: schema}, message: plant.Reading}\n    \
                    fields: [{name: rms, type: Float64}]\n  sink: {timescale: {connectionSecret: {name: timescale}, table: vibration}}\n";
    let map = format!(
        "---\napiVersion: v1\nkind: ConfigMap\nmetadata: {{name: schema}}\nbinaryData: {{descriptor.pb: {}}}\n",
        BASE64_STANDARD.encode(descriptor())
    );
    let file = folder.path().join("descriptor.pb");
    std::fs::write(&file, descriptor()).unwrap();
    // Member 1, the double 3.5.
    let message = ["-", "--topic", "devices/press-1", "--hex", "--message", "09 0000000000000c40"];
    let beside = check(&message, &format!("{pipeline}{map}"));
    let given = check(&[&message[..], &["--descriptor", file.to_str().unwrap()]].concat(), pipeline);
    for output in [beside, given] {
        assert_eq!((output.status.code(), row(&output)[2].as_str()), (Some(0), "rms double precision 3.5"), "{output:?}");
    }
    assert_eq!(check(&message, pipeline).status.code(), Some(1));
}
