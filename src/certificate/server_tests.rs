use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, DnType, IsCa, KeyPair};

use super::*;

fn parameters(names: &[&str]) -> CertificateParams {
    let mut parameters = CertificateParams::new(names.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>()).unwrap();
    parameters.not_before = rcgen::date_time_ymd(2020, 1, 1);
    parameters.not_after = rcgen::date_time_ymd(2030, 1, 1);
    parameters.use_authority_key_identifier_extension = true;
    parameters
}

fn pair(names: &[&str]) -> (String, String) {
    let key = KeyPair::generate().unwrap();
    (parameters(names).self_signed(&key).unwrap().pem(), key.serialize_pem())
}

fn authority(name: &str, above: Option<&CertifiedIssuer<'static, KeyPair>>) -> CertifiedIssuer<'static, KeyPair> {
    let mut parameters = parameters(&[]);
    parameters.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    parameters.distinguished_name.push(DnType::CommonName, name);
    let key = KeyPair::generate().unwrap();
    match above {
        Some(above) => CertifiedIssuer::signed_by(parameters, key, above).unwrap(),
        None => CertifiedIssuer::self_signed(parameters, key).unwrap(),
    }
}

fn read(chain: &str, key: &str) -> Result<ServerCertificate, CertificateError> {
    ServerCertificate::parse(chain.as_bytes(), key.as_bytes())
}

#[test]
fn a_certificate_is_accepted_during_its_validity() {
    let (chain, key) = pair(&["plant-1"]);
    let certificate = read(&chain, &key).unwrap();
    assert_eq!(certificate.not_after.to_string(), "2030-01-01T00:00:00Z");
    let check = |time: &str| certificate.check(time.parse().unwrap(), &[]);
    assert!(check("2025-06-01T00:00:00Z").is_ok());
    assert!(matches!(check("2030-01-01T00:00:00Z"), Err(CertificateError::Expired { .. })));
    assert!(matches!(check("2019-12-31T23:59:59Z"), Err(CertificateError::NotYetValid { .. })));
    assert!(!format!("{certificate:?}").contains("PRIVATE"));
}

#[test]
fn an_unusable_certificate_or_key_is_refused() {
    let ((chain, key), (other_chain, other_key)) = (pair(&["plant-1"]), pair(&["plant-2"]));
    let parse = |chain: &str, key: &str| read(chain, key).map(drop);
    assert!(matches!(parse(&format!("{other_chain}{chain}"), &key), Err(CertificateError::MatchKey(_))), "the leaf is not first");
    assert!(matches!(parse(&chain, &other_key), Err(CertificateError::MatchKey(_))));
    assert!(matches!(parse("", &key), Err(CertificateError::NoCertificate)));
    assert!(matches!(parse(&key, &key), Err(CertificateError::NoCertificate)));
    assert!(matches!(parse(&chain, ""), Err(CertificateError::NoKey)));
    assert!(matches!(parse(&chain, &chain), Err(CertificateError::NoKey)));
    let encrypted = key.replace("PRIVATE KEY", "ENCRYPTED PRIVATE KEY");
    assert!(matches!(parse(&chain, &encrypted), Err(CertificateError::NoKey)));
    let garbage = "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n";
    assert!(matches!(parse(garbage, &key), Err(CertificateError::ParseCertificate { position: 1, .. })));
    assert!(matches!(parse(&format!("{chain}{garbage}"), &key), Err(CertificateError::ParseCertificate { position: 2, .. })));
    let broken = "-----BEGIN CERTIFICATE-----\n****\n-----END CERTIFICATE-----\n";
    assert!(matches!(parse(broken, &key), Err(CertificateError::ParseCertificate { position: 1, .. })));
}

#[test]
fn each_certificate_of_a_chain_must_issue_the_previous_one() {
    let root = authority("root", None);
    let intermediate = authority("intermediate", Some(&root));
    // The same name with another key, as after a rotation.
    let replaced = authority("intermediate", Some(&root));
    let key = KeyPair::generate().unwrap();
    let leaf = parameters(&["plant-1"]).signed_by(&key, &intermediate).unwrap();
    let (leaf, intermediate, replaced, root) = (leaf.pem(), intermediate.pem(), replaced.pem(), root.pem());
    for (chain, out_of_place) in [
        (vec![&leaf], None),
        (vec![&leaf, &intermediate], None),
        (vec![&leaf, &intermediate, &root], None),
        (vec![&leaf, &root], Some(2)),
        (vec![&leaf, &root, &intermediate], Some(2)),
        (vec![&leaf, &intermediate, &intermediate], Some(3)),
        (vec![&leaf, &replaced], Some(2)),
    ] {
        let text: String = chain.into_iter().map(String::as_str).collect();
        let found = match read(&text, &key.serialize_pem()) {
            Ok(_) => None,
            Err(CertificateError::ChainOrder { position }) => Some(position),
            Err(error) => panic!("{error}"),
        };
        assert_eq!(found, out_of_place);
    }
}

#[test]
fn a_certificate_must_have_the_names_that_clients_connect_to() {
    let (chain, key) = pair(&["plant-1.fleet.svc", "*.example.org", "192.0.2.7", "2001:db8::7"]);
    let certificate = read(&chain, &key).unwrap();
    assert_eq!(certificate.names(), ["plant-1.fleet.svc", "*.example.org", "192.0.2.7", "2001:db8::7"]);
    let now = "2026-01-01T00:00:00Z".parse().unwrap();
    for (name, valid) in [
        ("plant-1.fleet.svc", true),
        ("PLANT-1.fleet.svc", true),
        ("plant-1.fleet", false),
        ("mqtt.example.org", true),
        ("a.mqtt.example.org", false),
        ("192.0.2.7", true),
        ("192.0.2.8", false),
        ("2001:db8:0:0::7", true),
        ("no host name", false),
        ("", false),
    ] {
        let found = certificate.check(now, &["plant-1.fleet.svc".to_owned(), name.to_owned()]);
        assert_eq!(found.is_ok(), valid, "{name}");
        if let Err(error) = found {
            assert!(matches!(error, CertificateError::MatchName { expected, .. } if expected == name));
        }
    }
    let (chain, key) = pair(&[]);
    assert!(read(&chain, &key).unwrap().check(now, &["plant-1".to_owned()]).is_err(), "a common name does not count");
}
