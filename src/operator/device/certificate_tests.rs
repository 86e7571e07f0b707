use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, KeyPair};
use serde_json::{Value, json};

use super::*;
use crate::api::reason::Reason;
use crate::certificate::set_validity;

fn at(second: i64) -> Timestamp {
    Timestamp::from_second(second).unwrap()
}

/// An authority that is valid from time 0.
fn signer(key: &KeyPair, to: i64, validity: i64) -> Signer {
    let mut parameters = CertificateParams::default();
    parameters.distinguished_name.push(DnType::CommonName, "devices");
    parameters.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    set_validity(&mut parameters, at(0), at(to));
    let certificate = parameters.self_signed(key).unwrap().pem();
    let authority = ClientAuthority::parse(certificate.as_bytes(), key.serialize_pem().as_bytes(), None, at(1)).unwrap();
    Signer::new(Source::Own(authority), SignedDuration::from_secs(validity))
}

/// An issuer whose trusted authority has this key.
fn issuer(key: &KeyPair, name: &str) -> Signer {
    let mut parameters = CertificateParams::default();
    parameters.distinguished_name.push(DnType::CommonName, "devices");
    parameters.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    set_validity(&mut parameters, at(0), at(100_000));
    let trusted = TrustedAuthorities::parse(parameters.self_signed(key).unwrap().pem().as_bytes(), at(1)).unwrap();
    let reference = IssuerReference { name: name.to_owned(), kind: "Issuer".to_owned(), group: "cert-manager.io".to_owned() };
    let source = Source::Issuer(Issuer { reference, trusted, secret: "devices-ca".to_owned() });
    Signer::new(source, SignedDuration::from_secs(90_000))
}

fn request(key: &KeyPair) -> String {
    CertificateParams::default().serialize_request(key).unwrap().pem().unwrap()
}

fn device(request: &str, certificate: Option<&DeviceCertificate>) -> Device {
    let status = certificate.map_or(Value::Null, |certificate| json!({"certificate": certificate}));
    serde_json::from_value(json!({
        "apiVersion": "fleetwright.io/v1alpha1", "kind": "Device", "metadata": {"name": "d"}, "status": status,
        "spec": {"gatewayRef": {"name": "g"}, "authentication": {"x509": {"certificateSigningRequest": request}}}
    }))
    .unwrap()
}

fn ask(request: &str) -> Certificate {
    *Certificate::ask(None, &device(request, None)).unwrap()
}

fn issue(signer: &Signer, request: &str, spread: u64, now: i64) -> DeviceCertificate {
    let Source::Own(authority) = &signer.source else { panic!("an issuer has to be asked") };
    let issued = authority.issue("d", &SigningRequest::parse(request).unwrap(), signer.validity, at(now)).unwrap();
    signer.certificate((issued.pem, issued.serial.to_string(), issued.not_after), request::digest(request), spread, at(now))
}

#[test]
fn a_certificate_is_issued_once_per_request_and_authority() {
    let (one, other) = (KeyPair::generate().unwrap(), KeyPair::generate().unwrap());
    let (first, second) = (request(&one), request(&other));
    let authority = signer(&one, 1_000_000, 1000);
    let mut certificate = ask(&first);
    assert!(certificate.wants(&authority) && !certificate.is_issued());
    certificate.take(request::digest(&second), issue(&authority, &second, 0, 0));
    assert!(certificate.wants(&authority), "what was asked for meanwhile is another's");
    let issued = issue(&authority, &first, 0, 0);
    certificate.take(request::digest(&first), issued.clone());
    assert!(!certificate.wants(&authority) && certificate.is_issued());
    assert!(!certificate.wants(&signer(&one, 2_000_000, 1000)), "the same authority with a renewed certificate");
    assert!(certificate.wants(&signer(&other, 1_000_000, 1000)), "another authority");
    // After a restart the state comes from the status.
    let mut again = Certificate::ask(None, &device(&first, Some(&issued))).unwrap();
    again.observe(Some(&issued));
    assert!(!again.wants(&authority) && again.is_issued());
    assert_eq!(again.key().unwrap(), certificate.key().unwrap());
    let changed = Certificate::ask(Some(again), &device(&second, Some(&issued))).unwrap();
    assert!(changed.wants(&authority) && !changed.is_issued());
    assert_ne!(changed.key().unwrap(), certificate.key().unwrap());
    assert!(
        Certificate::ask(
            Some(changed),
            &serde_json::from_value(json!({
                "apiVersion": "fleetwright.io/v1alpha1", "kind": "Device", "metadata": {"name": "d"}, "spec": {"gatewayRef": {"name": "g"}}
            }))
            .unwrap()
        )
        .is_none()
    );
}

#[test]
fn a_deleted_or_malformed_status_causes_another_issuance() {
    let key = KeyPair::generate().unwrap();
    let (text, authority) = (request(&key), signer(&key, 1_000_000, 1000));
    let issued = issue(&authority, &text, 0, 0);
    let broken = DeviceCertificate { issued_for: "x".to_owned(), ..issued.clone() };
    for status in [None, Some(&broken), Some(&DeviceCertificate::default())] {
        let mut certificate = ask(&text);
        certificate.observe(Some(&issued));
        assert!(!certificate.wants(&authority));
        certificate.observe(status);
        assert!(certificate.wants(&authority));
    }
}

#[test]
fn a_certificate_is_written_to_the_status_once() {
    let key = KeyPair::generate().unwrap();
    let (text, authority) = (request(&key), signer(&key, 1_000_000, 1000));
    let issued = issue(&authority, &text, 0, 0);
    let mut certificate = ask(&text);
    certificate.take(request::digest(&text), issued.clone());
    // A late event with an older status.
    certificate.observe(None);
    let first = certificate.status(Some("r")).unwrap();
    assert_eq!(first, DeviceCertificate { revision: Some("r".to_owned()), ..issued.clone() });
    certificate.observe(Some(&first));
    let later = certificate.status(Some("r")).unwrap();
    assert_eq!(later, DeviceCertificate { pem: String::new(), ..first });
}

#[test]
fn a_certificate_is_renewed_after_two_thirds_of_its_life() {
    let key = KeyPair::generate().unwrap();
    let (text, authority) = (request(&key), signer(&key, 1_000_000, 90_000));
    for spread in [0, 511, 1023, u64::MAX] {
        let mut certificate = ask(&text);
        certificate.take(request::digest(&text), issue(&authority, &text, spread, 0));
        let deadline = certificate.deadline().unwrap();
        assert!((51_000..=60_000).contains(&deadline), "{deadline}");
        assert!(!certificate.advance(deadline - 1) && !certificate.wants(&authority));
        assert!(certificate.advance(deadline) && certificate.wants(&authority));
        assert_eq!(certificate.deadline(), Some(90_000), "then comes its end");
        assert!(certificate.advance(90_000) && certificate.is_expired() && certificate.deadline().is_none());
        certificate.take(request::digest(&text), issue(&authority, &text, spread, 90_000));
        assert!(!certificate.wants(&authority) && !certificate.is_expired());
    }
}

#[test]
fn an_authority_near_its_end_does_not_renew_in_a_loop() {
    let key = KeyPair::generate().unwrap();
    let text = request(&key);
    let mut certificate = ask(&text);
    certificate.take(request::digest(&text), issue(&signer(&key, 1000, 90_000), &text, 0, 0));
    certificate.advance(999);
    assert!(!certificate.wants(&signer(&key, 1000, 90_000)), "else ever shorter ones would follow one another");
    assert!(certificate.wants(&signer(&key, 2000, 90_000)), "once the authority is renewed");
}

#[test]
fn a_malformed_request_has_no_key_and_is_not_issued() {
    let certificate = ask("press-1");
    assert_eq!(certificate.key().unwrap_err().reason().as_str(), "UnreadableSigningRequest");
    assert!(!certificate.wants(&signer(&KeyPair::generate().unwrap(), 1000, 1000)));
}

fn refused(is_final: bool, until: i64) -> IssuerResponse {
    IssuerResponse { refusal: Some(IssuanceRefusal { cause: Cause::new(Reason::CertificateDenied, "no"), is_final }), until: Some(until) }
}

#[test]
fn an_issuer_is_queried_again_after_an_event_or_a_delay() {
    let key = KeyPair::generate().unwrap();
    let (text, signer) = (request(&key), issuer(&key, "a"));
    let digest = request::digest(&text);
    let mut certificate = ask(&text);
    assert!(certificate.wants(&signer));
    certificate.ask_issuer(300);
    assert!(!certificate.wants(&signer), "it is being asked");
    assert_eq!(certificate.deadline(), Some(300));
    assert!(!certificate.take_answer(digest, refused(false, 3600)), "a condition tells");
    assert!(!certificate.wants(&signer) && certificate.refusal().is_some());
    assert_eq!(certificate.deadline(), Some(3600));
    certificate.requeue();
    assert!(certificate.wants(&signer) && certificate.refusal().is_some(), "what is known goes on being said");
    certificate.ask_issuer(300);
    certificate.take_answer(digest, refused(false, 3600));
    assert!(certificate.advance(3600) && certificate.wants(&signer));
    certificate.ask_issuer(7200);
    certificate.requeue();
    certificate.take_answer(digest, IssuerResponse { refusal: None, until: Some(7200) });
    assert!(certificate.wants(&signer) && certificate.refusal().is_none(), "what was heard meanwhile is not forgotten");
    certificate.take_answer(digest.wrapping_add(1), refused(true, 7200));
    assert!(certificate.refusal().is_none(), "an answer for another request");
}

#[test]
fn another_issuer_or_another_root_causes_a_new_issuance() {
    let (one, other) = (KeyPair::generate().unwrap(), KeyPair::generate().unwrap());
    let (text, signer) = (request(&one), issuer(&one, "a"));
    let mut certificate = ask(&text);
    let issued =
        |signer: &Signer, end: i64| signer.certificate(("pem".to_owned(), "0a".to_owned(), at(end)), request::digest(&text), 0, at(0));
    certificate.take(request::digest(&text), issued(&signer, 90_000));
    assert!(!certificate.wants(&signer) && !certificate.wants(&issuer(&one, "a")));
    assert!(certificate.wants(&issuer(&one, "b")) && certificate.wants(&issuer(&other, "a")));
    assert!(Authority::Usable(Arc::new(issuer(&one, "a"))).differs(&Authority::Usable(Arc::new(issuer(&other, "a")))));
    assert!(certificate.advance(60_000) && certificate.wants(&signer), "renewed");
    assert!(
        certificate.take_answer(request::digest(&text), refused(false, 70_000)),
        "news, for the status does not say that it is missing"
    );
    assert!(!certificate.take_answer(request::digest(&text), refused(false, 80_000)), "no news");
    certificate.take(request::digest(&text), issued(&signer, 100_000));
    assert!(certificate.advance(99_999) && !certificate.wants(&signer), "nothing lasts longer than the root");
    let renewal = issued(&signer, 30).renewal_time.unwrap().0;
    assert_eq!(renewal, at(30), "never in less than a minute");
}
