use futures::executor::block_on;
use serde_json::json;

use super::*;

fn config_map(name: &str, role: Option<&str>, report: Option<&str>) -> ConfigMap {
    let mut labels = json!({GATEWAY_LABEL: "plant-1"});
    if let Some(role) = role {
        labels[ROLE_LABEL] = json!(role);
    }
    let data = report.map(|report| json!({"report.json": report}));
    serde_json::from_value(json!({"metadata": {"name": name, "namespace": "fleet", "uid": "1", "labels": labels}, "data": data})).unwrap()
}

#[test]
fn a_report_triggers_a_reconciliation_only_if_it_affects_the_status() {
    let report = |text: Option<&str>| config_map("plant-1-agent", Some(ROLE_AGENT_REPORT), text);
    let configuration = || config_map("plant-1-broker", None, None);
    let first = r#"{"shards":{"0":"a"}}"#;
    let presented =
        r#"{"shards":{"0":"b"},"messagesDropped":true,"certificates":{"t":{"fingerprint":"a","notAfter":"2030-01-01T00:00:00Z"}}}"#;
    let (second, dropped) = (r#"{"shards":{"0":"b"}}"#, r#"{"shards":{"0":"b"},"messagesDropped":true}"#);
    let full = r#"{"shards":{"0":"b"},"messagesDropped":true,"fullness":{"queue":{"session":"_ingest_readings"}}}"#;
    let events = vec![
        (Event::Init, false),
        (Event::InitApply(report(None)), true),
        (Event::InitApply(configuration()), true),
        (Event::InitDone, false),
        (Event::Apply(report(Some(first))), true),
        (Event::Apply(report(Some(second))), false),
        (Event::Apply(configuration()), true),
        (Event::Apply(report(Some(dropped))), true),
        (Event::Apply(report(Some(dropped))), false),
        (Event::Apply(report(Some(presented))), true),
        (Event::Apply(report(Some(presented))), false),
        (Event::Apply(report(Some(full))), true),
        (Event::Apply(report(Some(full))), false),
        (Event::Delete(report(Some(dropped))), true),
        (Event::Apply(report(Some(dropped))), true),
    ];
    let expected = events.iter().filter(|(_, passes)| *passes).count();
    let stream = futures::stream::iter(events.into_iter().map(|(event, _)| Ok(event)));
    assert_eq!(block_on(notable(stream).count()), expected);
}

#[test]
fn a_change_of_a_reports_labels_triggers_a_reconciliation() {
    let mut changed = config_map("plant-1-agent", Some(ROLE_AGENT_REPORT), None);
    let original = changed.clone();
    changed.metadata.labels.get_or_insert_default().insert("x".to_owned(), "y".to_owned());
    let stream = futures::stream::iter([original.clone(), original, changed].map(|object| Ok(Event::Apply(object))));
    assert_eq!(block_on(notable(stream).count()), 2);
}
