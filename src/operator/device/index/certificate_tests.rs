//! Devices with certificates: events, actions, and entries for the broker.

use std::collections::BTreeMap;
use std::sync::Arc;

use crate::api::reason::Reason;
use jiff::{SignedDuration, Timestamp};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::OwnerReference;
use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, KeyPair};
use serde_json::{Value, json};

use crate::api::client_authority::IssuerReference;
use crate::api::condition::{ACCEPTED, CREDENTIALS_LIVE, Cause, READY, RECONCILING, STALLED};
use crate::api::{Device, DeviceStatus};
use crate::broker::credential::shard::{self, Shard};
use crate::certificate::client::ClientAuthority;
use crate::certificate::request::{self, SigningRequest};
use crate::certificate::trust::TrustedAuthorities;
use crate::operator::device::certificate::{Authority, IssuanceRefusal, Issuer, IssuerResponse, Signer, Source};
use crate::operator::device::endpoint::Endpoint;
use crate::operator::device::index::DeviceIndex;
use crate::operator::device::index::action::DeviceAction;
use crate::operator::device::key::{DeviceKey, GatewayKey};

fn gateway() -> GatewayKey {
    GatewayKey::new("n", "g")
}

fn key() -> DeviceKey {
    DeviceKey { gateway: gateway(), name: "d".into() }
}

fn signing_request() -> String {
    CertificateParams::default().serialize_request(&KeyPair::generate().unwrap()).unwrap().pem().unwrap()
}

fn authority(key: &KeyPair) -> Authority {
    let mut parameters = CertificateParams::default();
    parameters.distinguished_name.push(DnType::CommonName, "devices");
    parameters.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let certificate = parameters.self_signed(key).unwrap().pem();
    let authority = ClientAuthority::parse(certificate.as_bytes(), key.serialize_pem().as_bytes(), None, Timestamp::now()).unwrap();
    Authority::Usable(Arc::new(Signer::new(Source::Own(authority), SignedDuration::from_hours(24))))
}

fn device(authentication: &Value, enabled: bool, version: u64, status: Option<&DeviceStatus>) -> Device {
    serde_json::from_value(json!({
        "apiVersion": "fleetwright.io/v1alpha1", "kind": "Device",
        "metadata": {"name": "d", "namespace": "n", "uid": "uid-d", "generation": 1, "resourceVersion": version.to_string()},
        "spec": {"gatewayRef": {"name": "g"}, "enabled": enabled, "authentication": authentication}, "status": status
    }))
    .unwrap()
}

fn x509(request: &str) -> Value {
    json!({"x509": {"certificateSigningRequest": request}})
}

fn index(authentication: &Value) -> DeviceIndex {
    let mut index = DeviceIndex::default();
    index.gateway_observed(&gateway(), Some(OwnerReference { uid: "uid-g".to_owned(), ..OwnerReference::default() }));
    index.endpoint_observed(&gateway(), "uid-g", Endpoint::new("g.n.svc", 8883, true, None));
    index.device_applied(&device(authentication, true, 1, None));
    index
}

/// As the driver executes the action.
fn issue(index: &mut DeviceIndex, request: &str) {
    let DeviceAction::IssueCertificate { uid, signer, spread } = index.next_action(&key(), false) else {
        panic!("{:?}", index.next_action(&key(), false))
    };
    let Source::Own(authority) = &signer.source else { panic!("an issuer has to be asked") };
    let now = Timestamp::now();
    let issued = authority.issue("d", &SigningRequest::parse(request).unwrap(), signer.validity, now).unwrap();
    let digest = request::digest(request);
    let certificate = signer.certificate((issued.pem, issued.serial.to_string(), issued.not_after), digest, spread, now);
    index.certificate_issued(&key(), &uid, digest, certificate);
}

/// Applies the plan and simulates the broker's proof. Returns the shard.
fn flush(index: &mut DeviceIndex) -> Shard {
    let (number, plan) = index.plan(&gateway()).expect("something to write");
    let data = plan.writes[0].data.clone().unwrap();
    index.plan_applied(&gateway(), number, plan);
    index.proof_observed(&gateway(), BTreeMap::from([(0, shard::revision(&data))]));
    Shard::parse(&data).unwrap()
}

fn status(index: &DeviceIndex, waited: bool) -> DeviceStatus {
    match index.next_action(&key(), waited) {
        DeviceAction::WriteStatus(status) => *status,
        other => panic!("expected a status, got {other:?}"),
    }
}

fn condition(status: &DeviceStatus, type_: &str) -> (String, String) {
    let condition = status.conditions.iter().find(|condition| condition.type_ == type_).expect(type_);
    (condition.status.clone(), condition.reason.clone())
}

fn is(status: &str, reason: &str) -> (String, String) {
    (status.to_owned(), reason.to_owned())
}

#[test]
fn a_certificate_needs_one_status_write_and_none_after_a_restart() {
    let (request, ca) = (signing_request(), KeyPair::generate().unwrap());
    let mut first = index(&x509(&request));
    assert!(matches!(first.next_action(&key(), false), DeviceAction::AwaitBroker), "the signer of the Gateway is unknown");
    first.authority_observed(&gateway(), "uid-g", authority(&ca));
    assert!(first.take_changes().devices.contains(&key()));
    issue(&mut first, &request);
    assert!(matches!(first.next_action(&key(), false), DeviceAction::AwaitBroker), "one complete status");
    let shard = flush(&mut first);
    let entry = &shard.entries()["d"];
    assert!(entry.password_hash().is_none() && entry.certificate_key().is_some());
    let ready = status(&first, false);
    assert_eq!(condition(&ready, READY), is("True", "Proven"));
    let certificate = ready.certificate.as_ref().unwrap();
    assert!(certificate.pem.contains("BEGIN CERTIFICATE") && certificate.revision.is_some());
    assert!(ready.credentials_secret.is_none(), "it has no password");
    first.status_written(&key(), &device(&x509(&request), true, 2, Some(&ready)));
    assert!(matches!(first.next_action(&key(), false), DeviceAction::None));

    // The key outlives the process.
    let mut again = DeviceIndex { digest_key: std::sync::Arc::clone(&first.digest_key), ..DeviceIndex::default() };
    again.gateway_observed(&gateway(), Some(OwnerReference { uid: "uid-g".to_owned(), ..OwnerReference::default() }));
    again.device_applied(&device(&x509(&request), true, 2, Some(&ready)));
    again.shard_observed(&gateway(), 0, Some(&shard.render()));
    assert!(matches!(again.next_action(&key(), false), DeviceAction::None), "before the Gateway is observed");
    again.authority_observed(&gateway(), "uid-g", authority(&ca));
    assert!(again.plan(&gateway()).is_none() && matches!(again.next_action(&key(), false), DeviceAction::None));
    again.authority_observed(&gateway(), "uid-g", Authority::Unusable);
    assert!(matches!(again.next_action(&key(), false), DeviceAction::None), "a device with a certificate stays ready");
    again.authority_observed(&gateway(), "uid-g", authority(&KeyPair::generate().unwrap()));
    assert!(matches!(again.next_action(&key(), false), DeviceAction::IssueCertificate { .. }), "by another authority");
}

#[test]
fn disabled_replaced_and_deleted_devices_are_removed_from_the_shard() {
    let (request, ca) = (signing_request(), KeyPair::generate().unwrap());
    let mut index = index(&x509(&request));
    index.authority_observed(&gateway(), "uid-g", authority(&ca));
    issue(&mut index, &request);
    let own = flush(&mut index).entries()["d"].certificate_key();
    index.device_applied(&device(&x509(&request), false, 2, None));
    assert!(flush(&mut index).entries().is_empty(), "disabled");
    let disabled = status(&index, false);
    assert_eq!(condition(&disabled, READY), is("True", "Disabled"));
    index.status_written(&key(), &device(&x509(&request), false, 3, Some(&disabled)));
    index.device_applied(&device(&x509(&request), true, 4, Some(&disabled)));
    assert_eq!(flush(&mut index).entries()["d"].certificate_key(), own, "enabled again, its certificate counts again");
    assert!(!matches!(index.next_action(&key(), false), DeviceAction::IssueCertificate { .. }));
    let another = signing_request();
    index.device_applied(&device(&x509(&another), true, 5, Some(&disabled)));
    assert_ne!(flush(&mut index).entries()["d"].certificate_key(), own, "another key");
    issue(&mut index, &another);
    index.device_applied(&device(&x509("press-1"), true, 6, Some(&disabled)));
    assert!(flush(&mut index).entries().is_empty(), "a request that cannot be read is no key");
    index.device_applied(&device(&x509(&another), true, 7, Some(&disabled)));
    assert_eq!(flush(&mut index).entries().len(), 1);
    index.device_deleted(&device(&x509(&another), true, 8, None));
    assert!(flush(&mut index).entries().is_empty(), "deleted");
}

#[test]
fn the_object_that_must_change_reports_a_missing_certificate() {
    let ca = KeyPair::generate().unwrap();
    let mut bad = index(&x509("press-1"));
    bad.authority_observed(&gateway(), "uid-g", authority(&ca));
    let stalled = status(&bad, false);
    assert_eq!(condition(&stalled, ACCEPTED), is("False", "UnreadableSigningRequest"));
    assert_eq!(condition(&stalled, STALLED), is("True", "UnreadableSigningRequest"));

    let mut good = index(&x509(&signing_request()));
    let waiting = status(&good, true);
    assert_eq!(condition(&waiting, CREDENTIALS_LIVE), is("False", "AwaitingCertificate"));
    for (authority, accepted, reason) in
        [(Authority::Undeclared, "False", "NoClientAuthority"), (Authority::Unusable, "True", "ClientAuthorityUnusable")]
    {
        good.authority_observed(&gateway(), "uid-g", authority);
        let status = status(&good, false);
        assert_eq!(condition(&status, ACCEPTED).0, accepted);
        assert_eq!(condition(&status, RECONCILING), is("True", reason), "the Gateway has to change");
    }
}

#[test]
fn a_device_reports_the_refusal_of_an_issuer_until_it_issues() {
    let (request, ca) = (signing_request(), KeyPair::generate().unwrap());
    let mut parameters = CertificateParams::default();
    parameters.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let trusted = TrustedAuthorities::parse(parameters.self_signed(&ca).unwrap().pem().as_bytes(), Timestamp::now()).unwrap();
    let reference = IssuerReference { name: "i".to_owned(), kind: "Issuer".to_owned(), group: "cert-manager.io".to_owned() };
    let source = Source::Issuer(Issuer { reference, trusted, secret: "s".to_owned() });
    let signer = Arc::new(Signer::new(source, SignedDuration::from_hours(24)));
    let mut index = index(&x509(&request));
    assert!(!index.asks_issuers());
    index.authority_observed(&gateway(), "uid-g", Authority::Usable(Arc::clone(&signer)));
    assert!(index.asks_issuers() && matches!(index.next_action(&key(), false), DeviceAction::IssueCertificate { .. }));
    let digest = request::digest(&request);
    assert!(matches!(index.start_action(&key(), false, 0), DeviceAction::IssueCertificate { .. }));
    assert!(matches!(index.next_action(&key(), false), DeviceAction::AwaitBroker), "requested, and no status before there is a result");
    assert_eq!(condition(&status(&index, true), CREDENTIALS_LIVE), is("False", "AwaitingCertificate"));
    for (is_final, accepted, type_, reason) in
        [(false, "True", RECONCILING, Reason::CertificateDenied), (true, "False", STALLED, Reason::CommonNameMismatch)]
    {
        let refusal = IssuanceRefusal { cause: Cause::new(reason, "no"), is_final };
        assert!(
            !index.certificate_asked(&key(), "uid-d", digest, IssuerResponse { refusal: Some(refusal), until: Some(300) }),
            "the condition reports it"
        );
        let reported = status(&index, false);
        assert_eq!((condition(&reported, ACCEPTED).0.as_str(), condition(&reported, type_)), (accepted, is("True", reason.as_str())));
    }
    index.take_changes();
    index.certificate_requests_listed();
    assert!(
        index.take_changes().devices.contains(&key()) && matches!(index.next_action(&key(), false), DeviceAction::IssueCertificate { .. })
    );
    let end = Timestamp::now() + SignedDuration::from_hours(24);
    index.certificate_issued(
        &key(),
        "uid-d",
        digest,
        signer.certificate(("pem".to_owned(), "0a".to_owned(), end), digest, 0, Timestamp::now()),
    );
    flush(&mut index);
    let ready = status(&index, false);
    assert_eq!(condition(&ready, READY), is("True", "Proven"));
    index.status_written(&key(), &device(&x509(&request), true, 2, Some(&ready)));
    let refusal = IssuanceRefusal { cause: Cause::new(Reason::CertificateDenied, "no"), is_final: false };
    assert!(
        index.certificate_asked(&key(), "uid-d", digest, IssuerResponse { refusal: Some(refusal), until: Some(300) }),
        "an Event reports it"
    );
    let reported = status(&index, false);
    assert_eq!(condition(&reported, READY), is("True", "Proven"));
    assert!(reported.conditions.iter().any(|condition| condition.type_ == READY && condition.message.contains("not renewed")));
}

#[test]
fn a_device_may_have_a_password_and_a_certificate() {
    let request = signing_request();
    let mut both = x509(&request);
    both["password"] = json!({});
    let mut index = index(&both);
    index.authority_observed(&gateway(), "uid-g", authority(&KeyPair::generate().unwrap()));
    issue(&mut index, &request);
    assert!(matches!(index.next_action(&key(), false), DeviceAction::CreateSecret { .. }));
    let password = crate::broker::credential::Password::given(b"secret").unwrap();
    let hash = crate::broker::credential::hash::hash("uid-d", "d", &password, 1);
    index.password_observed(&key(), "uid-d", crate::operator::device::record::PasswordState::Hashed(hash.into()));
    let shard = flush(&mut index);
    let entry = &shard.entries()["d"];
    assert!(entry.password_hash().is_some() && entry.certificate_key().is_some());
    let ready = status(&index, false);
    assert!(ready.credentials_secret.is_some() && ready.certificate.is_some());
}

#[test]
fn a_signing_request_for_an_external_broker_is_stalled() {
    let mut index = DeviceIndex::default();
    index.kind_observed(&gateway(), true);
    index.gateway_observed(&gateway(), Some(OwnerReference { uid: "uid-g".to_owned(), ..OwnerReference::default() }));
    index.broker_connection_observed(&gateway(), true);
    index.device_applied(&device(&x509(&signing_request()), true, 1, None));
    let DeviceAction::WriteStatus(status) = index.next_action(&key(), false) else { panic!("{:?}", index.next_action(&key(), false)) };
    let found = |type_: &str| status.conditions.iter().find(|condition| condition.type_ == type_);
    let accepted = found(ACCEPTED).unwrap();
    assert_eq!((accepted.status.as_str(), accepted.reason.as_str()), ("False", "NoClientAuthority"));
    assert!(accepted.message.contains("leave authentication.x509 out"), "{}", accepted.message);
    assert!(found(STALLED).is_some(), "only another Device helps");
}
