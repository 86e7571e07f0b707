use rcgen::{CertificateParams, KeyPair};
use serde_json::{Value, json};

use super::*;
use crate::api::gateway::GatewayDevices;
use crate::certificate::authority::{AUTHORITY_LIFE, SERVER_LIFE};
use crate::certificate::set_validity;
use crate::configuration::agent::TLS_AUTHORITIES;

const NAMED: &str = "mqtt-tls";

fn observed(spec: &Value, tls: impl IntoIterator<Item = (&'static str, Option<Data>)>) -> Observed {
    let object = json!({
        "apiVersion": "fleetwright.io/v1alpha1", "kind": "Gateway", "metadata": {"name": "plant-1", "namespace": "fleet"}, "spec": spec
    });
    let tls = tls.into_iter().map(|(name, data)| (name.to_owned(), data.map(|data| Secret { data: Some(data), ..Secret::default() })));
    Observed {
        gateway: serde_json::from_value(object).unwrap(),
        tls: tls.collect(),
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

fn named(data: Option<Data>) -> Observed {
    observed(&json!({"listeners": [{"name": "mqtts", "port": 8883, "tls": {"secretName": NAMED}}]}), [(NAMED, data)])
}

fn issuing(authority: Option<Data>, certificate: Option<Data>, host_names: &[&str]) -> Observed {
    let spec = json!({"listeners": [{"name": "mqtts", "port": 8883, "tls": {}}], "service": {"hostNames": host_names}});
    let mut observed = observed(&spec, [("plant-1-tls", certificate)]);
    observed.authority = authority.map(|data| Secret { data: Some(data), ..Secret::default() });
    observed
}

fn at(time: &str) -> Timestamp {
    time.parse().unwrap()
}

fn start() -> Timestamp {
    at("2026-01-01T00:00:00Z")
}

fn secret(names: &[&str], not_after: Timestamp) -> Data {
    let key = KeyPair::generate().unwrap();
    let mut parameters = CertificateParams::new(names.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>()).unwrap();
    set_validity(&mut parameters, start(), not_after);
    let chain = parameters.self_signed(&key).unwrap().pem();
    [(TLS_CERTIFICATE, chain), (TLS_KEY, key.serialize_pem())]
        .map(|(key, text)| (key.to_owned(), k8s_openapi::ByteString(text.into_bytes())))
        .into()
}

#[test]
fn each_unusable_certificate_secret_has_its_reason() {
    let good = || secret(&["plant-1.fleet.svc"], at("2027-01-01T00:00:00Z"));
    let without = |key: &str| {
        let mut data = good();
        data.remove(key);
        data
    };
    let mut mixed = good();
    mixed.insert(TLS_KEY.to_owned(), good()[TLS_KEY].clone());
    for (data, now, reason) in [
        (None, "2026-01-02T00:00:00Z", Some("SecretNotFound")),
        (Some(Data::new()), "2026-01-02T00:00:00Z", Some("SecretKeyNotFound")),
        (Some(without(TLS_KEY)), "2026-01-02T00:00:00Z", Some("SecretKeyNotFound")),
        (Some(without(TLS_CERTIFICATE)), "2026-01-02T00:00:00Z", Some("SecretKeyNotFound")),
        (Some(mixed), "2026-01-02T00:00:00Z", Some("InvalidCertificate")),
        (Some(good()), "2026-01-02T00:00:00Z", None),
        (Some(good()), "2027-01-01T00:00:00Z", Some("CertificateExpired")),
        (Some(good()), "2025-12-31T00:00:00Z", Some("CertificateNotYetValid")),
        (
            Some(secret(&["plant-1", "plant-2.fleet.svc"], at("2027-01-01T00:00:00Z"))),
            "2026-01-02T00:00:00Z",
            Some("CertificateNameMismatch"),
        ),
    ] {
        let found = certificates(&named(data), at(now));
        assert_eq!(found.awaiting.as_ref().map(|cause| cause.reason.as_str()), reason);
        assert_eq!(found.usable.contains_key(NAMED), reason.is_none());
        assert_eq!(found.issued, None);
    }
}

#[test]
fn a_certificate_must_have_the_declared_host_names() {
    // A public authority does not sign names inside a cluster.
    let mut observed = named(Some(secret(&["mqtt.example.org"], at("2027-01-01T00:00:00Z"))));
    assert!(certificates(&observed, at("2026-01-02T00:00:00Z")).awaiting.is_some());
    observed.gateway.spec.service.host_names = vec!["mqtt.example.org".to_owned()];
    assert_eq!(certificates(&observed, at("2026-01-02T00:00:00Z")).awaiting, None);
    observed.gateway.spec.service.host_names.push("192.0.2.7".to_owned());
    assert!(certificates(&observed, at("2026-01-02T00:00:00Z")).awaiting.is_some());
}

#[test]
fn a_certificate_that_expires_soon_has_two_warnings() {
    for (life_in_hours, first, second) in [(90 * 24, 7 * 24, 24), (24 * 24, 4 * 24, 24), (24, 4, 2)] {
        let not_after = start() + Duration::from_hours(life_in_hours);
        let observed = named(Some(secret(&["plant-1.fleet.svc"], not_after)));
        let message = |left: Duration| {
            let found = certificates(&observed, not_after - left);
            assert_eq!(found.awaiting, None);
            found.expiring.map(|cause| (cause.reason.as_str(), cause.message))
        };
        let (hours, moment) = (Duration::from_hours, Duration::from_secs(1));
        assert_eq!(message(hours(first) + moment), None, "{life_in_hours}");
        let first_warning = message(hours(first));
        assert_eq!(first_warning.as_ref().map(|warning| warning.0), Some("CertificateExpiresSoon"));
        assert_eq!(message(hours(second) + moment), first_warning, "constant until the second warning");
        let second_warning = message(hours(second));
        assert!(second_warning.is_some() && second_warning != first_warning);
        assert_eq!(message(moment), second_warning);
    }
}

#[test]
fn a_listener_without_a_secret_gets_an_issued_certificate() {
    let found = certificates(&issuing(None, None, &["mqtt.example.org", "192.0.2.7", "plant-1"]), start());
    let issued = found.issued.clone().unwrap();
    let names = ["plant-1", "plant-1.fleet", "plant-1.fleet.svc", "plant-1.fleet.svc.cluster.local", "mqtt.example.org", "192.0.2.7"];
    assert_eq!(found.usable["plant-1-tls"].names(), names);
    assert_eq!((&found.awaiting, &found.expiring), (&None, &None));
    assert_eq!(issued.certificate[TLS_AUTHORITIES], issued.authority[TLS_AUTHORITIES]);
    assert!(!format!("{found:?}").contains("PRIVATE"));

    // A second reconciliation changes nothing, even an hour before the renewal.
    let again = |authority: Option<&Data>, certificate: Option<&Data>, now| {
        let observed = issuing(authority.cloned(), certificate.cloned(), &["mqtt.example.org", "192.0.2.7", "plant-1"]);
        certificates(&observed, now).issued.unwrap()
    };
    for now in [start(), start() + SERVER_LIFE / 3 * 2 - Duration::from_hours(1)] {
        assert!(again(Some(&issued.authority), Some(&issued.certificate), now) == issued);
    }
    // A deleted or an old certificate is issued again by the same authority.
    for (certificate, now) in [(None, start()), (Some(&issued.certificate), start() + SERVER_LIFE / 3 * 2)] {
        let renewed = again(Some(&issued.authority), certificate, now);
        assert!(renewed.authority == issued.authority && renewed.certificate[TLS_CERTIFICATE] != issued.certificate[TLS_CERTIFICATE]);
        assert_eq!(renewed.certificate[TLS_AUTHORITIES], issued.certificate[TLS_AUTHORITIES]);
    }
    // A certificate is replaced if its authority was deleted.
    let replaced = again(None, Some(&issued.certificate), start());
    assert!(replaced.certificate[TLS_CERTIFICATE] != issued.certificate[TLS_CERTIFICATE]);
    assert_eq!(replaced.certificate[TLS_AUTHORITIES], replaced.authority[TLS_AUTHORITIES]);
    // Near the end of an authority, clients trust two.
    let old = again(Some(&issued.authority), Some(&issued.certificate), start() + AUTHORITY_LIFE / 4 * 3);
    assert!(old.certificate[TLS_AUTHORITIES].0.len() > issued.certificate[TLS_AUTHORITIES].0.len());
}

#[test]
fn an_invalid_authority_is_reported_and_its_certificate_stays() {
    let issued = certificates(&issuing(None, None, &[]), start()).issued.unwrap();
    let found = certificates(&issuing(Some(Data::new()), Some(issued.certificate), &[]), start());
    assert_eq!(found.awaiting.map(|cause| cause.reason.as_str()), Some("InvalidAuthority"));
    assert!(found.issued.is_none() && found.usable.contains_key("plant-1-tls"));
}

#[test]
fn listeners_without_tls_need_no_certificate() {
    assert_eq!(certificates(&observed(&json!({"service": {"hostNames": ["mqtt.example.org"]}}), []), start()), Certificates::default());
}
