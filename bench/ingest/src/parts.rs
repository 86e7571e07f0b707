//! The processes of a run, and what each has used.

use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio_postgres::{Client, NoTls};

/// How long a part may take to start.
const START: Duration = Duration::from_mins(1);

/// A process that ends with its owner.
pub struct Process {
    child: Child,
    interrupt: bool,
}

/// What a process has used.
#[derive(Clone, Copy, Debug, Default)]
pub struct Usage {
    /// Processor time in seconds.
    pub processor: f64,
    /// The most memory it ever had resident, in MiB.
    pub memory: f64,
}

impl Process {
    fn start(command: &mut Command) -> anyhow::Result<Self> {
        let child = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn().context("failed to start a part")?;
        Ok(Self { child, interrupt: false })
    }

    /// What it has used so far.
    pub fn usage(&self) -> anyhow::Result<Usage> {
        let folder = PathBuf::from(format!("/proc/{}", self.child.id()));
        let stat = std::fs::read_to_string(folder.join("stat"))?;
        let fields: Vec<&str> = stat.rsplit(')').next().unwrap_or_default().split_whitespace().collect();
        // Fields 14 and 15 of proc_pid_stat(5), in hundredths of a second; the first two are cut off.
        let ticks: f64 = fields.iter().skip(11).take(2).filter_map(|field| field.parse::<f64>().ok()).sum();
        let status = std::fs::read_to_string(folder.join("status"))?;
        let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap_or("0 kB");
        let kibibytes: f64 = peak.trim().trim_end_matches(" kB").parse()?;
        Ok(Usage { processor: ticks / 100.0, memory: kibibytes / 1024.0 })
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if self.interrupt {
            let _ = Command::new("kill").args(["-INT", &self.child.id().to_string()]).status();
        } else {
            let _ = self.child.kill();
        }
        let _ = self.child.wait();
    }
}

fn script() -> PathBuf {
    std::env::var_os("FLEETWRIGHT_PARTS").map_or_else(|| PathBuf::from("e2e/parts.sh"), PathBuf::from)
}

fn free_port() -> anyhow::Result<u16> {
    Ok(TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?.local_addr()?.port())
}

fn await_port(port: u16) -> anyhow::Result<()> {
    let started = Instant::now();
    while TcpStream::connect((Ipv4Addr::LOCALHOST, port)).is_err() {
        ensure!(started.elapsed() < START, "nothing answers on port {port}");
        std::thread::sleep(Duration::from_millis(20));
    }
    Ok(())
}

/// Mosquitto, with its queues in memory and without bounds.
pub struct Broker {
    /// Port.
    pub port: u16,
    _process: Process,
    _folder: TempDir,
}

impl Broker {
    /// Starts it.
    pub fn start() -> anyhow::Result<Self> {
        let folder = tempfile::tempdir()?;
        let port = free_port()?;
        let file = folder.path().join("mosquitto.conf");
        std::fs::write(
            &file,
            format!(
                "listener {port} 127.0.0.1\nallow_anonymous true\nset_tcp_nodelay true\nmax_inflight_messages 65534\n\
                 max_queued_messages 0\nmax_queued_bytes 0\npersistence false\nlog_type error\n"
            ),
        )?;
        let process = Process::start(Command::new(script()).args(["mosquitto", "-c"]).arg(file))?;
        await_port(port)?;
        Ok(Self { port, _process: process, _folder: folder })
    }
}

/// PostgreSQL with TimescaleDB, synchronous to its disk.
pub struct Database {
    port: u16,
    _process: Process,
    _folder: TempDir,
}

impl Database {
    /// Starts it.
    pub async fn start() -> anyhow::Result<Self> {
        let folder = tempfile::tempdir()?;
        let port = free_port()?;
        let mut process =
            Process::start(Command::new(script()).arg("postgres").arg(folder.path().join("data")).arg(port.to_string()).args([
                "-c",
                "shared_buffers=1GB",
                "-c",
                "max_wal_size=16GB",
                "-c",
                "track_commit_timestamp=on",
            ]))?;
        process.interrupt = true;
        let database = Self { port, _process: process, _folder: folder };
        let started = Instant::now();
        while database.client().await.is_err() {
            ensure!(started.elapsed() < START, "PostgreSQL does not answer");
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        Ok(database)
    }

    /// URI of its database.
    pub fn uri(&self) -> String {
        format!("postgresql://postgres@127.0.0.1:{}/postgres?sslmode=disable", self.port)
    }

    /// A connection.
    pub async fn client(&self) -> anyhow::Result<Client> {
        let (client, connection) = tokio_postgres::connect(&self.uri(), NoTls).await?;
        tokio::spawn(connection);
        Ok(client)
    }
}

/// The worker, as it is released.
pub struct Worker {
    /// Its process.
    pub process: Process,
    http: u16,
    _folder: TempDir,
}

impl Worker {
    /// Starts it between a broker and a database.
    pub fn start(broker: &Broker, database: &Database, decode: &Value) -> anyhow::Result<Self> {
        let folder = tempfile::tempdir()?;
        let http = free_port()?;
        let configuration = json!({
            "namespace": "bench", "pipeline": "load", "topic": "devices/{device}/telemetry", "decode": decode, "table": "load",
            "gateways": [{"name": "gateway", "host": "127.0.0.1", "port": broker.port}],
        });
        for (name, content) in [("ingest.json", configuration.to_string()), ("uri", database.uri()), ("password", "password".to_owned())] {
            std::fs::write(folder.path().join(name), content)?;
        }
        let binary = std::env::current_exe()?.with_file_name("fleetwright");
        let mut command = Command::new(binary);
        command.args(["ingest", "--config", "ingest.json", "--database-uri-file", "uri", "--password-file", "password", "--ordinal", "0"]);
        command.args(["--http", &format!("127.0.0.1:{http}")]).current_dir(folder.path());
        Ok(Self { process: Process::start(&mut command)?, http, _folder: folder })
    }

    /// Waits until it is ready.
    pub fn await_ready(&self) -> anyhow::Result<()> {
        use std::io::{Read, Write};
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
            if started.elapsed() > START {
                bail!("the worker is not ready: {answer}");
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

/// A subscriber that counts and acknowledges, as a process of its own.
pub fn counter(broker: &Broker, messages: u64, clean: bool) -> anyhow::Result<Process> {
    let mut command = Command::new(std::env::current_exe()?);
    command.args(["count", &broker.port.to_string(), &messages.to_string(), &clean.to_string()]);
    Process::start(&mut command)
}
