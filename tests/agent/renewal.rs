//! Renewal of certificates while clients are connected.

use std::process::{Command, Stdio};

use fleetwright::api::name::LINK_USERNAME;
use fleetwright::configuration::agent::PresentedCertificate;
use fleetwright::mqtt::login::ClientTls;
use fleetwright::operator::twin_sync::session::{discard, internal_login};
use fleetwright::runtime::error::chain;
use rcgen::{CertificateParams, KeyPair};

use super::*;

/// Signature algorithms for one kind of certificate, in the format of `openssl s_client`.
const RSA: &str = "RSA-PSS+SHA256:RSA+SHA256";
const ECDSA: &str = "ECDSA+SHA256";

/// Messages that must arrive before the renewal, and after it.
const AROUND: usize = 200;

fn secret(chain: String, key: String) -> Data {
    [("tls.crt", chain), ("tls.key", key)].into_iter().map(|(key, text)| (key.to_owned(), ByteString(text.into_bytes()))).collect()
}

/// A self-signed certificate for 127.0.0.1, as the data of a Secret.
pub(super) fn certificate() -> Data {
    let key = KeyPair::generate().unwrap();
    let chain = CertificateParams::new(vec!["127.0.0.1".to_owned()]).unwrap().self_signed(&key).unwrap().pem();
    secret(chain, key.serialize_pem())
}

/// The same with an RSA key, by OpenSSL: our own library cannot create one.
fn rsa_certificate() -> Data {
    let folder = tempfile::tempdir().unwrap();
    let mut command = Command::new("openssl");
    command.args(["req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1"]);
    command.args(["-keyout", "key", "-out", "chain"]).current_dir(folder.path());
    assert!(command.output().unwrap().status.success());
    let read = |name: &str| std::fs::read_to_string(folder.path().join(name)).unwrap();
    secret(read("chain"), read("key"))
}

fn leaf(certificate: &Data) -> String {
    fingerprint(&CertificateDer::from_pem_slice(&certificate["tls.crt"].0).unwrap())
}

/// Fingerprint of the leaf that the broker presents to a client with this TLS version and these signature algorithms; `None` if the
/// handshake fails.
fn shown(port: u16, version: &str, signatures: &str) -> Option<String> {
    let address = format!("127.0.0.1:{port}");
    let mut command = Command::new("openssl");
    command.args(["s_client", "-connect", &address, version, "-sigalgs", signatures]).stdin(Stdio::null());
    let output = String::from_utf8(command.output().unwrap().stdout).unwrap();
    CertificateDer::from_pem_slice(output.as_bytes()).ok().map(|leaf| fingerprint(&leaf))
}

impl Agent {
    /// Waits until a handshake has presented this certificate, and returns the agent's report of it.
    async fn presents(&mut self, certificate: &Data) -> PresentedCertificate {
        let wanted = leaf(certificate);
        self.presents_matching(move |presented| presented.fingerprint == wanted).await
    }

    async fn presents_matching(&mut self, matches: impl Fn(&PresentedCertificate) -> bool) -> PresentedCertificate {
        self.presents_matching_in(TLS_SECRET, matches).await
    }

    /// The same for the certificate of another Secret.
    async fn presents_in(&mut self, secret: &str, certificate: &Data) {
        let wanted = leaf(certificate);
        self.presents_matching_in(secret, move |presented| presented.fingerprint == wanted).await;
    }

    async fn presents_matching_in(&mut self, secret: &str, matches: impl Fn(&PresentedCertificate) -> bool) -> PresentedCertificate {
        let shown = |presented: &Option<Presented>| presented.as_ref().and_then(|all| all.get(secret)).is_some_and(&matches);
        let presented = tokio::time::timeout(PATIENCE, self.presented.wait_for(shown)).await.expect("a handshake").unwrap();
        presented.as_ref().unwrap()[secret].clone()
    }

    async fn renew(&self, certificate: &Data) {
        self.send_change(Subject::Tls(TLS_SECRET.to_owned()), Some(certificate.clone())).await;
    }
}

fn tls_site() -> Site {
    Site::new(&json!({"listeners": [{"name": "mqtts", "port": 8883, "tls": {"secretName": TLS_SECRET}}]}))
}

pub(super) fn trust(certificate: &Data) -> tempfile::NamedTempFile {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), &certificate["tls.crt"].0).unwrap();
    file
}

#[tokio::test(flavor = "multi_thread")]
async fn a_renewed_certificate_is_loaded_under_load_without_disconnects() {
    let (first, second) = (certificate(), certificate());
    let users = [device("press-1", &[]), device("press-2", &[]), worker()];
    let (broker, mut agent) = tls_site().start(&users, Some(first.clone())).await;
    agent.presents(&first).await;
    let (trust_first, trust_second) = (trust(&first), trust(&second));
    let publish = |trust: &tempfile::NamedTempFile| {
        let arguments = ["--cafile", trust.path().to_str().unwrap(), "-t", "devices/press-1/telemetry", "-m", "another"];
        broker.publish(("press-1", PASSWORD), &arguments).status.success()
    };
    assert!(publish(&trust_first));
    assert!(!publish(&trust_second));
    let authority = ["--cafile", trust_first.path().to_str().unwrap()];
    let live = broker.subscribe(("_ingest_vibration", PASSWORD), &[&authority[..], &["-t", "devices/press-2/telemetry"]].concat());
    let stream = broker.stream(("press-2", PASSWORD), &[&authority[..], &["-t", "devices/press-2/telemetry"]].concat());
    wait_until("messages before", || live.output().lines().count() >= AROUND);

    // The broker does not get a certificate that does not match its key.
    let mut mixed = second.clone();
    mixed.insert("tls.key".to_owned(), first["tls.key"].clone());
    agent.renew(&mixed).await;
    wait_until("a refusal", || agent.metrics.refused.with_label_values(&["certificate"]).get() == 1);
    assert!(publish(&trust_first));
    assert_eq!(agent.metrics.written.get(), 1);

    let started = Instant::now();
    agent.renew(&second).await;
    let reported = agent.presents(&second).await;
    println!("from a renewed Secret to its verification: {:?}", started.elapsed());
    assert_eq!(reported.former_not_after, None);
    assert!(publish(&trust_second));
    assert!(!publish(&trust_first));
    for version in ["-tls1_2", "-tls1_3"] {
        assert_eq!(shown(broker.port, version, ECDSA), Some(leaf(&second)), "{version}");
    }

    let after = live.output().lines().count() + AROUND;
    wait_until("messages after", || live.output().lines().count() >= after);
    let sent = stream.finish();
    wait_until("all messages", || live.output().lines().count() >= sent);
    let numbers: Vec<String> = (0..sent).map(|number| number.to_string()).collect();
    assert_eq!(live.output().lines().collect::<Vec<_>>(), numbers, "each once, in order");
    for user in ["_ingest_vibration", "press-2"] {
        assert_eq!(broker.log().matches(&format!("as {user} (")).count(), 1, "{user} was never disconnected");
    }
}

/// Mosquitto keeps one certificate of each kind of key until it restarts.
#[tokio::test(flavor = "multi_thread")]
async fn a_previous_certificate_of_another_kind_of_key_is_reported_until_the_broker_restarts() {
    for (first, second, former_kind, kind) in
        [(certificate(), rsa_certificate(), ECDSA, RSA), (rsa_certificate(), certificate(), RSA, ECDSA)]
    {
        let (mut broker, mut agent) = tls_site().start(&[], Some(first.clone())).await;
        assert_eq!(agent.presents(&first).await.former_not_after, None);
        agent.renew(&second).await;
        let reported = agent.presents(&second).await;
        assert_eq!(reported.former_not_after.is_some(), shown(broker.port, "-tls1_3", former_kind) == Some(leaf(&first)));
        assert!(reported.former_not_after.is_some(), "if Mosquitto discards it without a restart, the condition is unnecessary");
        assert_eq!(shown(broker.port, "-tls1_3", kind), Some(leaf(&second)));

        broker.stop();
        broker.start_again();
        agent.presents_matching(|presented| presented.former_not_after.is_none()).await;
        for version in ["-tls1_2", "-tls1_3"] {
            assert_eq!(shown(broker.port, version, &format!("{RSA}:{ECDSA}")), Some(leaf(&second)), "{version}");
            assert_eq!(shown(broker.port, version, former_kind), None, "{version}");
        }
    }
}

/// Logs in at the internal listener as the operator does, and verifies the broker by this authority under this name.
async fn log_in(host: &str, port: u16, authority: Option<&Data>) -> Result<(), String> {
    let tls = authority.map(|data| ClientTls::verified_by(Some(data["tls.crt"].0.clone())).unwrap());
    let login = internal_login(host.to_owned(), port, &Password::given(PASSWORD.as_bytes()).unwrap(), tls);
    discard(&login).await.map_err(|error| chain(&error))
}

#[tokio::test(flavor = "multi_thread")]
async fn the_internal_listener_is_encrypted_and_renewed_without_a_restart() {
    let site = Site::new(&json!({}));
    let port = site.internal_port;
    let (first, second) = (certificate(), certificate());
    let (broker, mut agent) = site.start_with_internal(&first, &[device(LINK_USERNAME, &[])]).await;
    agent.presents_in(&internal_certificate("plant-1"), &first).await;
    assert_eq!(log_in("127.0.0.1", port, Some(&first)).await, Ok(()));
    let other = log_in("127.0.0.1", port, Some(&second)).await.unwrap_err();
    assert!(other.contains("invalid peer certificate"), "{other}");
    let name = log_in("localhost", port, Some(&first)).await.unwrap_err();
    assert!(name.contains("not valid for name"), "{name}");
    assert!(log_in("127.0.0.1", port, None).await.is_err(), "without TLS");

    agent.send_change(Subject::Tls(internal_certificate("plant-1")), Some(second.clone())).await;
    agent.presents_in(&internal_certificate("plant-1"), &second).await;
    assert_eq!(log_in("127.0.0.1", port, Some(&second)).await, Ok(()));
    assert!(log_in("127.0.0.1", port, Some(&first)).await.is_err());
    assert_eq!(agent.readiness.verdict(), Ok(()), "the agent logs in again, although the authority is another one");
    assert!(!broker.log().contains("terminating"), "{}", broker.log());
}
