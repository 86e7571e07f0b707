use rcgen::{CertificateParams, KeyPair};

use super::*;

fn request(algorithm: &'static rcgen::SignatureAlgorithm) -> String {
    CertificateParams::default().serialize_request(&KeyPair::generate_for(algorithm).unwrap()).unwrap().pem().unwrap()
}

#[test]
fn requests_with_keys_that_tls_supports_are_accepted() {
    for algorithm in [&rcgen::PKCS_ECDSA_P256_SHA256, &rcgen::PKCS_ECDSA_P384_SHA384, &rcgen::PKCS_ED25519] {
        assert!(SigningRequest::parse(&request(algorithm)).is_ok(), "{algorithm:?}");
    }
    // Created by openssl; the requested extensions have no effect.
    assert!(SigningRequest::parse(include_str!("requests/rsa-2048.pem")).is_ok());
    assert!(SigningRequest::parse(include_str!("requests/p256-extensions.pem")).is_ok());
    assert!(SigningRequest::parse(&format!("Certificate Request:\n    Data:\n{}\n\n", request(&rcgen::PKCS_ED25519))).is_ok());
}

#[test]
fn other_requests_are_refused_with_their_error() {
    let good = request(&rcgen::PKCS_ECDSA_P256_SHA256);
    let body = good.lines().nth(1).unwrap();
    let certificate = CertificateParams::default().self_signed(&KeyPair::generate().unwrap()).unwrap().pem();
    for (pem, error) in [
        ("", RequestError::Unreadable),
        ("press-1", RequestError::Unreadable),
        (&good.replace(body, "****"), RequestError::Unreadable),
        (&good.replace(body, ""), RequestError::Unreadable),
        (&good.replace("CERTIFICATE REQUEST", "CERTIFICATE"), RequestError::Unreadable),
        (&certificate, RequestError::Unreadable),
        (&certificate.replace("CERTIFICATE", "CERTIFICATE REQUEST"), RequestError::Unreadable),
        (include_str!("requests/rsa-1024.pem"), RequestError::KeySize { bits: 1024 }),
        (include_str!("requests/rsa-2048-pss.pem"), RequestError::UnsupportedKey),
        (include_str!("requests/rsa-2048-sha1.pem"), RequestError::UnsupportedKey),
        (include_str!("requests/secp256k1.pem"), RequestError::UnsupportedKey),
        (include_str!("requests/p521.pem"), RequestError::UnsupportedKey),
    ] {
        assert_eq!(SigningRequest::parse(pem).map(drop), Err(error), "{pem}");
    }
}

#[test]
fn a_changed_request_is_refused() {
    let request = request(&rcgen::PKCS_ECDSA_P256_SHA256);
    let der = CertificateSigningRequestDer::from_pem_slice(request.as_bytes()).unwrap().to_vec();
    let text = |der: &[u8]| {
        use base64::Engine;
        let text = base64::engine::general_purpose::STANDARD.encode(der);
        format!("-----BEGIN CERTIFICATE REQUEST-----\n{text}\n-----END CERTIFICATE REQUEST-----\n")
    };
    let parse = |der: &[u8]| SigningRequest::parse(&text(der));
    let refused = |der: &[u8]| parse(der).unwrap_err();
    let key = parse(&der).unwrap().key().subject_public_key_info();
    // One bit anywhere: in the subject, the key, the signature or their frame. No other key is ever accepted, and nothing panics.
    for index in 0..der.len() {
        let mut changed = der.clone();
        changed[index] ^= 1;
        assert!(parse(&changed).map_or(true, |request| request.key().subject_public_key_info() == key), "byte {index}");
    }
    let mut changed = der.clone();
    *changed.last_mut().unwrap() ^= 1;
    assert_eq!(refused(&changed), RequestError::InvalidSignature);
    assert!(SigningRequest::parse_known(&text(&changed)).is_ok(), "its signature is not verified");
    for length in 0..der.len() {
        assert_eq!(refused(&der[..length]), RequestError::Unreadable);
    }
    assert_eq!(refused(&[der.as_slice(), b"x"].concat()), RequestError::Unreadable);
}

#[test]
fn the_digest_of_a_request_depends_on_its_text_without_white_space() {
    assert_eq!(digest("a"), digest("\na\n"));
    assert_ne!(digest("a"), digest("b"));
}

#[test]
fn only_a_request_with_nothing_but_a_common_name_has_a_sole_name() {
    let of = |names: &[(rcgen::DnType, &str)], host: Option<&str>| {
        let mut parameters = rcgen::CertificateParams::default();
        parameters.distinguished_name = rcgen::DistinguishedName::new();
        for (type_, name) in names {
            parameters.distinguished_name.push(type_.clone(), *name);
        }
        parameters.subject_alt_names = host.map(|host| rcgen::SanType::DnsName(host.try_into().unwrap())).into_iter().collect();
        let pem = parameters.serialize_request(&rcgen::KeyPair::generate().unwrap()).unwrap().pem().unwrap();
        SigningRequest::parse(&pem).unwrap().sole_name().map(str::to_owned)
    };
    let common = (rcgen::DnType::CommonName, "press-1");
    // The library keeps one value for each type, so the second common name uses the explicit object identifier.
    let second = (rcgen::DnType::CustomDnType(vec![2, 5, 4, 3]), "press-2");
    let organization = (rcgen::DnType::OrganizationName, "system:masters");
    assert_eq!(of(std::slice::from_ref(&common), None).as_deref(), Some("press-1"));
    assert_eq!(of(&[], None), None);
    assert_eq!(of(&[common.clone(), second], None), None);
    assert_eq!(of(std::slice::from_ref(&organization), None), None);
    assert_eq!(of(&[common.clone(), organization], None), None);
    assert_eq!(of(&[common], Some("example.org")), None, "an alternative name");
}

#[test]
fn the_pem_of_a_request_excludes_surrounding_text() {
    let request = |label: &str| {
        let pem = rcgen::CertificateParams::default().serialize_request(&rcgen::KeyPair::generate().unwrap()).unwrap().pem().unwrap();
        pem.replace("CERTIFICATE REQUEST", label)
    };
    let own = request("CERTIFICATE REQUEST");
    let parsed = SigningRequest::parse(&format!("{}{own}", request("NEW CERTIFICATE REQUEST"))).unwrap();
    assert_eq!(parsed.pem(), own.replace('\r', ""));
    assert_eq!(parsed.public_key(), SigningRequest::parse(&own).unwrap().public_key());
}
