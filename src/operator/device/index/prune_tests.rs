//! Objects that the operator created for a Device and no longer needs.

use std::sync::Arc;

use jiff::{SignedDuration, Timestamp};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::OwnerReference;
use rcgen::{BasicConstraints, CertificateParams, IsCa, KeyPair};
use serde_json::{Value, json};

use super::DeviceAction;
use crate::api::client_authority::IssuerReference;
use crate::api::{Device, DeviceStatus};
use crate::broker::credential::Password;
use crate::broker::credential::hash::{GENERATED_ITERATIONS, hash};
use crate::certificate::client::ClientAuthority;
use crate::certificate::trust::TrustedAuthorities;
use crate::operator::device::certificate::{Authority, Issuer, Signer, Source};
use crate::operator::device::endpoint::Endpoint;
use crate::operator::device::index::DeviceIndex;
use crate::operator::device::key::{DeviceKey, GatewayKey};
use crate::operator::device::record::PasswordState;
use crate::operator::device::rotation::Lifetime;

fn gateway() -> GatewayKey {
    GatewayKey::new("n", "g")
}

fn key() -> DeviceKey {
    DeviceKey { gateway: gateway(), name: "d".into() }
}

fn device(authentication: &Value, version: u64, status: Option<&DeviceStatus>) -> Device {
    serde_json::from_value(json!({
        "apiVersion": "fleetwright.io/v1alpha1", "kind": "Device",
        "metadata": {"name": "d", "namespace": "n", "uid": "uid-d", "generation": 1, "resourceVersion": version.to_string()},
        "spec": {"gatewayRef": {"name": "g"}, "authentication": authentication}, "status": status
    }))
    .unwrap()
}

fn index(authentication: &Value, external: bool) -> DeviceIndex {
    let mut index = DeviceIndex::default();
    index.kind_observed(&gateway(), external);
    index.gateway_observed(&gateway(), Some(OwnerReference { uid: "uid-g".to_owned(), ..OwnerReference::default() }));
    index.endpoint_observed(&gateway(), "uid-g", Endpoint::new("g.n.svc", 1883, false, None));
    index.device_applied(&device(authentication, 1, None));
    index
}

/// The password that the broker checks.
fn hashed() -> PasswordState {
    PasswordState::Hashed(hash("uid-d", "d", &Password::generate(), GENERATED_ITERATIONS).into())
}

/// An issuer of cert-manager, or the operator with the key of a Secret.
fn authority(is_issuer: bool) -> Authority {
    let key = KeyPair::generate().unwrap();
    let mut parameters = CertificateParams::default();
    parameters.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let certificate = parameters.self_signed(&key).unwrap().pem();
    let source = if is_issuer {
        let trusted = TrustedAuthorities::parse(certificate.as_bytes(), Timestamp::now()).unwrap();
        let reference = IssuerReference { name: "i".to_owned(), kind: "Issuer".to_owned(), group: "cert-manager.io".to_owned() };
        Source::Issuer(Issuer { reference, trusted, secret: "s".to_owned() })
    } else {
        let signing_key = key.serialize_pem();
        Source::Own(ClientAuthority::parse(certificate.as_bytes(), signing_key.as_bytes(), None, Timestamp::now()).unwrap())
    };
    Authority::Usable(Arc::new(Signer::new(source, SignedDuration::from_hours(24))))
}

fn deletes_request(index: &DeviceIndex) -> bool {
    matches!(index.next_action(&key(), false), DeviceAction::DeleteCertificateRequest { uid } if *uid == *"uid-d")
}

#[test]
fn a_certificate_request_is_deleted_once_no_issuer_is_asked() {
    let request = CertificateParams::default().serialize_request(&KeyPair::generate().unwrap()).unwrap().pem().unwrap();
    let x509 = json!({"x509": {"certificateSigningRequest": request}});
    for (name, authority, expected) in [
        ("the same issuer", authority(true), false),
        ("a Secret", authority(false), true),
        ("no authority", Authority::Undeclared, true),
        ("an authority that cannot sign", Authority::Unusable, false),
    ] {
        let mut index = index(&x509, false);
        index.certificate_request_observed(&key(), "uid-d", true);
        assert!(!deletes_request(&index), "the authority is not known yet");
        index.take_changes();
        index.authority_observed(&gateway(), "uid-g", authority);
        assert!(index.take_changes().devices.contains(&key()));
        assert_eq!(deletes_request(&index), expected, "{name}");
        index.certificate_request_observed(&key(), "uid-d", false);
        assert!(!deletes_request(&index), "it is deleted");
    }
}

#[test]
fn a_certificate_request_is_deleted_when_the_signing_request_is_removed() {
    let mut index = index(&json!({"password": {}}), false);
    index.certificate_request_observed(&key(), "uid of an earlier Device", true);
    assert!(!deletes_request(&index), "the garbage collector deletes it");
    index.certificate_request_observed(&key(), "uid-d", true);
    assert!(deletes_request(&index), "the operator may have been restarted since");
}

#[test]
fn a_generated_secret_is_deleted_once_other_credentials_are_live() {
    let given = json!({"password": {"secretRef": {"name": "mine"}}});
    for (authentication, external) in [(&given, false), (&json!({}), true)] {
        let mut index = index(authentication, external);
        index.broker_connection_observed(&gateway(), true);
        index.password_observed(&key(), "uid-d", hashed());
        index.take_changes();
        index.generated_observed(&key(), "uid-d", hashed(), Lifetime::default(), 0);
        assert!(index.take_changes().devices.contains(&key()));
        assert!(!matches!(index.next_action(&key(), true), DeviceAction::DeleteSecret { .. }), "the Device is not ready yet");
        let DeviceAction::WriteStatus(mut status) = index.next_action(&key(), true) else { panic!("no status") };
        if !external {
            let (number, plan) = index.plan(&gateway()).unwrap();
            let revision = crate::broker::credential::shard::revision(plan.writes[0].data.as_ref().unwrap());
            index.plan_applied(&gateway(), number, plan);
            index.proof_observed(&gateway(), [(0, revision)].into());
            let DeviceAction::WriteStatus(live) = index.next_action(&key(), false) else { panic!("no status") };
            status = live;
        }
        index.status_written(&key(), &device(authentication, 2, Some(&status)));
        let action = index.next_action(&key(), false);
        assert!(matches!(&action, DeviceAction::DeleteSecret { uid } if **uid == *"uid-d"), "{authentication}: {action:?}");
        index.generated_secret_deleted(&key(), "uid-d");
        assert!(matches!(index.next_action(&key(), false), DeviceAction::None));
    }
}
