use std::time::Duration;

use serde_json::json;

use super::*;
use crate::certificate::authority::{AUTHORITY_LIFE, Data, SERVER_LIFE};
use crate::certificate::server::ServerCertificate;
use crate::configuration::agent::{TLS_CERTIFICATE, TLS_KEY};
use crate::operator::gateway::tls::Issued;

fn start() -> Timestamp {
    "2026-01-01T00:00:00Z".parse().unwrap()
}

fn of(authority: Option<Data>, certificate: Option<Data>, now: Timestamp) -> Internal {
    let gateway = json!({
        "apiVersion": "fleetwright.io/v1alpha1", "kind": "Gateway", "metadata": {"name": "plant-1", "namespace": "fleet"}, "spec": {}
    });
    let secret = |data: Option<Data>| data.map(|data| Secret { data: Some(data), ..Secret::default() });
    let observed = Observed {
        gateway: serde_json::from_value(gateway).unwrap(),
        tls: [].into(),
        authority: None,
        internal_authority: secret(authority),
        internal_certificate: secret(certificate),
        client_authority: None,
        trusted_before: None,
        link_password: None,
        report: None,
        devices: None,
        clients: None,
    };
    internal(&observed, now)
}

fn issued(authority: Option<&Data>, certificate: Option<&Data>, now: Timestamp) -> Issued {
    of(authority.cloned(), certificate.cloned(), now).issued.unwrap()
}

#[test]
fn the_certificate_has_the_names_of_both_internal_services() {
    let found = of(None, None, start());
    let issued = found.issued.clone().unwrap();
    let certificate = ServerCertificate::parse(&issued.certificate[TLS_CERTIFICATE].0, &issued.certificate[TLS_KEY].0).unwrap();
    for name in ["plant-1-internal.fleet.svc", "plant-1-agent.fleet.svc", "plant-1-agent.fleet.svc.cluster.local"] {
        assert!(certificate.names().iter().any(|found| found == name), "{name}");
    }
    assert_eq!(found.authorities.as_ref(), Some(&issued.authority[TLS_AUTHORITIES].0));
    assert_eq!(found.awaiting, None);
    assert!(!format!("{found:?}").contains("PRIVATE"));
}

#[test]
fn the_certificate_is_renewed_before_its_expiry_by_the_same_authority() {
    let first = issued(None, None, start());
    let unchanged = issued(Some(&first.authority), Some(&first.certificate), start() + SERVER_LIFE / 3 * 2 - Duration::from_hours(1));
    assert!(unchanged == first);
    let renewed = issued(Some(&first.authority), Some(&first.certificate), start() + SERVER_LIFE / 3 * 2);
    assert!(renewed.authority == first.authority && renewed.certificate[TLS_CERTIFICATE] != first.certificate[TLS_CERTIFICATE]);
    // Clients trust the next authority before it signs.
    let late = issued(Some(&first.authority), Some(&first.certificate), start() + AUTHORITY_LIFE / 4 * 3);
    assert!(late.certificate[TLS_AUTHORITIES].0.len() > first.certificate[TLS_AUTHORITIES].0.len());
}

#[test]
fn an_unreadable_authority_is_reported_and_clients_keep_what_they_trust() {
    let first = issued(None, None, start());
    let found = of(Some(Data::new()), Some(first.certificate.clone()), start());
    let cause = found.awaiting.unwrap();
    assert_eq!(cause.reason.as_str(), "InvalidAuthority");
    assert!(cause.message.starts_with("Secret plant-1-internal-ca: "), "{}", cause.message);
    assert!(found.issued.is_none());
    assert_eq!(found.authorities.as_ref(), Some(&first.certificate[TLS_AUTHORITIES].0));
}
