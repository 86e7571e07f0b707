//! Sparkplug B messages of a public client library, through Mosquitto into TimescaleDB.

#![allow(clippy::unwrap_used, clippy::panic, reason = "helpers of tests fail by panicking")]

mod common;

use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};

use common::free_port;
use common::mosquitto::{Mosquitto, PATIENCE, wait_until};
use common::postgres::Postgres;
use common::worker::{Chain, broker_configuration};
use fleetwright::api::Pipeline;
use fleetwright::api::condition::Cause;
use fleetwright::api::device::{Access, Acl};
use fleetwright::api::reason::Reason;
use fleetwright::broker::credential::file::BrokerFiles;
use fleetwright::broker::credential::{Entry, Password, hash};
use fleetwright::operator::device::secret::read_workers;
use fleetwright::operator::kubernetes::apply::owner_reference;
use fleetwright::operator::pipeline::build::credentials;
use fleetwright::operator::pipeline::observe::{DatabaseView, Observed};
use fleetwright::operator::pipeline::validate::validate;
use serde_json::{Value, json};

/// Password of all users, including the worker.
const PASSWORD: &str = "password";

/// An edge node (`e2e/clients/edge_node.py`) with the device `press-1`.
struct EdgeNode {
    process: Child,
    input: ChildStdin,
    lines: Receiver<String>,
}

impl EdgeNode {
    fn start(port: u16) -> Self {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("e2e/clients");
        let mut process = Command::new(folder.join("sparkplug.sh"))
            .arg(folder.join("edge_node.py"))
            .args(["127.0.0.1", &port.to_string(), PASSWORD, "plant", "node-1", "press-1"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let input = process.stdin.take().unwrap();
        let output = BufReader::new(process.stdout.take().unwrap());
        let (sender, lines) = channel();
        std::thread::spawn(move || output.lines().map_while(Result::ok).try_for_each(|line| sender.send(line)));
        // The first run creates the Python environment.
        let node = Self { process, input, lines };
        node.expect("connected");
        node
    }

    fn command(&mut self, command: &str, answer: &str) {
        writeln!(self.input, "{command}").unwrap();
        self.expect(answer);
    }

    fn expect(&self, line: &str) {
        assert_eq!(self.lines.recv_timeout(PATIENCE * 2).as_deref(), Ok(line));
    }
}

impl Drop for EdgeNode {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// The user that the operator creates for the workers of a Pipeline.
fn workers(pipeline: &str, topic: &str, decode: &Value) -> Entry {
    let sink = json!({"timescale": {"connectionSecret": {"name": "db"}, "table": "vibration"}});
    let pipeline: Pipeline = serde_json::from_value(json!({
        "apiVersion": "fleetwright.io/v1alpha1", "kind": "Pipeline",
        "metadata": {"name": pipeline, "namespace": "plant", "uid": pipeline},
        "spec": {"source": {"topic": topic}, "decode": decode, "sink": sink},
    }))
    .unwrap();
    let none = || Cause::new(Reason::DatabaseUnavailable, "not asked");
    let observed = Observed {
        cluster: String::new(),
        usable_logins: [].into(),
        gateways: [("plant-1".to_owned(), [].into())].into(),
        externals: [].into(),
        uri: Err(none()),
        database: DatabaseView::Unseen(none()),
        dead_letters: None,
        descriptor: Ok(None),
        password: None,
    };
    let valid = validate(&pipeline, &observed).unwrap();
    let mut secret = credentials(&pipeline, &valid, &Password::given(PASSWORD.as_bytes()).unwrap());
    secret.metadata.owner_references = Some(vec![owner_reference(&pipeline)]);
    read_workers(&secret).unwrap().remove("plant-1").unwrap().remove(0)
}

fn device(name: &str, topic: &str) -> Entry {
    let acls = [Acl { topic: topic.to_owned(), access: Access::ReadWrite }];
    Entry::new(name, &hash::hash("uid", name, &Password::given(PASSWORD.as_bytes()).unwrap(), 1), &acls).unwrap()
}

/// A broker with only these users.
fn broker(users: &[Entry]) -> Mosquitto {
    let (folder, port) = (tempfile::tempdir().unwrap(), free_port());
    let files = BrokerFiles::new(users, &Password::generate()).unwrap();
    std::fs::write(folder.path().join("passwords"), &files.passwords).unwrap();
    std::fs::write(folder.path().join("acls"), &files.acls).unwrap();
    let configuration = broker_configuration(folder.path(), port).replace("allow_anonymous true", "allow_anonymous false");
    let logins = format!("password_file {0}/passwords\nacl_file {0}/acls\n", folder.path().display());
    Mosquitto::start(folder, &(configuration + &logins), port)
}

#[tokio::test]
async fn metrics_by_alias_are_stored_and_a_missed_birth_causes_a_rebirth_command() {
    let fields = json!([{"name": "pressure", "type": "Float64", "metric": "Inputs/Pressure"}, {"name": "level", "type": "Int64"}]);
    let decode = json!({"format": "SparkplugB", "fields": fields});
    let topic = "spBv1.0/{line}/+/{node}/{device}";
    let users = [
        workers("vibration", topic, &decode),
        workers("other", "spBv1.0/plant/NCMD/{device}", &json!({"fields": [{"name": "level", "type": "Int64"}]})),
        device("node-1", "spBv1.0/plant/+/node-1/#"),
        device("watcher", "spBv1.0/#"),
    ];
    let broker = broker(&users);
    let gateway = json!({"name": "plant-1", "host": "127.0.0.1", "port": broker.port, "tls": false});
    let mut chain = Chain::start_reading(broker, gateway, &[], topic, &decode, Postgres::shared().await).await;
    chain.worker.wait_ready();
    let births = "SELECT count(*) FROM vibration WHERE pressure = 1.5 AND level = -7 AND line = 'plant' AND node = 'node-1'";
    let data = |level: i32| format!("SELECT count(*) FROM vibration WHERE pressure IS NULL AND level = {level}");
    let mut node = EdgeNode::start(chain.broker.port);
    node.command("birth", "born");
    node.command("data -5", "sent");
    chain.wait_for(births, 1).await;
    chain.wait_for(&data(-5), 1).await;

    // A worker that has just started has received no birth.
    assert!(chain.worker.stop());
    chain.start_worker(None);
    chain.worker.wait_ready();
    node.command("data 6", "sent");
    chain.wait_for("SELECT count(*) FROM fleetwright.dead_letter WHERE reason = 'UnknownMetric'", 1).await;
    node.expect("rebirth");
    node.expect("born");
    chain.wait_for(births, 2).await;
    node.command("data 7", "sent");
    chain.wait_for(&data(7), 1).await;

    // A message is lost; the node receives no second command within the minute.
    node.command("lose", "lost");
    node.command("data 8", "sent");
    chain.wait_for(&data(8), 1).await;
    let count = |name: &str| chain.worker.metric(&format!(r#"fleetwright_ingest_sparkplug_{name}_total{{gateway="plant-1"}}"#));
    wait_until("the gap", || (count("sequence_gaps") - 1.0).abs() < f64::EPSILON);
    assert!((count("rebirths") - 1.0).abs() < f64::EPSILON);
    assert_eq!(chain.count("SELECT count(*) FROM fleetwright.dead_letter").await, 1);

    // The worker of another Pipeline may not publish to the nodes; only this one sends commands.
    let watcher = chain.broker.subscribe(("watcher", PASSWORD), &["-i", "watcher", "-t", "spBv1.0/plant/+/node-2"]);
    for (worker, kind, message) in
        [("other", "NCMD", "of another"), ("vibration", "NDATA", "no command"), ("vibration", "NCMD", "a command of its own")]
    {
        chain.broker.publish((&format!("_ingest_{worker}"), PASSWORD), &["-t", &format!("spBv1.0/plant/{kind}/node-2"), "-m", message]);
    }
    watcher.wait_for("a command of its own\n");
    assert_eq!(watcher.output(), "a command of its own\n");
}
