//! Consumers that store messages of the broker in the database: the worker and its peers.

use std::fmt;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use clap::ValueEnum;
use fleetwright::api::PipelineSpec;
use fleetwright::configuration::pipeline::compile;
use fleetwright::database::connect::{connect, drive};
use fleetwright::database::uri::ConnectionUri;
use fleetwright::sink::timescale::execute::apply;
use fleetwright::state::owner::Owner;
use serde_json::json;
use tempfile::TempDir;
use tokio_postgres::Client;

use crate::load::{Content, DEVICES, decode};
use crate::parts::{Broker, Database, MAX_START, Process, await_port, free_port};

/// Telegraf's table: its tag is text and its numbers are doubles.
const TELEGRAF_TABLE: &str = "
    CREATE TABLE load (time timestamptz NOT NULL, device text, rms float8, temperature float8, state text, count float8);
    SELECT create_hypertable('load', by_range('time', interval '1 day'), create_default_indexes => false);";

/// Makes the rows of Telegraf's table unique.
const TELEGRAF_UNIQUE: &str = "CREATE UNIQUE INDEX ON load (time, device);";

/// Skips existing rows, because otherwise the unique index rejects the whole batch.
const TELEGRAF_TRIGGER: &str = "
    CREATE OR REPLACE FUNCTION skip_known() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
        IF EXISTS (SELECT FROM load WHERE time = NEW.time AND device = NEW.device) THEN RETURN NULL; END IF;
        RETURN NEW;
    END $$;
    CREATE TRIGGER skip_known BEFORE INSERT ON load FOR EACH ROW EXECUTE FUNCTION skip_known();";

/// A consumer.
#[derive(Clone, Copy, Debug, Eq, PartialEq, ValueEnum)]
pub enum Kind {
    /// The ingest worker, at a listener with TLS as in a Gateway
    Worker,
    /// The ingest worker without TLS, to measure what TLS costs
    PlaintextWorker,
    /// Telegraf, into a table without any index
    Telegraf,
    /// Telegraf with the aggregator `merge`, into a table without any index
    TelegrafMerge,
    /// Telegraf, into a table with a unique index
    TelegrafUnique,
    /// Telegraf, into a table with a unique index and a trigger that skips existing rows
    TelegrafTrigger,
    /// A Python script: paho, manual acknowledgement, COPY by psycopg
    Python,
    /// Node-RED with a flow that inserts by pg
    NodeRed,
}

impl fmt::Display for Kind {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            Self::Worker => "**worker**",
            Self::PlaintextWorker => "worker without TLS",
            Self::Telegraf => "Telegraf",
            Self::TelegrafMerge => "Telegraf, merge",
            Self::TelegrafUnique => "Telegraf, unique index",
            Self::TelegrafTrigger => "Telegraf, trigger",
            Self::Python => "Python",
            Self::NodeRed => "Node-RED",
        })
    }
}

impl Kind {
    fn is_telegraf(self) -> bool {
        matches!(self, Self::Telegraf | Self::TelegrafMerge | Self::TelegrafUnique | Self::TelegrafTrigger)
    }

    /// Whether it is the ingest worker.
    pub fn is_worker(self) -> bool {
        matches!(self, Self::Worker | Self::PlaintextWorker)
    }

    /// The column of the device.
    pub fn device_column(self) -> &'static str {
        if self.is_telegraf() { "device" } else { "device_id" }
    }

    /// Environment variable with the folder of the consumer; none if it is built with the benchmark.
    fn variable(self) -> Option<&'static str> {
        match self {
            Self::Worker | Self::PlaintextWorker => None,
            Self::Python => Some("FLEETWRIGHT_PEER_PYTHON"),
            Self::NodeRed => Some("FLEETWRIGHT_PEER_NODE_RED"),
            _ => Some("FLEETWRIGHT_PEER_TELEGRAF"),
        }
    }

    /// Whether the consumer is installed.
    pub fn is_installed(self) -> bool {
        self.variable().is_none_or(|variable| std::env::var_os(variable).is_some())
    }

    /// Creates a new table, and the devices if they are missing.
    pub async fn prepare(self, database: &Database, content: Content) -> anyhow::Result<Client> {
        let uri: ConnectionUri = database.uri().parse()?;
        let (mut client, connection) = connect(&uri, "bench").await?;
        drive(connection);
        client.batch_execute("DROP TABLE IF EXISTS load").await?;
        if self.is_telegraf() {
            client.batch_execute(TELEGRAF_TABLE).await?;
            if matches!(self, Self::TelegrafUnique | Self::TelegrafTrigger) {
                client.batch_execute(TELEGRAF_UNIQUE).await?;
            }
            if self == Self::TelegrafTrigger {
                client.batch_execute(TELEGRAF_TRIGGER).await?;
            }
            client.batch_execute("CHECKPOINT").await?;
            return Ok(client);
        }
        let spec: PipelineSpec = serde_json::from_value(json!({
            "source": {"topic": "devices/{device}/telemetry"}, "decode": decode(content),
            "sink": {"timescale": {"connectionSecret": {"name": "x"}, "table": "load"}},
        }))?;
        let owner = Owner { cluster: "here".to_owned(), namespace: "bench".to_owned(), pipeline: "load".to_owned() };
        let compiled = compile(owner, &spec, Ok(None)).map_err(|cause| anyhow::anyhow!("{}", cause.message))?;
        apply(&mut client, &compiled.desired).await?;
        client
            .batch_execute(&format!(
                "INSERT INTO fleetwright.device (namespace, name, gateway, enabled)
                 SELECT 'bench', 'device-' || n, 'gateway', true FROM generate_series(0, {DEVICES} - 1) n ON CONFLICT DO NOTHING;
                 TRUNCATE fleetwright.dead_letter; CHECKPOINT"
            ))
            .await?;
        Ok(client)
    }

    /// Starts the consumer between a broker and a database.
    pub fn start(self, broker: &Broker, database: &Database, content: Content) -> anyhow::Result<Consumer> {
        let folder = tempfile::tempdir()?;
        let http = free_port()?;
        let mut command = match self.variable() {
            None => self.worker(folder.path(), broker, database, http, content)?,
            Some(variable) => {
                let built = PathBuf::from(
                    std::env::var_os(variable)
                        .with_context(|| format!("{self} is not installed: expected its folder in {variable}, which run.sh sets"))?,
                );
                self.peer(&built, folder.path(), content.readings())?
            }
        };
        command.env("BROKER_PORT", broker.port.to_string()).env("DATABASE_URI", database.uri()).current_dir(folder.path());
        Ok(Consumer { process: Process::start(&mut command, &folder.path().join("log"))?, kind: self, http, _folder: folder })
    }

    /// The release build of the worker, with or without TLS.
    fn worker(self, folder: &Path, broker: &Broker, database: &Database, http: u16, content: Content) -> anyhow::Result<Command> {
        let tls = self == Self::Worker;
        let port = if tls { broker.tls_port } else { broker.port };
        let configuration = json!({
            "cluster": "here", "namespace": "bench", "pipeline": "load", "topic": "devices/{device}/telemetry", "decode": decode(content), "table": "load",
            "gateways": [{"name": "gateway", "host": "127.0.0.1", "port": port, "tls": tls}],
        });
        std::fs::create_dir_all(folder.join("gateways/gateway"))?;
        let files = [
            ("ingest.json", configuration.to_string()),
            ("uri", database.uri()),
            ("password", "password".to_owned()),
            ("gateways/gateway/ca.crt", broker.authority.clone()),
        ];
        for (name, content) in files {
            std::fs::write(folder.join(name), content)?;
        }
        let mut command = Command::new(std::env::current_exe()?.with_file_name("fleetwright"));
        command.args(["ingest", "--config", "ingest.json", "--database-uri-file", "uri", "--password-file", "password", "--ordinal", "0"]);
        command.args(["--http", &format!("127.0.0.1:{http}")]);
        // As in its image.
        command.env("MIMALLOC_PURGE_DELAY", "0");
        Ok(command)
    }

    fn peer(self, built: &Path, folder: &Path, readings: u64) -> anyhow::Result<Command> {
        let peers = Path::new(env!("CARGO_MANIFEST_DIR")).join("peers");
        Ok(match self {
            Self::Python => {
                let mut command = Command::new(built.join("bin/python"));
                command.arg(peers.join("consumer.py"));
                command
            }
            Self::NodeRed => {
                // It writes files next to its settings.
                for file in ["settings.js", "flow.json"] {
                    std::fs::copy(peers.join(file), folder.join(file))?;
                }
                let mut command = Command::new("node");
                command.arg(built.join("node_modules/node-red/red.js")).args(["-u", ".", "-s", "settings.js"]);
                command.env("NODE_RED_MODULES", built.join("node_modules"));
                command
            }
            _ => {
                let mut command = Command::new(built.join("telegraf"));
                // Space for five batches of rows and their messages.
                let undelivered = (50_000 / readings).max(100);
                command.arg("--config").arg(peers.join("telegraf.conf")).env("UNDELIVERED", undelivered.to_string());
                if self == Self::TelegrafMerge {
                    command.arg("--config").arg(peers.join("telegraf-merge.conf"));
                }
                command
            }
        })
    }
}

/// A running consumer.
pub struct Consumer {
    /// Process of the consumer.
    pub process: Process,
    kind: Kind,
    http: u16,
    _folder: TempDir,
}

impl Consumer {
    /// Waits until the consumer receives messages.
    pub fn await_ready(&self, broker: &Broker) -> anyhow::Result<()> {
        broker.await_subscriber()?;
        if !self.kind.is_worker() {
            return Ok(());
        }
        await_port(self.http)?;
        let started = Instant::now();
        loop {
            let mut stream = TcpStream::connect((Ipv4Addr::LOCALHOST, self.http))?;
            stream.write_all(b"GET /readyz HTTP/1.1\r\nHost: worker\r\nConnection: close\r\n\r\n")?;
            let mut answer = String::new();
            stream.read_to_string(&mut answer)?;
            if answer.starts_with("HTTP/1.1 200") {
                return Ok(());
            }
            if started.elapsed() > MAX_START {
                bail!("expected the worker to be ready within {} s, found {answer}", MAX_START.as_secs());
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}
