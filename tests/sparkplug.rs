//! Sparkplug B as a public client library speaks it, through a real broker into a real table.

#![allow(clippy::unwrap_used, clippy::panic, reason = "helpers of tests fail by panicking")]

mod common;

use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};

use common::mosquitto::{PATIENCE, wait_until};
use common::postgres::Postgres;
use common::worker::Chain;
use serde_json::json;

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
            .args(["127.0.0.1", &port.to_string(), "plant", "node-1", "press-1"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let input = process.stdin.take().unwrap();
        let output = BufReader::new(process.stdout.take().unwrap());
        let (sender, lines) = channel();
        std::thread::spawn(move || output.lines().map_while(Result::ok).try_for_each(|line| sender.send(line)));
        // The first time, its Python is made.
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

#[tokio::test]
async fn an_edge_node_is_understood_by_alias_and_asked_for_a_birth_that_was_missed() {
    let fields = json!([{"name": "pressure", "type": "Float64", "metric": "Inputs/Pressure"}, {"name": "level", "type": "Int64"}]);
    let decode = json!({"format": "SparkplugB", "fields": fields});
    let mut chain = Chain::start("spBv1.0/{line}/+/{node}/{device}", &decode, Postgres::shared().await).await;
    let births = "SELECT count(*) FROM vibration WHERE pressure = 1.5 AND level = -7 AND line = 'plant' AND node = 'node-1'";
    let data = |level: i32| format!("SELECT count(*) FROM vibration WHERE pressure IS NULL AND level = {level}");
    let mut node = EdgeNode::start(chain.broker.port);
    node.command("birth", "born");
    node.command("data -5", "sent");
    chain.wait_for(births, 1).await;
    chain.wait_for(&data(-5), 1).await;

    // A worker that has just started has seen no birth.
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

    // A message is lost; the node is not asked again within the minute.
    node.command("lose", "lost");
    node.command("data 8", "sent");
    chain.wait_for(&data(8), 1).await;
    let count = |name: &str| chain.worker.metric(&format!(r#"fleetwright_ingest_sparkplug_{name}_total{{gateway="plant-1"}}"#));
    wait_until("the gap", || (count("sequence_gaps") - 1.0).abs() < f64::EPSILON);
    assert!((count("rebirths") - 1.0).abs() < f64::EPSILON);
    assert_eq!(chain.count("SELECT count(*) FROM fleetwright.dead_letter").await, 1);
}
