use std::collections::BTreeMap;

use k8s_openapi::ByteString;
use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, KeyPair};
use serde_json::json;

use super::*;
use crate::api::gateway::GatewayDevices;
use crate::certificate::set_validity;

fn at(time: &str) -> Timestamp {
    time.parse().unwrap()
}

fn now() -> Timestamp {
    at("2026-01-01T00:00:00Z")
}

fn authority(is_ca: bool, to: &str) -> Vec<(&'static str, String)> {
    let key = KeyPair::generate().unwrap();
    let mut parameters = CertificateParams::default();
    parameters.distinguished_name.push(DnType::CommonName, "devices");
    parameters.is_ca = if is_ca { IsCa::Ca(BasicConstraints::Unconstrained) } else { IsCa::ExplicitNoCa };
    set_validity(&mut parameters, at("2025-01-01T00:00:00Z"), at(to));
    vec![("tls.crt", parameters.self_signed(&key).unwrap().pem()), ("tls.key", key.serialize_pem())]
}

fn secret(data: Vec<(&'static str, String)>) -> Secret {
    let data = data.into_iter().map(|(key, text)| (key.to_owned(), ByteString(text.into_bytes()))).collect();
    Secret { data: Some(data), ..Secret::default() }
}

fn observed(spec: &serde_json::Value, secret: Option<Secret>) -> Observed {
    let object = json!({
        "apiVersion": "fleetwright.io/v1alpha1", "kind": "Gateway", "metadata": {"name": "plant-1", "namespace": "fleet"}, "spec": spec
    });
    Observed {
        gateway: serde_json::from_value(object).unwrap(),
        tls: BTreeMap::new(),
        authority: None,
        internal_authority: None,
        internal_certificate: None,
        client_authority: secret,
        trusted_before: Some("before".to_owned()),
        link_password: None,
        report: None,
        devices: Some(GatewayDevices::default()),
        clients: None,
    }
}

fn of(secret: Option<Secret>) -> ClientTrust {
    client_trust(&observed(&json!({"clientAuthority": {"secretName": "devices-ca"}}), secret), now())
}

#[test]
fn an_authority_that_can_sign_is_trusted() {
    let data = authority(true, "2027-01-01T00:00:00Z");
    let certificate = data[0].1.clone();
    let trust = of(Some(secret(data)));
    assert!(matches!(trust.authority, Authority::Usable(_)) && trust.awaiting.is_none() && trust.expiring.is_none());
    assert_eq!(trust.trusted.unwrap().replace('\r', ""), certificate.replace('\r', ""));
    assert!(trust.transition_times.contains(&at("2027-01-01T00:00:00Z")));
    let trust = of(Some(secret(authority(true, "2026-01-03T00:00:00Z"))));
    assert_eq!(trust.expiring.unwrap().reason.as_str(), "CertificateExpiresSoon");
    let undeclared = client_trust(&observed(&json!({}), None), now());
    assert!(matches!(undeclared.authority, Authority::Undeclared) && undeclared.trusted.is_none() && undeclared.awaiting.is_none());
}

#[test]
fn an_unusable_authority_is_reported_and_the_broker_keeps_the_previous_one() {
    let good = || authority(true, "2027-01-01T00:00:00Z");
    let other_key = KeyPair::generate().unwrap().serialize_pem();
    for (data, reason) in [
        (None, "SecretNotFound"),
        (Some(vec![]), "SecretKeyNotFound"),
        (Some(good()[..1].to_vec()), "SecretKeyNotFound"),
        (Some(vec![good()[0].clone(), ("tls.key", other_key)]), "InvalidCertificate"),
        (Some(vec![("tls.crt", "x".to_owned()), good()[1].clone()]), "InvalidCertificate"),
        (Some(authority(false, "2027-01-01T00:00:00Z")), "InvalidClientAuthority"),
        (Some(authority(true, "2025-12-31T00:00:00Z")), "CertificateExpired"),
    ] {
        let trust = of(data.map(secret));
        let cause = trust.awaiting.unwrap();
        assert_eq!(cause.reason.as_str(), reason);
        assert!(cause.message.contains("Secret devices-ca") && !cause.message.contains("PRIVATE"));
        assert!(matches!(trust.authority, Authority::Unusable));
        assert_eq!(trust.trusted.as_deref(), Some("before"));
    }
}

fn of_issuer(data: Vec<(&'static str, String)>) -> ClientTrust {
    let spec = json!({"clientAuthority": {"secretName": "devices-ca", "issuerRef": {"name": "plant"}}});
    client_trust(&observed(&spec, Some(secret(data))), now())
}

#[test]
fn with_an_issuer_the_secret_contains_the_trusted_certificates_and_no_key() {
    let root = authority(true, "2027-01-01T00:00:00Z").remove(0).1;
    let leaf = authority(false, "2027-01-01T00:00:00Z").remove(0).1;
    for data in [vec![("ca.crt", root.clone())], vec![("tls.crt", root.clone())], vec![("tls.crt", leaf.clone()), ("ca.crt", root.clone())]]
    {
        let trust = of_issuer(data);
        let Authority::Usable(signer) = &trust.authority else { panic!("{:?}", trust.awaiting) };
        let Source::Issuer(Issuer { reference, secret, .. }) = &signer.source else { panic!("the operator would sign") };
        assert_eq!((&*reference.kind, &*reference.group, &**secret), ("Issuer", "cert-manager.io", "devices-ca"));
        assert_eq!(trust.trusted.unwrap().replace('\r', ""), root.replace('\r', ""));
    }
    for (data, reason) in [
        (vec![], "SecretKeyNotFound"),
        (vec![("ca.crt", "x".to_owned())], "InvalidClientAuthority"),
        (vec![("ca.crt", leaf)], "InvalidClientAuthority"),
        (vec![("ca.crt", authority(true, "2025-12-31T00:00:00Z").remove(0).1)], "CertificateExpired"),
    ] {
        let trust = of_issuer(data);
        assert_eq!(trust.awaiting.unwrap().reason.as_str(), reason);
        assert!(matches!(trust.authority, Authority::Unusable));
        assert_eq!(trust.trusted.as_deref(), Some("before"));
    }
}
