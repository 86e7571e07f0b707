use std::sync::Arc;

use rustls::RootCertStore;
use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::ServerCertVerifier;
use rustls_pki_types::{ServerName, UnixTime};

use super::*;

fn at(time: &str) -> Timestamp {
    time.parse().unwrap()
}

fn start() -> Timestamp {
    at("2026-01-01T00:00:00Z")
}

fn names(list: &[&str]) -> Vec<String> {
    list.iter().map(|name| (*name).to_owned()).collect()
}

fn authority() -> Authority {
    Authority::create("fleet", "plant-1", start()).unwrap()
}

fn later(now: Timestamp, authority: Authority) -> Authority {
    // Like the operator: through the Secret.
    let advanced = authority.advance("fleet", "plant-1", now).unwrap();
    let read = Authority::parse(&advanced.render()).unwrap();
    assert!(read == advanced);
    read
}

/// Whether a client that trusts `authorities` accepts the certificate for this name, at this time.
fn accepted(authorities: &str, data: &Data, name: &str, now: Timestamp) -> bool {
    let mut roots = RootCertStore::empty();
    for certificate in CertificateDer::pem_slice_iter(authorities.as_bytes()) {
        roots.add(certificate.unwrap()).unwrap();
    }
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let verifier = WebPkiServerVerifier::builder_with_provider(Arc::new(roots), provider).build().unwrap();
    let chain: Vec<_> = CertificateDer::pem_slice_iter(&data[TLS_CERTIFICATE].0).map(Result::unwrap).collect();
    let now = UnixTime::since_unix_epoch(Duration::from_secs(u64::try_from(now.as_second()).unwrap()));
    verifier.verify_server_cert(&chain[0], &chain[1..], &ServerName::try_from(name.to_owned()).unwrap(), &[], now).is_ok()
}

fn bundle(data: &Data) -> String {
    String::from_utf8(data[TLS_AUTHORITIES].0.clone()).unwrap()
}

fn certificates(bundle: &str) -> usize {
    bundle.matches("BEGIN CERTIFICATE").count()
}

#[test]
fn an_issued_certificate_is_accepted_only_for_its_names() {
    let list = names(&["plant-1", "plant-1.fleet.svc", "mqtt.example.org", "192.0.2.7", "2001:db8::7"]);
    let data = authority().certify(&list, None, start()).unwrap();
    for name in &list {
        assert!(accepted(&bundle(&data), &data, name, start()), "{name}");
    }
    assert!(!accepted(&bundle(&data), &data, "plant-2", start()));
    assert!(!accepted(&authority().trusted(), &data, "plant-1", start()), "another authority");
    let certificate = ServerCertificate::parse(&data[TLS_CERTIFICATE].0, &data[TLS_KEY].0).unwrap();
    assert_eq!(certificate.names(), list);
    assert_eq!(certificate.not_after, start() + SERVER_LIFE);
    assert!(accepted(&bundle(&data), &data, "plant-1", start() - BACKDATED / 2), "a clock that is behind");
}

#[test]
fn a_certificate_is_renewed_after_two_thirds_of_its_lifetime() {
    let (authority, list) = (authority(), names(&["plant-1", "192.0.2.7"]));
    let first = authority.certify(&list, None, start()).unwrap();
    let again = |names: &[String], data: &Data, now| authority.certify(names, Some(data), now).unwrap();
    assert_eq!(again(&list, &first, start()), first);
    assert_eq!(again(&names(&["192.0.2.7", "plant-1"]), &first, start()), first, "in another order");
    assert_eq!(again(&list, &first, start() + SERVER_LIFE / 3 * 2 - BACKDATED), first);
    let renewed = again(&list, &first, start() + SERVER_LIFE / 3 * 2);
    assert_ne!(renewed[TLS_CERTIFICATE], first[TLS_CERTIFICATE]);
    assert_ne!(renewed[TLS_KEY], first[TLS_KEY]);
    assert_eq!(renewed[TLS_AUTHORITIES], first[TLS_AUTHORITIES]);
}

#[test]
fn an_unusable_certificate_is_issued_again() {
    let (authority, list) = (authority(), names(&["plant-1", "192.0.2.7"]));
    let first = authority.certify(&list, None, start()).unwrap();
    let foreign = Authority::create("fleet", "plant-1", start()).unwrap().certify(&list, None, start()).unwrap();
    let mut mixed = first.clone();
    mixed.insert(TLS_KEY.to_owned(), foreign[TLS_KEY].clone());
    let mut broken = first.clone();
    broken.insert(TLS_CERTIFICATE.to_owned(), ByteString(b"\xff".to_vec()));
    let mut partial = first.clone();
    partial.remove(TLS_KEY);
    for (case, data) in [("foreign", foreign), ("mixed", mixed), ("broken", broken), ("partial", partial), ("empty", Data::new())] {
        let issued = authority.certify(&list, Some(&data), start()).unwrap();
        assert!(data.get(TLS_CERTIFICATE) != issued.get(TLS_CERTIFICATE), "{case}");
        assert!(accepted(&authority.trusted(), &issued, "plant-1", start()), "{case}");
    }
    // An invalid `ca.crt` alone does not cause another certificate.
    let mut tampered = first.clone();
    tampered.insert(TLS_AUTHORITIES.to_owned(), ByteString(Vec::new()));
    assert_eq!(authority.certify(&list, Some(&tampered), start()).unwrap(), first);
    for other in [&["plant-1"][..], &["plant-1", "192.0.2.8"], &["plant-1", "192.0.2.7", "mqtt.example.org"]] {
        let issued = authority.certify(&names(other), Some(&first), start()).unwrap();
        assert_ne!(issued[TLS_CERTIFICATE], first[TLS_CERTIFICATE], "{other:?}");
    }
    assert!(authority.certify(&names(&["größe"]), None, start()).is_err());
}

/// A client that updates `ca.crt` once in each overlap can always connect, for three generations of authorities.
#[test]
fn a_client_that_updates_its_authorities_in_each_overlap_can_always_connect() {
    let step = Duration::from_hours(24 * 5);
    let mut authority = authority();
    let mut now = start();
    let list = names(&["plant-1"]);
    let mut data = authority.certify(&list, None, now).unwrap();
    let mut trusted = authority.trusted();
    let (mut taken_over, mut signers, mut most) = (now, 1, 0);
    while now < start() + AUTHORITY_LIFE * 2 {
        now += step;
        let before = authority.signing.certificate.clone();
        authority = later(now, authority);
        signers += u32::from(authority.signing.certificate != before);
        data = authority.certify(&list, Some(&data), now).unwrap();
        most = most.max(certificates(&bundle(&data)));
        assert!(accepted(&trusted, &data, "plant-1", now), "cut off at {now}");
        assert!(accepted(&bundle(&data), &data, "plant-1", now));
        if now >= taken_over + OVERLAP - step {
            (trusted, taken_over) = (bundle(&data), now);
        }
    }
    assert_eq!((signers, most), (3, 2));
}

#[test]
fn the_age_of_an_authority_determines_who_signs_and_who_is_trusted() {
    let first = authority();
    let signer = first.signing.certificate.clone();
    for (age, trusted, signs) in [(Duration::ZERO, 1, true), (NEXT_AFTER.saturating_sub(BACKDATED * 2), 1, true), (NEXT_AFTER, 2, true)] {
        let authority = later(start() + age, first.clone());
        assert_eq!((certificates(&authority.trusted()), authority.signing.certificate == signer), (trusted, signs), "{age:?}");
    }
    let overlapping = later(start() + NEXT_AFTER, first);
    for (age, trusted, signs) in
        [((NEXT_AFTER + OVERLAP).saturating_sub(BACKDATED * 2), 2, true), (NEXT_AFTER + OVERLAP, 2, false), (AUTHORITY_LIFE, 1, false)]
    {
        let authority = later(start() + age, overlapping.clone());
        assert_eq!((certificates(&authority.trusted()), authority.signing.certificate == signer), (trusted, signs), "{age:?}");
    }
}

#[test]
fn certificates_are_valid_after_the_operator_was_down_for_years() {
    for age in [AUTHORITY_LIFE.saturating_sub(SERVER_LIFE / 2), AUTHORITY_LIFE * 3] {
        let now = start() + age;
        let authority = later(now, authority());
        let data = authority.certify(&names(&["plant-1"]), None, now).unwrap();
        let certificate = ServerCertificate::parse(&data[TLS_CERTIFICATE].0, &data[TLS_KEY].0).unwrap();
        assert_eq!(certificate.not_after, now + SERVER_LIFE);
        assert!(accepted(&bundle(&data), &data, "plant-1", now));
    }
}

#[test]
fn an_invalid_authority_is_an_error_that_hides_the_key() {
    let data = later(start() + NEXT_AFTER, authority()).render();
    assert_eq!(data.len(), 5);
    let foreign = authority().render();
    for key in [TLS_CERTIFICATE, TLS_KEY, NEXT_CERTIFICATE, NEXT_KEY] {
        let mut broken = data.clone();
        broken.insert(key.to_owned(), ByteString(b"-----BEGIN".to_vec()));
        assert!(Authority::parse(&broken).is_err(), "{key}");
        broken.insert(key.to_owned(), foreign[if key.ends_with("crt") { TLS_CERTIFICATE } else { TLS_KEY }].clone());
        let error = Authority::parse(&broken).err().unwrap();
        assert!(!format!("{error} {error:?}").contains("PRIVATE"), "{key}");
    }
    assert!(Authority::parse(&Data::new()).is_err());
}
