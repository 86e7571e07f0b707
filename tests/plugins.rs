//! The broker's plugins: instrumented (ASan, UBSan) in an instrumented broker, fuzzed, and without the files that they require.

#![allow(clippy::unwrap_used, reason = "helpers of tests fail by panicking")]
#![allow(clippy::print_stdout, reason = "a test that fails says what led there")]

mod common;

use std::path::{Path, PathBuf};
use std::process::Command;

use common::mosquitto::{Mosquitto, publish_bare, wait_until};
use common::{free_port, parts};
use fleetwright::broker::credential::{KeyDigest, Password, hash};
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, DnType, IsCa, KeyPair, PublicKeyData};
use tempfile::TempDir;

const PASSWORD: &str = "secret";
const PREVIOUS: &str = "secret of before";

/// Bytes of a page of the broker's database.
const DATABASE_PAGE: usize = 4096;

/// Seconds for which each fuzz target runs beyond its kept corpus.
const FUZZ_SECONDS: u64 = 4;

/// Lines of a password file.
fn password_lines(users: &[&str], password: &str) -> String {
    let password = Password::given(password.as_bytes()).unwrap();
    let lines: Vec<String> = users.iter().map(|user| format!("{user}:{}\n", hash::hash("uid", user, &password, 1))).collect();
    lines.concat()
}

/// A broker with all plugins, and the files that they read.
struct Site {
    folder: TempDir,
    port: u16,
    internal_port: u16,
    certificate_port: u16,
}

impl Site {
    fn new() -> Self {
        let site =
            Self { folder: tempfile::tempdir().unwrap(), port: free_port(), internal_port: free_port(), certificate_port: free_port() };
        std::fs::create_dir(site.path("data")).unwrap();
        site.write("passwords", &password_lines(&["press-1", "press-2", "_ingest_a"], PASSWORD));
        site.write("previous-passwords", &password_lines(&["press-1"], PREVIOUS));
        site.write_certificates();
        site
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn write(&self, name: &str, text: &str) {
        std::fs::write(self.path(name), text).unwrap();
    }

    /// An authority, the broker's certificate, and that of press-1 with the digest of its key.
    fn write_certificates(&self) {
        let mut authority = CertificateParams::default();
        authority.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let authority = CertifiedIssuer::self_signed(authority, KeyPair::generate().unwrap()).unwrap();
        self.write("authority", &authority.pem());
        for (name, addresses) in [("broker", vec!["127.0.0.1".to_owned()]), ("press-1", Vec::new())] {
            let key = KeyPair::generate().unwrap();
            let mut parameters = CertificateParams::new(addresses).unwrap();
            parameters.distinguished_name.push(DnType::CommonName, name);
            self.write(&format!("{name}.crt"), &parameters.signed_by(&key, &authority).unwrap().pem());
            self.write(&format!("{name}.key"), &key.serialize_pem());
            self.write("certificate-keys", &format!("{name}:{}\n", KeyDigest::of(&key.subject_public_key_info())));
        }
    }

    fn configuration(&self) -> String {
        let file = |name: &str| self.path(name).display().to_string();
        format!(
            "allow_anonymous false\npassword_file {}\nlistener {} 127.0.0.1\nuse_username_as_clientid true\n\
             listener {} 127.0.0.1\nuse_username_as_clientid true\n\
             listener {} 127.0.0.1\ncertfile {}\nkeyfile {}\ncafile {}\nrequire_certificate true\n\
             global_plugin /usr/lib/mosquitto/certificate.so\nplugin_opt_file {}\nplugin_opt_certificate_ports {}\n\
             global_plugin /usr/lib/mosquitto/previous_password.so\nplugin_opt_file {}\n\
             client_limits_exempt_prefix _\nclient_limit_retained_messages 5\nclient_limit_subscriptions 5\nclient_limit_topic_levels 8\n\
             client_limit_queued_bytes 100000\nclient_limit_messages_per_second 100\nclient_limit_session_expiry 3600\n\
             global_plugin /usr/lib/mosquitto/users.so\nplugin_opt_password_file {}\nplugin_opt_certificate_file {}\n\
             plugin_opt_keep_prefix _\npersistence_location {}/\n\
             global_plugin /usr/lib/mosquitto/bounds.so\nplugin_opt_when_full refuse\nplugin_opt_trusted_port {}\n\
             plugin_opt_memory_bytes 268435456\nplugin_opt_session_prefix _ingest_\nplugin_opt_session_bytes 20000\n\
             plugin /usr/lib/mosquitto/persist_sqlite.so\nplugin_opt_sync normal\nplugin_opt_flush_period 0\n",
            file("passwords"),
            self.port,
            self.internal_port,
            self.certificate_port,
            file("broker.crt"),
            file("broker.key"),
            file("authority"),
            file("certificate-keys"),
            self.certificate_port,
            file("previous-passwords"),
            file("passwords"),
            file("certificate-keys"),
            file("data"),
            self.internal_port,
        )
    }

    fn start_sanitized(self) -> Running {
        let Self { port, certificate_port, .. } = self;
        let configuration = self.configuration();
        let environment = vec![("PARTS_SANITIZED", "1".to_owned())];
        let broker = Mosquitto::start_with(self.folder, &configuration, port, environment);
        Running { broker, certificate_port }
    }

    /// The log of a broker that must not start.
    fn fails_to_start(self) -> String {
        let configuration = self.configuration();
        Mosquitto::fails_to_start_in(self.folder.path(), &configuration)
    }
}

struct Running {
    broker: Mosquitto,
    certificate_port: u16,
}

impl Running {
    fn publishes(&self, user: &str, password: &str) -> bool {
        self.broker.publish((user, password), &["-t", "telemetry", "-m", "1"]).status.success()
    }

    fn write(&self, name: &str, text: &str) {
        std::fs::write(self.broker.folder.path().join(name), text).unwrap();
    }

    fn publishes_by_certificate(&self) -> bool {
        let file = |name: &str| self.broker.folder.path().join(name).display().to_string();
        let (port, trust) = (self.certificate_port.to_string(), file("authority"));
        let (certificate, key) = (file("press-1.crt"), file("press-1.key"));
        let arguments = ["-p", &port, "--cafile", &trust, "--cert", &certificate, "--key", &key, "-t", "telemetry", "-m", "1"];
        publish_bare(&arguments).status.success()
    }

    /// The reports of the sanitizers. A broker with a report also exits with another status.
    fn reports(&self) -> Vec<String> {
        let log = self.broker.log();
        let found = log.lines().filter(|line| line.contains("Sanitizer") || line.contains("runtime error:"));
        found.map(str::to_owned).collect()
    }
}

/// A worker that is not connected, and whose queue is full after a few of these messages.
fn fill_the_queue(running: &Running) {
    let session = ["-i", "x", "-c", "-x", "4294967295", "-t", "telemetry", "-q", "2"];
    drop(running.broker.subscribe(("_ingest_a", PASSWORD), &session));
    for qos in ["1", "2"] {
        let lines = vec!["x".repeat(1000); 30].join("\n");
        running.broker.pour(("press-1", PASSWORD), &["-t", "telemetry", "-q", qos], &lines);
    }
    assert!(running.broker.log().contains("bounds: "), "{}", running.broker.log());
}

/// A device that leaves a session and five retained messages, after it has exceeded each limit.
fn exceed_limits(running: &Running) {
    const SESSION: [&str; 5] = ["-i", "x", "-c", "-x", "4294967295"];
    let login = ("press-2", PASSWORD);
    let filters: Vec<String> = (0..7).flat_map(|number| ["-t".to_owned(), format!("own/{number}")]).collect();
    drop(running.broker.subscribe(login, &filters.iter().map(String::as_str).collect::<Vec<_>>()));
    for number in 0..7 {
        running.broker.publish(login, &["-t", &format!("own/{number}"), "-r", "-m", &"x".repeat(1000)]);
    }
    running.broker.publish(login, &["-t", "own/a/b/c/d/e/f/g/h/i", "-m", "too deep"]);
    drop(running.broker.subscribe(login, &[&SESSION[..], &["-t", "own/0"]].concat()));
    // Faster than its rate, and more than may wait for the other.
    let lines = vec!["x".repeat(1000); 500].join("\n");
    running.broker.pour(("press-1", PASSWORD), &["-t", "own/0"], &lines);
    for limit in ["retained", "topic", "subscriptions", "queue", "rate"] {
        assert!(running.broker.log().contains(&format!("has exceeded its limit: {limit}.")), "{limit}");
    }
}

#[test]
fn instrumented_plugins_in_an_instrumented_broker_report_nothing() {
    let mut running = Site::new().start_sanitized();
    assert!(running.publishes("press-1", PASSWORD) && running.publishes("press-1", PREVIOUS) && !running.publishes("press-1", "wrong"));
    assert!(running.publishes_by_certificate());
    fill_the_queue(&running);
    // Restored from the database.
    running.broker.kill();
    running.broker.start_again();
    let worker = running.broker.subscribe(("_ingest_a", PASSWORD), &["-i", "x", "-c", "-x", "4294967295", "-t", "telemetry", "-q", "2"]);
    wait_until("the queue", || worker.output().lines().count() >= 20);
    drop(worker);
    // Files that change, and one that is not valid.
    let (ended, kept) = ("Ending the session of press-2", "what is left of removed users stays");
    exceed_limits(&running);
    running.write("previous-passwords", "press-1:no hash\n\npress-2\n");
    running.write("certificate-keys", "press-1:no digest\nno user\n");
    running.write("passwords", &password_lines(&["press-1", "_ingest_a"], PASSWORD));
    running.broker.reload();
    wait_until("the end of the certificate", || !running.publishes_by_certificate());
    assert!(!running.publishes("press-1", PREVIOUS) && running.publishes("press-1", PASSWORD));
    // A file with a damaged line does not say who is no longer a user.
    wait_until("a reload", || running.broker.log().contains(kept));
    assert!(!running.broker.log().contains(ended));
    running.write("certificate-keys", "");
    running.broker.reload();
    wait_until("the end of a removed user's session", || running.broker.log().contains(ended));
    wait_until("the end of what it retained", || running.broker.log().contains("Deleting 5 retained messages of press-2"));
    // A session that ends.
    drop(running.broker.subscribe(("_ingest_a", PASSWORD), &["-i", "x", "-t", "x"]));
    running.broker.stop();
    assert_eq!(running.reports(), Vec::<String>::new());
    assert_eq!(running.broker.exit_code(), Some(0), "LeakSanitizer reports with a status of its own; {}", running.broker.log());
}

#[test]
fn a_broker_does_not_start_without_the_files_of_its_plugins() {
    for name in ["certificate-keys", "previous-passwords"] {
        let site = Site::new();
        std::fs::remove_file(site.path(name)).unwrap();
        let log = site.fails_to_start();
        assert!(log.contains("cannot open"), "{name}: {log}");
    }
}

/// Corrupts a page of the messages' table, as a disk error would.
#[test]
fn a_broker_does_not_start_with_a_database_that_it_cannot_read() {
    let site = Site::new();
    let configuration = site.configuration();
    let mut broker = Mosquitto::start(site.folder, &configuration, site.port);
    drop(broker.subscribe(("_ingest_a", PASSWORD), &["-i", "x", "-c", "-x", "4294967295", "-t", "telemetry"]));
    broker.publish_lines(("press-1", PASSWORD), &["-t", "telemetry"], &vec!["x".repeat(1500); 10].join("\n"));
    broker.stop();
    let path = broker.data().join("mosquitto.sqlite3");
    let mut bytes = std::fs::read(&path).unwrap();
    // The first pages describe the tables, and stay; the last ones are messages.
    let messages = bytes.len() - 3 * DATABASE_PAGE;
    bytes[messages..].fill(0x5a);
    std::fs::write(&path, bytes).unwrap();
    let log = broker.fails_to_start();
    assert!(log.contains("The broker does not start"), "{log}");
}

#[test]
fn fuzzed_parsers_and_tables_hold() {
    let kept = Path::new(env!("CARGO_MANIFEST_DIR")).join("images/mosquitto/plugins/fuzz/corpus");
    let targets: Vec<String> = std::fs::read_dir(&kept).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    assert!(targets.len() >= 5, "{targets:?}");
    std::thread::scope(|scope| {
        for target in &targets {
            let kept = kept.join(target);
            scope.spawn(move || {
                let found = tempfile::tempdir().unwrap();
                let mut command = Command::new(parts());
                command.args(["fuzz", target]).arg(found.path()).arg(kept);
                command.args([&format!("-max_total_time={FUZZ_SECONDS}"), "-timeout=10", "-rss_limit_mb=1024", "-print_final_stats=1"]);
                let output = command.arg(format!("-artifact_prefix={}/", std::env::temp_dir().display())).output().unwrap();
                let text = String::from_utf8_lossy(&output.stderr).into_owned();
                assert!(output.status.success(), "{target}: {text}");
                println!("{target}: {}", text.lines().find(|line| line.contains("stat::number_of_executed_units")).unwrap_or("?"));
            });
        }
    });
}
