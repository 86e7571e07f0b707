//! Tests the output of the credential module with Mosquitto and its clients.

#![allow(clippy::unwrap_used, reason = "a helper of a test fails by panicking")]

mod common;

use std::path::Path;

use common::free_port;
use common::mosquitto::{Mosquitto, wait_until};
use fleetwright::api::device::{Access, Acl};
use fleetwright::broker::credential::file::BrokerFiles;
use fleetwright::broker::credential::{Entry, Password, hash};

fn entry(username: &str, password: &Password, iterations: u32, acls: &[(&str, Access)]) -> Entry {
    let acls: Vec<Acl> = acls.iter().map(|(topic, access)| Acl { topic: (*topic).to_owned(), access: *access }).collect();
    Entry::new(username, &hash::hash("uid", username, password, iterations), &acls).unwrap()
}

fn start(entries: &[Entry], canary: &Password) -> Mosquitto {
    let folder = tempfile::tempdir().unwrap();
    let files = BrokerFiles::new(entries, canary).unwrap();
    write(folder.path(), &files);
    let port = free_port();
    let configuration = format!(
        "allow_anonymous false\npassword_file {0}/passwords\nacl_file {0}/acls\n\
         global_plugin /usr/lib/mosquitto/previous_password.so\nplugin_opt_file {0}/previous-passwords\n\
         listener {port} 127.0.0.1\nuse_username_as_clientid true\n",
        folder.path().display(),
    );
    Mosquitto::start(folder, &configuration, port)
}

fn write(folder: &Path, files: &BrokerFiles) {
    std::fs::write(folder.join("passwords"), &files.passwords).unwrap();
    std::fs::write(folder.join("previous-passwords"), &files.previous_passwords).unwrap();
    std::fs::write(folder.join("acls"), &files.acls).unwrap();
}

#[test]
fn logins_require_the_right_password() {
    let generated = Password::generate();
    let given = Password::given("with space, ümläut: $7$1$ \u{1F512}".as_bytes()).unwrap();
    let long = Password::given("x".repeat(1024).as_bytes()).unwrap();
    let canary = Password::generate();
    let broker = start(
        &[
            entry("press-1", &generated, hash::GENERATED_ITERATIONS, &[]),
            entry("press.2", &given, hash::GIVEN_ITERATIONS, &[]),
            entry("press-3", &long, hash::GIVEN_ITERATIONS, &[]),
        ],
        &canary,
    );
    let accepted = |username: &str, password: &str| {
        broker.publish((username, password), &["-t", &format!("devices/{username}/telemetry"), "-m", "1"]).status.success()
    };
    assert!(accepted("press-1", generated.expose()));
    assert!(accepted("press.2", given.expose()));
    assert!(accepted("press-3", long.expose()));
    assert!(broker.publish(("_agent", canary.expose()), &["-t", "devices/_agent/telemetry", "-m", "1"]).status.success());
    assert!(!accepted("press-1", given.expose()), "another device's password");
    assert!(!accepted("press-1", "wrong"));
    assert!(!accepted("press-1", ""));
    assert!(!accepted("press-4", generated.expose()), "an unknown device");
}

#[test]
fn a_rotated_password_is_accepted_until_rotation_ends_its_session() {
    let (old, new, newest) = (Password::generate(), Password::generate(), Password::generate());
    let current = |password: &Password| entry("press-1", password, hash::GENERATED_ITERATIONS, &[]);
    let previous = |password: &Password| hash::hash("uid", "press-1", password, hash::GENERATED_ITERATIONS);
    let broker = start(&[current(&old)], &Password::generate());
    let reload = |entry: Entry| {
        let canary = Password::generate();
        write(broker.folder.path(), &BrokerFiles::new(&[entry], &canary).unwrap());
        broker.reload();
        wait_until("the reload", || accepted(&broker, "_agent", &canary));
    };
    let mut session = broker.subscribe(("press-1", old.expose()), &["-t", "devices/press-1/desired"]);

    reload(current(&new).with_previous(&previous(&old)).unwrap());
    assert!(session.is_running(), "the session of the old password goes on");
    assert!(!accepted(&broker, "press-1", &newest));
    drop(session);
    assert!(accepted(&broker, "press-1", &old) && accepted(&broker, "press-1", &new));
    let mut session = broker.subscribe(("press-1", old.expose()), &["-t", "devices/press-1/desired"]);

    reload(current(&new));
    wait_until("the session of the old password ends", || !session.is_running());
    assert!(!accepted(&broker, "press-1", &old) && accepted(&broker, "press-1", &new));

    reload(current(&newest).with_previous(&previous(&new)).unwrap());
    assert!(!accepted(&broker, "press-1", &old), "the password before the previous one");
    assert!(accepted(&broker, "press-1", &new) && accepted(&broker, "press-1", &newest));
}

fn accepted(broker: &Mosquitto, username: &str, password: &Password) -> bool {
    broker.publish((username, password.expose()), &["-t", &format!("devices/{username}/telemetry"), "-m", "1"]).status.success()
}

#[test]
fn acls_limit_the_topics_of_devices_and_workers() {
    let password = Password::generate();
    let broker = start(
        &[
            entry("press-1", &password, 1, &[("read all", Access::Read)]),
            entry("press-2", &password, 1, &[("plant 1/press hall/#", Access::Write)]),
            entry("_ingest_vibration", &password, 1, &[("devices/+/telemetry", Access::Read), ("plant 1/#", Access::Read)]),
            entry("_ingest_writer", &password, 1, &[("devices/+/desired", Access::Write), ("read all", Access::Write)]),
        ],
        &Password::generate(),
    );
    let device = broker.subscribe(("press-1", password.expose()), &["-v", "-t", "#", "-t", "$SYS/#"]);
    let worker = broker.subscribe(("_ingest_vibration", password.expose()), &["-v", "-t", "#"]);
    for (username, topic, allowed) in [
        ("press-2", "devices/press-2/telemetry", true),
        ("press-2", "devices/press-2/telemetry/fast", true),
        ("press-2", "devices/press-2/reported", true),
        ("press-2", "devices/press-2/reported/x", true),
        ("press-2", "plant 1/press hall/7", true),
        ("press-2", "devices/press-2/desired", false),
        ("press-2", "devices/press-2", false),
        ("press-2", "devices/press-2/state", false),
        ("press-2", "devices/press-1/telemetry", false),
        ("press-2", "devices/press-1/desired", false),
        ("press-2", "plant 1/other hall", false),
        ("press-2", "$SYS/broker/version", false),
        ("_ingest_writer", "devices/press-2/telemetry", false),
        ("_ingest_writer", "devices/press-1/desired", true),
        ("_ingest_writer", "devices/press-2/desired", true),
        ("_ingest_writer", "read all", true),
    ] {
        let answer = broker.publish((username, password.expose()), &["-t", topic, "-m", &format!("from {username}")]);
        let answer = String::from_utf8_lossy(&[answer.stdout, answer.stderr].concat()).into_owned();
        assert_eq!(answer.contains("Not authorized"), !allowed, "{username} to {topic}: {answer}");
    }
    // The messages that each client receives, in order.
    device.wait_for("read all from");
    worker.wait_for("plant 1/press hall/7 from");
    let received = |output: String| {
        output.lines().filter(|line| line.contains(" from ") && !line.starts_with("Client")).map(str::to_owned).collect::<Vec<_>>()
    };
    assert_eq!(received(device.output()), ["devices/press-1/desired from _ingest_writer", "read all from _ingest_writer"]);
    assert_eq!(received(worker.output()), ["devices/press-2/telemetry from press-2", "plant 1/press hall/7 from press-2"]);
    assert!(!device.output().contains("$SYS/broker/"));
}
