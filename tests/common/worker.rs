//! A worker with a broker and a database.

use std::io::{Read, Write};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;

use fleetwright::api::PipelineSpec;
use fleetwright::configuration::pipeline::compile;
use fleetwright::sink::timescale::execute::apply;
use fleetwright::sink::timescale::schema::Desired;
use fleetwright::state::assignment::spread;
use fleetwright::state::owner::Owner;
use serde_json::{Value, json};
use tokio_postgres::Client;

use super::free_port;
use super::memory::MemoryLimit;
use super::mosquitto::Mosquitto;
use super::postgres::Postgres;
use super::proxy::Proxy;
pub use super::worker_process::Worker;

/// Number of devices in the registry: `press-1` and so on.
const DEVICES: i32 = 9;

/// A broker, a database with the Pipeline's table, and a worker.
pub struct Chain<B = Mosquitto> {
    pub broker: B,
    pub postgres: Arc<Postgres>,
    pub database: String,
    pub client: Client,
    pub desired: Desired,
    pub worker: Worker,
    /// Proxies between worker and broker or database, if the test needs them.
    pub proxies: Option<Proxies>,
    configuration: Value,
    uri: String,
    arguments: &'static [&'static str],
    files: Vec<(String, String)>,
}

/// A proxy on each side of the worker.
pub struct Proxies {
    pub broker: Proxy,
    pub database: Proxy,
}

impl Chain {
    /// Starts broker, database and worker for a topic and a decoder, and waits until the worker is ready.
    pub async fn start(topic: &str, decode: &Value, postgres: Arc<Postgres>) -> Self {
        Self::start_with(&[], topic, decode, postgres).await
    }

    /// As above, with additional arguments of the worker.
    pub async fn start_with(arguments: &'static [&'static str], topic: &str, decode: &Value, postgres: Arc<Postgres>) -> Self {
        let broker = broker();
        let gateway = json!({"name": "plant-1", "host": "127.0.0.1", "port": broker.port, "tls": false});
        let chain = Self::make(broker, None, gateway, &[], arguments, topic, decode, postgres).await;
        chain.worker.wait_ready();
        chain
    }

    /// As above, with a proxy on each side of the worker.
    pub async fn start_between_proxies(topic: &str, decode: &Value, postgres: Arc<Postgres>) -> Self {
        let broker = broker();
        let proxies = Proxies { broker: Proxy::start(broker.port), database: Proxy::start(postgres.port()) };
        let gateway = json!({"name": "plant-1", "host": "127.0.0.1", "port": proxies.broker.port, "tls": false});
        let chain = Self::make(broker, Some(proxies), gateway, &[], &[], topic, decode, postgres).await;
        chain.worker.wait_ready();
        chain
    }

    /// Starts broker and database, and a worker that need not become ready: it is to be replaced.
    pub async fn prepare(topic: &str, decode: &Value, postgres: Arc<Postgres>) -> Self {
        let broker = broker();
        let gateway = json!({"name": "plant-1", "host": "127.0.0.1", "port": broker.port, "tls": false});
        Self::make(broker, None, gateway, &[], &[], topic, decode, postgres).await
    }

    /// Publishes one message as this user.
    pub fn publish(&self, topic: &str, payload: &str) {
        let output = self.broker.publish(("device", "password"), &["-t", topic, "-m", payload]);
        assert!(output.status.success(), "{output:?}");
    }
}

impl<B> Chain<B> {
    /// Starts a worker that reads an external broker as Gateway plant-1, with these additional files. The worker need not be
    /// ready.
    pub async fn start_reading(
        broker: B,
        gateway: Value,
        files: &[(&str, &str)],
        topic: &str,
        decode: &Value,
        postgres: Arc<Postgres>,
    ) -> Self {
        Self::make(broker, None, gateway, files, &[], topic, decode, postgres).await
    }

    #[allow(clippy::too_many_arguments, reason = "each is a part of the chain")]
    async fn make(
        broker: B,
        proxies: Option<Proxies>,
        gateway: Value,
        files: &[(&str, &str)],
        arguments: &'static [&'static str],
        topic: &str,
        decode: &Value,
        postgres: Arc<Postgres>,
    ) -> Self {
        let decode = &any_age(decode);
        let database = postgres.create_database().await;
        let mut client = postgres.client(&database).await;
        let spec: PipelineSpec = serde_json::from_value(json!({
            "source": {"topic": topic},
            "decode": decode,
            "sink": {"timescale": {"connectionSecret": {"name": "db"}, "table": "vibration"}},
        }))
        .unwrap();
        let owner = Owner { cluster: "here".to_owned(), namespace: "plant".to_owned(), pipeline: "vibration".to_owned() };
        let desired = compile(owner, &spec, Ok(None)).unwrap().desired;
        apply(&mut client, &desired).await.unwrap();
        client
            .batch_execute(&format!(
                "INSERT INTO fleetwright.device (namespace, name, gateway, enabled)
                 SELECT 'plant', 'press-' || n, 'plant-1', true FROM generate_series(1, {DEVICES}) n"
            ))
            .await
            .unwrap();
        let uri = Postgres::uri_at(proxies.as_ref().map_or(postgres.port(), |proxies| proxies.database.port), &database);
        let configuration = json!({
            "cluster": "here", "namespace": "plant", "pipeline": "vibration", "topic": topic, "decode": decode, "table": "vibration",
            "gateways": [gateway],
        });
        let files: Vec<(String, String)> = files.iter().map(|(name, content)| ((*name).to_owned(), (*content).to_owned())).collect();
        let worker = Worker::start(&configuration, &uri, 0, arguments, &files);
        Self { broker, postgres, database, client, desired, worker, proxies, configuration, uri, arguments, files }
    }

    /// Replaces the worker process, with the same or another topic.
    pub fn start_worker(&mut self, topic: Option<&str>) {
        if let Some(topic) = topic {
            self.configuration["topic"] = topic.into();
        }
        let folder = std::mem::replace(&mut self.worker.folder, tempfile::tempdir().unwrap());
        self.worker = Worker::start_in(folder, &self.configuration, &self.uri, 0, self.arguments);
    }

    /// Replaces the worker process by one with a memory limit, if there is one.
    pub fn start_worker_within(&mut self, limit: Option<&MemoryLimit>) {
        let folder = std::mem::replace(&mut self.worker.folder, tempfile::tempdir().unwrap());
        self.worker = Worker::start_limited(folder, &self.configuration, &self.uri, 0, self.arguments, limit);
    }

    /// The worker's decoder.
    pub fn decode(&self) -> Value {
        self.configuration["decode"].clone()
    }

    /// Changes the connection URI of the next process.
    pub fn connect_to(&mut self, uri: String) {
        self.uri = uri;
    }

    /// Changes the configuration of the next process.
    pub fn configure(&mut self, name: &str, value: Value) {
        self.configuration[name] = value;
    }

    /// Starts a further worker with this ordinal. It reads nothing until a gateway is assigned to it.
    pub fn one_more_worker(&self, ordinal: i32) -> Worker {
        Worker::start(&self.configuration, &self.uri, ordinal, self.arguments, &self.files)
    }

    /// Replaces the process of one of these workers.
    pub fn restart(&self, worker: &mut Worker, ordinal: i32) {
        let folder = std::mem::replace(&mut worker.folder, tempfile::tempdir().unwrap());
        *worker = Worker::start_in(folder, &self.configuration, &self.uri, ordinal, self.arguments);
    }

    /// Distributes these sessions over this number of workers.
    pub async fn spread(&mut self, sessions: &[&str], workers: i32) {
        let sessions: Vec<String> = sessions.iter().map(|name| (*name).to_owned()).collect();
        spread(&mut self.client, &self.desired.owner, &sessions, workers).await.unwrap();
    }

    /// Assigns the gateway to a worker.
    pub async fn assign(&mut self, ordinal: i32) {
        let gateways = ["plant-0".to_owned(), "plant-1".to_owned()];
        // The first of two gateways belongs to the other worker.
        self.execute(&format!(
            "DELETE FROM fleetwright.assignment; INSERT INTO fleetwright.assignment VALUES ('plant', 'vibration', 'plant-0', {})",
            1 - ordinal
        ))
        .await;
        self.execute(&format!("INSERT INTO fleetwright.assignment VALUES ('plant', 'vibration', 'plant-1', {ordinal})")).await;
        assert!(!spread(&mut self.client, &self.desired.owner, &gateways, 2).await.unwrap(), "this is how two workers share two gateways");
    }

    /// Runs `fleetwright replay` with the worker's configuration and this decoder.
    pub fn replay(&self, decode: &Value, arguments: &[&str]) -> Child {
        let folder = tempfile::tempdir().unwrap();
        let mut configuration = self.configuration.clone();
        configuration["decode"] = any_age(decode);
        std::fs::write(folder.path().join("ingest.json"), configuration.to_string()).unwrap();
        let mut replay = Command::new(env!("CARGO_BIN_EXE_fleetwright"))
            .args(["replay", "--config", "ingest.json", "--database-uri-file", "-"])
            .args(arguments)
            .current_dir(folder.path())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::inherit())
            .spawn()
            .unwrap();
        replay.stdin.take().unwrap().write_all(self.postgres.uri_text(&self.database).as_bytes()).unwrap();
        // The process has read its configuration when it connects to the database; the folder is removed after that.
        let mut first = [0];
        replay.stdout.as_mut().unwrap().read_exact(&mut first).unwrap();
        replay
    }

    /// Connects to the database again after it was unavailable.
    pub async fn reconnect(&mut self) {
        self.client = self.postgres.client(&self.database).await;
    }

    /// Restores the table.
    pub async fn apply(&mut self) {
        apply(&mut self.client, &self.desired).await.unwrap();
    }

    pub async fn execute(&self, statement: &str) {
        self.client.batch_execute(statement).await.unwrap();
    }

    pub async fn count(&self, query: &str) -> i64 {
        self.client.query_one(query, &[]).await.unwrap().get(0)
    }

    /// Waits until a query returns this number.
    pub async fn wait_for(&self, query: &str, expected: i64) {
        self.wait_for_within(query, expected, super::mosquitto::PATIENCE).await;
    }

    /// The same, for at most this long.
    pub async fn wait_for_within(&self, query: &str, expected: i64, limit: std::time::Duration) {
        let started = std::time::Instant::now();
        loop {
            let found = self.count(query).await;
            if found == expected {
                return;
            }
            assert!(
                started.elapsed() < limit,
                "waited in vain for {expected} of {query}, found {found}; the worker's log:\n{}",
                self.worker.log()
            );
            tokio::time::sleep(std::time::Duration::from_millis(20)).await;
        }
    }
}

/// The decoder, which accepts readings of any age unless it says otherwise: the times in tests are constants.
pub fn any_age(decode: &Value) -> Value {
    let mut decode = decode.clone();
    if decode["time"]["maxAge"].is_null() {
        decode["time"]["maxAge"] = "9999d".into();
    }
    decode
}

/// A broker configured like a Gateway with durability `Process`, except for its users.
pub fn broker() -> Mosquitto {
    let folder = tempfile::tempdir().unwrap();
    let port = free_port();
    let configuration = broker_configuration(folder.path(), port);
    Mosquitto::start(folder, &configuration, port)
}

/// Configuration of this broker.
pub fn broker_configuration(folder: &Path, port: u16) -> String {
    format!(
        "listener {port} 127.0.0.1\nallow_anonymous true\nset_tcp_nodelay true\nmax_inflight_messages 65534\nmax_queued_messages 0\n\
         persistence_location {}/\nplugin /usr/lib/mosquitto/persist_sqlite.so\nplugin_opt_sync normal\nplugin_opt_flush_period 0\n",
        folder.display()
    )
}
