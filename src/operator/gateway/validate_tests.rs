use std::collections::BTreeMap;

use rcgen::{CertificateParams, KeyPair};
use serde_json::{Value, json};

use super::*;
use crate::api::Gateway;
use crate::api::gateway::GatewayDevices;
use crate::certificate::server::ServerCertificate;

fn observed(spec: &Value, tls: impl IntoIterator<Item = TlsSecret>) -> Observed {
    let object = json!({
        "apiVersion": "fleetwright.io/v1alpha1", "kind": "Gateway", "metadata": {"name": "plant-1", "namespace": "fleet"}, "spec": spec
    });
    let gateway: Gateway = serde_json::from_value(object).unwrap();
    let tls: BTreeMap<String, TlsSecret> = tls.into_iter().map(|secret| ("plant-1-tls".to_owned(), secret)).collect();
    Observed { gateway, tls, report: None, devices: GatewayDevices::default(), clients: None }
}

fn certificate() -> ServerCertificate {
    let key = KeyPair::generate().unwrap();
    let mut parameters = CertificateParams::new(vec!["plant-1".to_owned()]).unwrap();
    parameters.not_before = rcgen::date_time_ymd(2020, 1, 1);
    parameters.not_after = rcgen::date_time_ymd(2030, 1, 1);
    let chain = parameters.self_signed(&key).unwrap().pem();
    ServerCertificate::parse(chain.as_bytes(), key.serialize_pem().as_bytes()).unwrap()
}

fn at(time: &str) -> Timestamp {
    time.parse().unwrap()
}

#[test]
fn defaults_are_valid() {
    let valid = validate(&observed(&json!({}), []), at("2026-01-01T00:00:00Z")).unwrap();
    assert_eq!(valid.queued_bytes, 256 << 20);
    assert_eq!(valid.awaiting, None);
    // Three quarters of the container's 512 MiB, to the nearest hundred bytes.
    assert_eq!(valid.memory_limit.map(|bytes| bytes >> 20), Some(383));
}

#[test]
fn what_only_a_change_of_the_spec_heals() {
    for (spec, reason) in [
        (json!({"resources": {"limits": {"memory": "16Mi"}}}), "InvalidQuantity"),
        (json!({"resources": {"limits": {"memory": "512m"}}}), "InvalidQuantity"),
        (json!({"resources": {"limits": {"memory": "99999999999999Ti"}}}), "InvalidQuantity"),
        (json!({"resources": {"limits": {"memory": "64Mi"}, "requests": {"memory": "1Gi"}}}), "InvalidResources"),
        // To Mosquitto zero means without bound.
        (json!({"limits": {"queuedBytesPerClient": "0"}}), "InvalidQuantity"),
        (json!({"storage": {"size": "0"}}), "InvalidQuantity"),
    ] {
        let cause = validate(&observed(&spec, []), at("2026-01-01T00:00:00Z")).unwrap_err();
        assert_eq!(cause.reason, reason, "{spec}");
    }
    assert!(validate(&observed(&json!({"resources": {}}), []), at("2026-01-01T00:00:00Z")).unwrap().memory_limit.is_none());
}

#[test]
fn what_is_awaited() {
    let unreadable = || ServerCertificate::parse(b"", b"").unwrap_err();
    for (secret, now, reason) in [
        (TlsSecret::Missing, "2026-01-01T00:00:00Z", Some("SecretNotFound")),
        (TlsSecret::Incomplete { key: "tls.key" }, "2026-01-01T00:00:00Z", Some("SecretKeyNotFound")),
        (TlsSecret::Invalid(unreadable()), "2026-01-01T00:00:00Z", Some("InvalidCertificate")),
        (TlsSecret::Certificate(certificate()), "2026-01-01T00:00:00Z", None),
        (TlsSecret::Certificate(certificate()), "2031-01-01T00:00:00Z", Some("InvalidCertificate")),
        (TlsSecret::Certificate(certificate()), "2019-01-01T00:00:00Z", Some("InvalidCertificate")),
    ] {
        let valid = validate(&observed(&json!({}), [secret]), at(now)).unwrap();
        assert_eq!(valid.awaiting.map(|cause| cause.reason), reason);
        assert_eq!(valid.tls_secrets, ["plant-1-tls"]);
    }
}
