use std::collections::BTreeMap;

use serde_json::{Value, json};

use super::*;
use crate::api::Gateway;
use crate::api::gateway::GatewayDevices;

fn observed(spec: &Value) -> Observed {
    let object = json!({
        "apiVersion": "fleetwright.io/v1alpha1", "kind": "Gateway", "metadata": {"name": "plant-1", "namespace": "fleet"}, "spec": spec
    });
    let gateway: Gateway = serde_json::from_value(object).unwrap();
    Observed {
        gateway,
        tls: BTreeMap::new(),
        authority: None,
        internal_authority: None,
        internal_certificate: None,
        client_authority: None,
        trusted_before: None,
        link_password: None,
        report: None,
        devices: Some(GatewayDevices::default()),
        clients: None,
    }
}

fn at(time: &str) -> Timestamp {
    time.parse().unwrap()
}

#[test]
fn defaults_are_valid() {
    let valid = validate(&observed(&json!({})), at("2026-01-01T00:00:00Z")).unwrap();
    assert_eq!(valid.queued_bytes, 256 << 20);
    assert_eq!(valid.awaiting, None);
    // Three quarters of the container's 512 MiB, to the nearest hundred bytes.
    assert_eq!(valid.memory_limit.map(|bytes| bytes >> 20), Some(383));
}

#[test]
fn each_invalid_spec_has_its_reason() {
    for (spec, reason) in [
        (json!({"resources": {"limits": {"memory": "16Mi"}}}), "InvalidQuantity"),
        (json!({"resources": {"limits": {"memory": "512m"}}}), "InvalidQuantity"),
        (json!({"resources": {"limits": {"memory": "99999999999999Ti"}}}), "InvalidQuantity"),
        (json!({"resources": {"limits": {"memory": "64Mi"}, "requests": {"memory": "1Gi"}}}), "InvalidResources"),
        // In Mosquitto, zero means no limit.
        (json!({"limits": {"queuedBytesPerClient": "0"}}), "InvalidQuantity"),
        (json!({"limits": {"queuedBytesPerClient": "1639Mi"}}), "InvalidQuantity"),
        (json!({"durability": "Snapshot", "resources": {}}), "InvalidResources"),
        (json!({"storage": {"size": "127Mi"}}), "InvalidQuantity"),
        (json!({"service": {"hostNames": ["mqtt.example.org", "mqtt example"]}}), "InvalidHostName"),
        (json!({"service": {"hostNames": ["*.example.org"]}}), "InvalidHostName"),
    ] {
        let cause = validate(&observed(&spec), at("2026-01-01T00:00:00Z")).err().unwrap();
        assert_eq!(cause.reason.as_str(), reason, "{spec}");
    }
    assert!(validate(&observed(&json!({"resources": {}})), at("2026-01-01T00:00:00Z")).unwrap().memory_limit.is_none());
}
