use rcgen::{BasicConstraints, KeyPair};
use x509_parser::prelude::FromDer;

use super::*;

fn now() -> Timestamp {
    "2026-01-01T00:00:00Z".parse().unwrap()
}

fn days(days: i64) -> SignedDuration {
    SignedDuration::from_hours(24 * days)
}

fn parameters() -> CertificateParams {
    let mut parameters = CertificateParams::default();
    parameters.distinguished_name = DistinguishedName::new();
    parameters.distinguished_name.push(DnType::OrganizationName, "Plant 1");
    parameters.distinguished_name.push(DnType::CommonName, "clients");
    parameters.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    parameters.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    parameters.not_before = rcgen::date_time_ymd(2020, 1, 1);
    parameters.not_after = rcgen::date_time_ymd(2027, 1, 1);
    parameters
}

fn parse(parameters: &CertificateParams, key: &KeyPair) -> Result<ClientAuthority, AuthorityError> {
    let certificate = parameters.self_signed(key).unwrap().pem();
    ClientAuthority::parse(certificate.as_bytes(), key.serialize_pem().as_bytes(), None, now())
}

fn authority() -> ClientAuthority {
    parse(&parameters(), &KeyPair::generate().unwrap()).unwrap()
}

fn request() -> SigningRequest {
    // The subject of the request is not that of the certificate.
    let mut requested = parameters();
    requested.is_ca = IsCa::NoCa;
    requested.key_usages.clear();
    SigningRequest::parse(&requested.serialize_request(&KeyPair::generate().unwrap()).unwrap().pem().unwrap()).unwrap()
}

#[test]
fn a_certificate_has_the_given_name_and_the_key_of_the_request() {
    for algorithm in [&rcgen::PKCS_ECDSA_P256_SHA256, &rcgen::PKCS_ECDSA_P384_SHA384, &rcgen::PKCS_ED25519] {
        let authority = parse(&parameters(), &KeyPair::generate_for(algorithm).unwrap()).unwrap();
        let request = request();
        let issued = authority.issue("press-0001", &request, days(90), now()).unwrap();
        let der = CertificateDer::from_pem_slice(issued.pem.as_bytes()).unwrap();
        let (_, certificate) = x509_parser::certificate::X509Certificate::from_der(&der).unwrap();
        let own = CertificateDer::from_pem_slice(authority.trusted().as_bytes()).unwrap();
        let (_, own) = x509_parser::certificate::X509Certificate::from_der(&own).unwrap();
        certificate.verify_signature(Some(own.public_key())).unwrap();
        assert_eq!(certificate.issuer().as_raw(), own.subject().as_raw());
        assert_eq!(certificate.subject().to_string(), "CN=press-0001");
        assert_eq!(certificate.public_key().raw, request.key().subject_public_key_info());
        assert_eq!(format!("{:016x}", certificate.serial), issued.serial.to_string());
        assert!(!certificate.is_ca());
        let extended = certificate.extended_key_usage().unwrap().unwrap().value;
        assert!(extended.client_auth && !extended.server_auth && !extended.any);
        assert_eq!(issued.not_after, now() + days(90));
        assert!(issued.not_before < now());
    }
}

#[test]
fn a_certificate_never_outlives_the_authority() {
    let issued = authority().issue("press-1", &request(), days(3650), now()).unwrap();
    assert_eq!(issued.not_after.to_string(), "2027-01-01T00:00:00Z");
    assert_eq!(authority().end(now(), SignedDuration::MAX).to_string(), "2027-01-01T00:00:00Z");
}

#[test]
fn an_unusable_authority_is_refused() {
    let key = KeyPair::generate().unwrap();
    let with = |change: fn(&mut CertificateParams)| {
        let mut parameters = parameters();
        change(&mut parameters);
        parse(&parameters, &key).unwrap_err()
    };
    assert!(matches!(with(|p| p.is_ca = IsCa::NoCa), AuthorityError::NotAnAuthority));
    assert!(matches!(with(|p| p.is_ca = IsCa::ExplicitNoCa), AuthorityError::NotAnAuthority));
    assert!(matches!(with(|p| p.key_usages = vec![KeyUsagePurpose::CrlSign]), AuthorityError::KeyUsage));
    assert!(matches!(
        with(|p| p.not_after = rcgen::date_time_ymd(2025, 1, 1)),
        AuthorityError::Certificate(CertificateError::Expired { .. })
    ));
    let certificate = parameters().self_signed(&key).unwrap().pem();
    let parse = |certificate: &str, key: &str| ClientAuthority::parse(certificate.as_bytes(), key.as_bytes(), None, now()).unwrap_err();
    let other = KeyPair::generate().unwrap().serialize_pem();
    assert!(matches!(parse(&certificate, &other), AuthorityError::Certificate(CertificateError::MatchKey(_))));
    assert!(matches!(parse(&certificate, ""), AuthorityError::Certificate(CertificateError::NoKey)));
    assert!(matches!(parse("", &other), AuthorityError::Certificate(CertificateError::NoCertificate)));
}

#[test]
fn the_fingerprint_of_an_authority_depends_on_its_key_and_not_on_its_validity() {
    let key = KeyPair::generate().unwrap();
    let mut renewed = parameters();
    renewed.not_after = rcgen::date_time_ymd(2030, 1, 1);
    let fingerprint = |parameters: &CertificateParams, key: &KeyPair| parse(parameters, key).unwrap().fingerprint();
    assert_eq!(fingerprint(&parameters(), &key), fingerprint(&renewed, &key));
    assert_ne!(fingerprint(&parameters(), &key), fingerprint(&parameters(), &KeyPair::generate().unwrap()));
}

#[test]
fn the_trusted_certificates_must_include_a_root() {
    let (root_key, key) = (KeyPair::generate().unwrap(), KeyPair::generate().unwrap());
    let root = parameters().self_signed(&root_key).unwrap().pem();
    let mut below = parameters();
    below.distinguished_name = DistinguishedName::new();
    below.distinguished_name.push(DnType::CommonName, "below");
    let issuer = below.signed_by(&key, &Issuer::new(parameters(), &root_key)).unwrap().pem();
    for (chain, more, found) in [
        (issuer.clone(), None, None),
        (issuer.clone(), Some(root.clone()), Some(2)),
        (format!("{issuer}{root}"), None, Some(2)),
        (format!("{issuer}{root}"), Some(root.clone()), Some(2)),
        (format!("{issuer}{root}"), Some(format!("{root}{}", parameters().self_signed(&key).unwrap().pem())), Some(3)),
    ] {
        let parsed = ClientAuthority::parse(chain.as_bytes(), key.serialize_pem().as_bytes(), more.as_deref().map(str::as_bytes), now());
        match found {
            Some(count) => assert_eq!(parsed.unwrap().trusted().matches("BEGIN CERTIFICATE").count(), count),
            None => assert!(matches!(parsed, Err(AuthorityError::NoRoot))),
        }
    }
    let own = parameters().self_signed(&key).unwrap().pem();
    let broken = b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n";
    let parsed = ClientAuthority::parse(own.as_bytes(), key.serialize_pem().as_bytes(), Some(broken), now());
    assert!(matches!(parsed, Err(AuthorityError::ParseTrusted)));
}

#[test]
fn debug_output_hides_the_key() {
    assert!(!format!("{:?}", authority()).to_lowercase().contains("key"));
}
