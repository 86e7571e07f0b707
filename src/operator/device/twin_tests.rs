//! Desired and reported states.

use serde_json::json;

use super::*;

fn device(generation: i64, desired: &Value, status: &Value) -> Device {
    serde_json::from_value(json!({
        "apiVersion": "fleetwright.io/v1alpha1", "kind": "Device",
        "metadata": {"name": "press-1", "namespace": "n", "uid": "u", "generation": generation},
        "spec": {"gatewayRef": {"name": "g"}, "desired": desired}, "status": status
    }))
    .unwrap()
}

/// A twin whose desired state the broker has confirmed at generation 3.
fn published(desired: &Value) -> Twin {
    let mut twin = Twin::default();
    assert!(twin.update(&device(3, desired, &json!({}))));
    assert!(twin.published(3));
    twin
}

fn reason(twin: &Twin) -> (Option<bool>, &'static str) {
    let finding = twin.synced("press-1", "g").unwrap();
    (finding.holds, finding.cause.reason.as_str())
}

#[test]
fn valid_reports_are_parsed() {
    let taken = |generation: Option<i64>, state: Value| (generation, state);
    for (payload, expected) in [
        (r#"{"generation": 3, "reported": {"a": 1}}"#, taken(Some(3), json!({"a": 1}))),
        (r#"{"reported": {"a": 1}}"#, taken(None, json!({"a": 1}))),
        (r#"{"generation": null, "reported": {}}"#, taken(None, json!({}))),
        (r#"{"generation": 3}"#, taken(Some(3), json!({}))),
        (r#"{"a": {"b": null, "c": [null]}, "d": null}"#, taken(None, json!({"a": {"c": [null]}}))),
        (r#"{"reported": 5}"#, taken(None, json!({"reported": 5}))),
        (r#"{"generation": 3, "a": 1}"#, taken(None, json!({"generation": 3, "a": 1}))),
    ] {
        let report = parse_report(payload.as_bytes()).unwrap().unwrap();
        assert_eq!((report.generation, Value::Object(report.state)), expected, "{payload}");
    }
    assert_eq!(parse_report(b"").unwrap(), None);
}

#[test]
fn malformed_reports_are_rejected() {
    let deep = format!("{}{}", r#"{"a":"#.repeat(600), "}".repeat(600));
    let long = format!(r#"{{"a": "{}"}}"#, "x".repeat(MAX_REPORT_BYTES));
    for (payload, reason) in [
        (b"{".as_slice(), "InvalidReport"),
        (b"\xff\xfe", "InvalidReport"),
        (b"[1]", "InvalidReport"),
        (b"null", "InvalidReport"),
        (br#"{"generation": "3", "reported": {}}"#, "InvalidReport"),
        (br#"{"generation": 1.5, "reported": {}}"#, "InvalidReport"),
        (br#"{"generation": 99999999999999999999, "reported": {}}"#, "InvalidReport"),
        (br#"{"a": "\ud800"}"#, "InvalidReport"),
        (deep.as_bytes(), "InvalidReport"),
        (long.as_bytes(), "ReportTooLarge"),
    ] {
        assert_eq!(
            parse_report(payload).unwrap_err().reason().as_str(),
            reason,
            "{:?}",
            String::from_utf8_lossy(&payload[..payload.len().min(40)])
        );
    }
}

#[test]
fn synced_compares_generation_or_members() {
    let desired = json!({"rate": 5, "filter": {"on": true}});
    for (name, generation, state, expected) in [
        ("the desired generation", Some(3), json!({}), (Some(true), "Synced")),
        ("an older generation", Some(2), json!({"rate": 5, "filter": {"on": true}}), (Some(false), "AwaitingReport")),
        ("one of a former life", Some(9), json!({}), (Some(false), "AwaitingReport")),
        ("each member, and more", None, json!({"rate": 5.0, "filter": {"on": true, "x": 1}, "y": 2}), (Some(true), "Synced")),
        ("another value", None, json!({"rate": 6, "filter": {"on": true}}), (Some(false), "Diverged")),
        ("a member less", None, json!({"rate": 5, "filter": {}}), (Some(false), "Diverged")),
        ("another type", None, json!({"rate": 5, "filter": 1}), (Some(false), "Diverged")),
    ] {
        let mut twin = published(&desired);
        assert_eq!(reason(&twin), (Some(false), "AwaitingReport"));
        let Value::Object(state) = state else { unreachable!() };
        twin.report(Ok(ReportedStatus { generation, state }));
        assert_eq!(reason(&twin), expected, "{name}");
    }
}

#[test]
fn the_generation_changes_only_with_the_desired_state() {
    let mut twin = published(&json!({"rate": 5}));
    assert!(!twin.update(&device(4, &json!({"rate": 5}), &json!({}))), "something else of the spec changed");
    assert!(matches!(twin.wanted(), Wanted::State { generation: 3, .. }));
    assert!(twin.update(&device(5, &json!({"rate": 6}), &json!({}))));
    assert_eq!(reason(&twin), (Some(false), "NotPublished"));
    assert!(!twin.published(3), "the broker keeps the former one");
    assert!(twin.published(5));
    assert_eq!(reason(&twin), (Some(false), "AwaitingReport"));
}

#[test]
fn a_restart_restores_the_published_generation() {
    let before = published(&json!({"rate": 5}));
    let (desired, _) = before.status();
    for (spec, generation, published) in [(json!({"rate": 5}), 3, true), (json!({"rate": 6}), 7, false)] {
        let device = device(7, &spec, &json!({"observedGeneration": 6, "desired": desired}));
        let mut twin = Twin::default();
        twin.observe(device.status.as_ref().unwrap());
        twin.update(&device);
        assert!(matches!(twin.wanted(), Wanted::State { generation: found, .. } if found == generation), "{spec}");
        assert_eq!(!twin.awaits_broker(), published, "{spec}");
    }
}

#[test]
fn a_desired_state_that_is_too_large_leaves_the_broker_unchanged() {
    let mut twin = published(&json!({"rate": 5}));
    let (desired, _) = twin.status();
    twin.observe(&DeviceStatus { desired, ..DeviceStatus::default() });
    assert!(twin.update(&device(4, &json!({"x": "y".repeat(MAX_DESIRED_BYTES)}), &json!({}))));
    assert_eq!(twin.refusal().unwrap().reason.as_str(), "DesiredTooLarge");
    assert_eq!(twin.wanted(), Wanted::LeaveAlone);
    assert_eq!(twin.status().0.unwrap().generation, 3);
}

#[test]
fn an_equal_report_is_not_a_change() {
    let mut twin = published(&json!({"rate": 5}));
    let report = |payload: &str| Ok(parse_report(payload.as_bytes()).unwrap().unwrap());
    assert!(twin.is_news(&report(r#"{"rate": 5}"#)));
    twin.report(report(r#"{"rate": 5}"#));
    assert!(!twin.is_news(&report(r#"{"rate": 5.0}"#)));
    assert!(twin.is_news(&report(r#"{"generation": 3, "reported": {"rate": 5}}"#)));
    let fault = || Err(Cause::new(Reason::InvalidReport, "no JSON"));
    assert!(twin.is_news(&fault()));
    twin.report(fault());
    assert!(!twin.is_news(&fault()));
    assert_eq!(reason(&twin), (Some(false), "InvalidReport"));
    assert!(twin.is_news(&report(r#"{"rate": 5}"#)), "it is good again");
}

#[test]
fn a_report_is_pending_until_it_is_written() {
    let mut twin = published(&json!({"rate": 5}));
    let report = |rate| ReportedStatus { generation: Some(rate), state: Map::new() };
    twin.report(Ok(report(1)));
    let sent = twin.status().1;
    twin.report(Ok(report(2)));
    twin.written(sent.as_ref());
    assert_eq!(twin.status().1, Some(report(2)), "a later one came while the former was being written");
    twin.written(Some(&report(2)));
    assert_eq!(twin.status().1, None, "from here on it is what the status says");
}
