use rcgen::{BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, PublicKeyData};

use super::*;
use crate::certificate::set_validity;

fn at(second: i64) -> Timestamp {
    Timestamp::from_second(second).unwrap()
}

fn parameters(name: &str, is_ca: bool) -> CertificateParams {
    let mut parameters = CertificateParams::default();
    parameters.distinguished_name = rcgen::DistinguishedName::new();
    parameters.distinguished_name.push(DnType::CommonName, name);
    set_validity(&mut parameters, at(0), at(10_000));
    if is_ca {
        parameters.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    } else {
        parameters.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
    }
    parameters
}

/// A root, an authority below it, and a device's key.
struct Chain {
    root: String,
    middle: String,
    issuer: Issuer<'static, KeyPair>,
    key: KeyPair,
}

impl Chain {
    fn new() -> Self {
        let (root_key, middle_key) = (KeyPair::generate().unwrap(), KeyPair::generate().unwrap());
        let root_parameters = parameters("root", true);
        let root = root_parameters.self_signed(&root_key).unwrap().pem();
        let middle_parameters = parameters("middle", true);
        let middle = middle_parameters.signed_by(&middle_key, &Issuer::new(root_parameters, root_key)).unwrap().pem();
        Self { root, middle, issuer: Issuer::new(middle_parameters, middle_key), key: KeyPair::generate().unwrap() }
    }

    fn issue(&self, parameters: &CertificateParams) -> String {
        parameters.signed_by(&self.key, &self.issuer).unwrap().pem() + &self.middle
    }

    fn check(&self, trusted: &str, issued: &str, now: i64) -> Result<Usable, UnusableCertificate> {
        let key = self.key.subject_public_key_info();
        TrustedAuthorities::parse(trusted.as_bytes(), at(5)).unwrap().check(issued.as_bytes(), "press-1", &key, "devices-ca", at(now))
    }
}

#[test]
fn a_certificate_for_the_device_and_its_key_is_usable() {
    let chain = Chain::new();
    let mut wanted = parameters("press-1", false);
    wanted.serial_number = Some(rcgen::SerialNumber::from(vec![1, 2, 0xff]));
    let issued = chain.issue(&wanted);
    for trusted in [chain.root.clone(), format!("{}{}", chain.middle, chain.root)] {
        let usable = chain.check(&trusted, &issued, 5).unwrap();
        assert_eq!(usable, Usable { serial_number: "0102ff".to_owned(), not_after: at(10_000) });
    }
}

#[test]
fn a_certificate_is_valid_no_longer_than_its_chain() {
    let chain = Chain::new();
    let mut wanted = parameters("press-1", false);
    set_validity(&mut wanted, at(0), at(90_000));
    assert_eq!(chain.check(&chain.root, &chain.issue(&wanted), 5).unwrap().not_after, at(10_000));
    let alone = wanted.signed_by(&chain.key, &chain.issuer).unwrap().pem();
    let mut root = parameters("middle", true);
    set_validity(&mut root, at(0), at(20_000));
    let root = root.self_signed(chain.issuer.key()).unwrap().pem();
    assert_eq!(chain.check(&root, &alone, 5).unwrap().not_after, at(20_000), "no more than the root");
    let other = Chain::new();
    assert_eq!(chain.check(&(root.clone() + &other.root), &alone, 5).unwrap().not_after, at(20_000), "its own root");
    assert!(matches!(chain.check(&root, &alone, 20_000), Err(UnusableCertificate::Expired { .. })));
    set_validity(&mut wanted, at(100), at(90_000));
    assert!(chain.check(&chain.root, &chain.issue(&wanted), 5).is_ok(), "the issuer's clock is ahead");
    set_validity(&mut wanted, at(700), at(90_000));
    assert!(matches!(chain.check(&chain.root, &chain.issue(&wanted), 5), Err(UnusableCertificate::Untrusted { .. })));
}

#[test]
fn any_other_certificate_is_unusable() {
    let chain = Chain::new();
    let issued = chain.issue(&parameters("press-1", false));
    let mut no_client = parameters("press-1", false);
    no_client.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
    let mut no_name = parameters("press-1", false);
    no_name.distinguished_name = rcgen::DistinguishedName::new();
    let mut two_names = parameters("press-1", false);
    two_names.distinguished_name.push(DnType::CustomDnType(vec![2, 5, 4, 3]), "press-2");
    let other = Chain::new();
    for (trusted, issued, now, expected) in [
        (&chain.root, String::new(), 5, "Unreadable"),
        (&chain.root, "press".repeat(10_000), 5, "Unreadable"),
        (&chain.root, other.issue(&parameters("press-1", false)), 5, "OtherKey"),
        (&chain.root, chain.issue(&parameters("press-2", false)), 5, "OtherName"),
        (&chain.root, chain.issue(&no_name), 5, "OtherName"),
        (&chain.root, chain.issue(&two_names), 5, "OtherName"),
        (&chain.root, chain.issue(&no_client), 5, "Untrusted"),
        (&chain.root, issued.clone(), 20_000, "Untrusted"),
        (&other.root, issued.clone(), 5, "Untrusted"),
    ] {
        let error = chain.check(trusted, &issued, now).unwrap_err();
        assert!(format!("{error:?}").starts_with(expected), "{error:?}");
    }
}

#[test]
fn trusted_authorities_must_include_a_root() {
    let chain = Chain::new();
    let parse = |certificates: &str| TrustedAuthorities::parse(certificates.as_bytes(), at(5));
    assert!(matches!(parse("").unwrap_err(), AuthorityError::NoRoot));
    assert!(matches!(parse(&chain.middle).unwrap_err(), AuthorityError::NoRoot));
    let leaf = parameters("press-1", false).self_signed(&chain.key).unwrap().pem();
    assert!(matches!(parse(&leaf).unwrap_err(), AuthorityError::NotAnAuthority));
    let one = parse(&chain.root).unwrap();
    assert_eq!(one.fingerprint(), parse(&format!("{}{}", chain.root, chain.middle)).unwrap().fingerprint(), "the first counts");
    assert_ne!(one.fingerprint(), parse(&Chain::new().root).unwrap().fingerprint());
    assert_eq!(one.validity(), (at(0), at(10_000)));
    let later = TrustedAuthorities::parse(chain.root.as_bytes(), at(10_000)).unwrap_err();
    assert!(matches!(later, AuthorityError::Certificate(CertificateError::Expired { .. })));
}
