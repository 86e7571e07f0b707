//! The processes of a run and their resource use.

use std::fs::File;
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use bytes::Bytes;
use clap::ValueEnum;
use fleetwright::certificate::authority::Authority;
use fleetwright::mqtt::login::Login;
use jiff::Timestamp;
use tempfile::TempDir;
use tokio::runtime::{self, Runtime};
use tokio_postgres::{Client, NoTls};

use crate::subscriber::Subscriber;

/// Maximum start time of a process.
pub const MAX_START: Duration = Duration::from_mins(1);

/// The topic filter of the consumers.
pub const TOPIC: &str = "devices/+/telemetry";

/// A process that ends on drop.
pub struct Process {
    child: Child,
    interrupt: bool,
}

/// Resource use of a process.
#[derive(Clone, Copy, Debug, Default)]
pub struct Usage {
    /// Processor time in seconds.
    pub processor: f64,
    /// Maximum resident memory, in MiB.
    pub memory: f64,
}

impl Process {
    /// Starts a process. Its standard error goes to the log.
    pub fn start(command: &mut Command, log: &Path) -> anyhow::Result<Self> {
        let log = File::options().create(true).append(true).open(log)?;
        let child = command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .with_context(|| format!("failed to start {}", command.get_program().display()))?;
        Ok(Self { child, interrupt: false })
    }

    /// Its resource use since its start.
    pub fn usage(&self) -> anyhow::Result<Usage> {
        let id = self.child.id();
        let status = std::fs::read_to_string(format!("/proc/{id}/status"))?;
        let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap_or("0 kB");
        let kibibytes: f64 = peak.trim().trim_end_matches(" kB").parse()?;
        Ok(Usage { processor: ticks(id, 11..13).unwrap_or(0.0), memory: kibibytes / 1024.0 })
    }

    /// Processor time of it and its children, in seconds.
    pub fn processor_of_all(&self) -> f64 {
        let id = self.child.id();
        let numbers = std::fs::read_dir("/proc").into_iter().flatten().flatten();
        let processes = numbers.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
        let children = processes.filter(|process| ticks(*process, 1..2).is_some_and(|parent| (parent * 100.0 - f64::from(id)).abs() < 0.5));
        // Including the ended children of the process itself.
        ticks(id, 11..15).unwrap_or(0.0) + children.filter_map(|child| ticks(child, 11..13)).sum::<f64>()
    }

    /// Kills the process with SIGKILL.
    pub fn kill(&mut self) -> anyhow::Result<()> {
        self.child.kill()?;
        self.child.wait()?;
        // The process identifier may belong to another process now.
        self.interrupt = false;
        Ok(())
    }
}

/// A sum of fields of `proc_pid_stat(5)`, which are hundredths of a second. Counted after the name, so that field 14 has the index 11.
fn ticks(process: u32, fields: std::ops::Range<usize>) -> Option<f64> {
    let stat = std::fs::read_to_string(format!("/proc/{process}/stat")).ok()?;
    let values = stat.rsplit(')').next()?.split_whitespace().skip(fields.start).take(fields.len());
    Some(values.filter_map(|field| field.parse::<f64>().ok()).sum::<f64>() / 100.0)
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

/// An unused port of this machine.
pub fn free_port() -> anyhow::Result<u16> {
    Ok(TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?.local_addr()?.port())
}

/// Waits until a process listens on this port.
pub fn await_port(port: u16) -> anyhow::Result<()> {
    let started = Instant::now();
    while TcpStream::connect((Ipv4Addr::LOCALHOST, port)).is_err() {
        ensure!(started.elapsed() < MAX_START, "nothing answers on port {port}");
        std::thread::sleep(Duration::from_millis(20));
    }
    Ok(())
}

/// Where the broker stores its queues.
#[derive(Clone, Copy, Debug, Eq, PartialEq, ValueEnum)]
pub enum Queues {
    /// In memory
    Memory,
    /// On disk, so that the broker loses nothing if it is killed: `durability: Process` of a Gateway
    Process,
}

/// Mosquitto with unlimited queues.
pub struct Broker {
    /// Port without TLS.
    pub port: u16,
    /// Port with TLS.
    pub tls_port: u16,
    /// The authority of its certificate (PEM).
    pub authority: String,
    process: Process,
    folder: TempDir,
}

impl Broker {
    /// Starts it.
    pub fn start(queues: Queues) -> anyhow::Result<Self> {
        let folder = tempfile::tempdir()?;
        let (port, tls_port) = (free_port()?, free_port()?);
        let authority = Authority::create("bench", "gateway", Timestamp::now())?;
        for (name, content) in authority.certify(&["127.0.0.1".to_owned()], None, Timestamp::now())? {
            std::fs::write(folder.path().join(name), content.0)?;
        }
        let (authority, path) = (authority.trusted(), folder.path().display());
        // As in the configuration of a Gateway with this durability.
        let persistence = match queues {
            Queues::Memory => "persistence false\n".to_owned(),
            Queues::Process => format!(
                "persistence_location {}/\nplugin /usr/lib/mosquitto/persist_sqlite.so\nplugin_opt_sync normal\nplugin_opt_flush_period 0\n",
                folder.path().display()
            ),
        };
        let configuration = format!(
            "listener {port} 127.0.0.1\n\
             listener {tls_port} 127.0.0.1\ncertfile {path}/tls.crt\nkeyfile {path}/tls.key\ntls_version tlsv1.2\nallow_anonymous true\nset_tcp_nodelay true\nmax_inflight_messages 65534\n\
             max_queued_messages 0\nmax_queued_bytes 0\nlog_dest stderr\nlog_type error\nlog_type subscribe\n{persistence}"
        );
        std::fs::write(folder.path().join("mosquitto.conf"), configuration)?;
        let process = Self::run(folder.path())?;
        await_port(port)?;
        Ok(Self { port, tls_port, authority, process, folder })
    }

    fn run(folder: &Path) -> anyhow::Result<Process> {
        Process::start(Command::new(script()).args(["mosquitto", "-c"]).arg(folder.join("mosquitto.conf")), &folder.join("log"))
    }

    /// Waits until a client has subscribed.
    pub fn await_subscriber(&self) -> anyhow::Result<()> {
        let started = Instant::now();
        while !std::fs::read_to_string(self.folder.path().join("log"))?.contains(TOPIC) {
            ensure!(
                started.elapsed() < MAX_START,
                "expected a subscription to {TOPIC} within {} s, found none in the broker's log",
                MAX_START.as_secs()
            );
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(())
    }

    /// Kills the broker and starts it again.
    pub fn restart(&mut self) -> anyhow::Result<()> {
        self.process.kill()?;
        self.process = Self::run(self.folder.path())?;
        await_port(self.port)
    }

    /// Processor time in seconds.
    pub fn processor(&self) -> f64 {
        self.process.usage().map_or(0.0, |usage| usage.processor)
    }
}

/// PostgreSQL with TimescaleDB. Commits are synchronous.
pub struct Database {
    port: u16,
    process: Process,
    folder: TempDir,
}

impl Database {
    /// Starts it.
    pub async fn start() -> anyhow::Result<Self> {
        let folder = tempfile::tempdir()?;
        let port = free_port()?;
        let database = Self { port, process: Self::run(folder.path(), port)?, folder };
        database.await_answer().await?;
        Ok(database)
    }

    fn run(folder: &Path, port: u16) -> anyhow::Result<Process> {
        let mut command = Command::new(script());
        command.arg("postgres").arg(folder.join("data")).arg(port.to_string());
        command.args(["-c", "shared_buffers=1GB", "-c", "max_wal_size=16GB", "-c", "track_commit_timestamp=on"]);
        let mut process = Process::start(&mut command, &folder.join("log"))?;
        process.interrupt = true;
        Ok(process)
    }

    async fn await_answer(&self) -> anyhow::Result<()> {
        let started = Instant::now();
        while self.client().await.is_err() {
            ensure!(started.elapsed() < MAX_START, "PostgreSQL does not answer");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        Ok(())
    }

    /// Kills PostgreSQL and starts it again.
    pub async fn restart(&mut self) -> anyhow::Result<()> {
        self.process.kill()?;
        let started = Instant::now();
        loop {
            // The start fails while a process of the killed server still uses its shared memory.
            self.process = Self::run(self.folder.path(), self.port)?;
            tokio::time::sleep(Duration::from_millis(500)).await;
            if self.process.child.try_wait()?.is_none() {
                return self.await_answer().await;
            }
            ensure!(started.elapsed() < MAX_START, "PostgreSQL does not start again");
        }
    }

    /// URI of the database.
    pub fn uri(&self) -> String {
        format!("postgresql://postgres@127.0.0.1:{}/postgres?sslmode=disable", self.port)
    }

    /// A connection.
    pub async fn client(&self) -> anyhow::Result<Client> {
        let (client, connection) = tokio_postgres::connect(&self.uri(), NoTls).await?;
        tokio::spawn(connection);
        Ok(client)
    }

    /// Processor time of all its processes, in seconds.
    pub fn processor(&self) -> f64 {
        self.process.processor_of_all()
    }
}

/// The process of a counting subscriber.
pub struct Counter {
    /// The process. It runs until it is dropped.
    pub process: Process,
    folder: TempDir,
}

impl Counter {
    /// Starts the process. It subscribes, or resumes the existing session.
    pub fn start(subscriber: Subscriber, broker: &Broker, messages: u64, subscribe: bool) -> anyhow::Result<Self> {
        let folder = tempfile::tempdir()?;
        let mut command = Command::new(std::env::current_exe()?);
        command.args(["count", &subscriber.argument(), &broker.port.to_string(), &messages.to_string(), &subscribe.to_string()]);
        Ok(Self { process: Process::start(&mut command, &folder.path().join("log"))?, folder })
    }

    /// Waits for the last message. Returns its time, in seconds since 1970.
    pub fn await_end(&self) -> anyhow::Result<f64> {
        let started = Instant::now();
        loop {
            let log = std::fs::read_to_string(self.folder.path().join("log"))?;
            if let Some(line) = log.strip_suffix('\n') {
                return line.parse().with_context(|| format!("expected a time from the counting subscriber, found: {line}"));
            }
            ensure!(
                started.elapsed() < 5 * MAX_START,
                "the counting subscriber has not received all messages within {} s",
                5 * MAX_START.as_secs()
            );
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

/// A login at the broker, which accepts any user name.
pub fn login(port: u16, client_id: &str) -> Login {
    Login {
        host: Ipv4Addr::LOCALHOST.to_string(),
        port,
        client_id: client_id.to_owned(),
        username: client_id.to_owned(),
        password: Bytes::new(),
        addresses: None,
        tls: None,
    }
}

/// A runtime with one thread, because a client has one connection.
pub fn client_runtime() -> std::io::Result<Runtime> {
    runtime::Builder::new_current_thread().enable_all().build()
}

/// Runs a client on a thread of its own.
pub async fn run_client<F: Future<Output = anyhow::Result<()>>>(client: impl FnOnce() -> F + Send + 'static) -> anyhow::Result<()> {
    tokio::task::spawn_blocking(move || client_runtime()?.block_on(client())).await?
}

/// Seconds since 1970.
pub fn now() -> f64 {
    std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default().as_secs_f64()
}
