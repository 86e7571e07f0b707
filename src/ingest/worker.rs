//! Reads the worker's configuration, and starts its parts.

use std::collections::HashSet;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, bail};
use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use bytes::Bytes;
use clap::Args;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;
use tracing::info;

use super::assignment;
use super::broker_login::BrokerLogin;
use super::database_files::read_connection;
use super::metrics::WorkerMetrics;
use super::owned_sessions::{OwnedSession, owned_sessions};
use super::processor::Processor;
use super::replay::request;
use super::session::{IngestSession, SessionEnd, check};
use crate::api::name::ingest_username;
use crate::api::topic::TopicPattern;
use crate::configuration::ingest::IngestConfiguration;
use crate::database::health::DatabaseHealth;
use crate::database::uri::ConnectionUri;
use crate::decode::Decoder;
use crate::decode::sparkplug::MAX_BIRTH_BYTES;
use crate::decode::stream::Stream;
use crate::runtime::http;
use crate::runtime::readiness::Readiness;
use crate::sink::Sink;
use crate::sink::batch::RowOptions;
use crate::sink::timescale::statements::Statements;
use crate::sink::timescale::target::Target;
use crate::sink::timescale::writers::TimescaleSink;
use crate::state::assignment::Assigned;
use crate::state::owner::Owner;
use crate::state::registry::follow::{DeviceRegistry, follow};

/// The maximum memory of the in-flight messages of all sessions, in bytes: two batches that are written and one that is filled. The
/// broker queues further messages within the limits of the Gateway. With 3 MiB and batches of 1 MiB a worker takes 2 MiB less, and
/// stores large messages at two thirds of the rate or less (measured).
const MAX_IN_FLIGHT_BYTES: usize = 4 * 1024 * 1024;

/// The minimum share of a session in [`MAX_IN_FLIGHT_BYTES`], in bytes.
const MIN_SESSION_BYTES: usize = 1024 * 1024;

/// The maximum number of threads. Each thread has its own memory pool: with eight threads a worker held 41 to 45 MiB instead of 30 to 32,
/// and was not faster (measured on two CPUs, of which it takes a fifth at full load).
const MAX_THREADS: usize = 2;

/// Readiness check: the devices are loaded.
const REGISTRY: &str = "registry";

/// Readiness check: the assigned gateways are known.
const ASSIGNMENT: &str = "assignment";

/// How long to wait before this worker claims a session again that another worker has claimed. It limits the rate if two processes are
/// assigned the same session.
const RECLAIM_AFTER: Duration = Duration::from_secs(5);

/// Arguments of the role `ingest`.
#[derive(Args, Clone, Debug)]
pub struct Arguments {
    /// JSON configuration from the ConfigMap of the Pipeline
    #[arg(long, value_name = "FILE")]
    config: PathBuf,

    /// File with the connection URI of the database; the file ca.crt in its folder, if any, has the authorities that verify the server
    #[arg(long, value_name = "FILE")]
    database_uri_file: PathBuf,

    /// File with the password of the worker's MQTT user
    #[arg(long, value_name = "FILE")]
    password_file: PathBuf,

    /// Folder with a subfolder for each Gateway: the file ca.crt, and for an external broker username and password
    #[arg(long, default_value = "gateways", value_name = "FOLDER")]
    gateways_folder: PathBuf,

    /// Ordinal of this worker (default: the number at the end of the pod name)
    #[arg(long, value_name = "N")]
    ordinal: Option<i32>,

    /// Name of the pod in its StatefulSet
    #[arg(long, env = "POD_NAME", value_name = "NAME")]
    pod_name: Option<String>,

    /// How long a message of an unknown device waits for its Device, before it becomes a dead letter
    #[arg(long, default_value_t = 2, value_name = "SECONDS")]
    device_grace_seconds: u64,

    /// Address of the endpoint for probes and metrics
    #[arg(long, default_value = "0.0.0.0:9090", value_name = "ADDRESS")]
    http: SocketAddr,
}

impl Arguments {
    fn ordinal(&self) -> anyhow::Result<i32> {
        match (self.ordinal, self.pod_name.as_deref()) {
            (Some(ordinal), _) => Ok(ordinal),
            (None, Some(pod)) => {
                let ordinal = pod.rsplit_once('-').and_then(|(_, ordinal)| ordinal.parse().ok());
                ordinal.with_context(|| format!("failed to read the ordinal of the pod {pod}: expected a name such as vibration-ingest-0"))
            }
            (None, None) => {
                bail!("failed to determine the ordinal of this worker: expected --ordinal or the environment variable POD_NAME")
            }
        }
    }
}

/// The number of threads of the worker.
#[must_use]
pub fn threads() -> usize {
    std::thread::available_parallelism().map_or(1, |processors| processors.get().min(MAX_THREADS))
}

/// Runs until `shutdown` is cancelled.
///
/// # Errors
/// If the configuration cannot be read, or the address of the probes cannot be bound.
pub async fn run(arguments: Arguments, shutdown: CancellationToken) -> anyhow::Result<()> {
    let configuration: IngestConfiguration = serde_json::from_str(&read(&arguments.config)?)
        .with_context(|| format!("failed to parse {}: expected the JSON of a Pipeline's workers", arguments.config.display()))?;
    let uri = read_connection(&arguments.database_uri_file)?;
    // An editor may append a line break. A password contains no control characters.
    let password = Bytes::from(read(&arguments.password_file)?.trim_end_matches(['\r', '\n']).to_owned());
    let ordinal = arguments.ordinal()?;

    let metrics = prometheus::Registry::new();
    let readiness = Readiness::awaiting([REGISTRY, ASSIGNMENT]);
    let registry = Arc::new(DeviceRegistry::new(Duration::from_secs(arguments.device_grace_seconds)));
    let logins = Logins { username: ingest_username(&configuration.pipeline), password, folder: arguments.gateways_folder };
    let worker = Worker::new(configuration, uri, ordinal, logins, registry, WorkerMetrics::register(&metrics)?, readiness.clone())?;

    let endpoint = tokio::spawn(http::serve(arguments.http, readiness, metrics, CancellationToken::new()));
    tokio::select! {
        // Ends only if the address cannot be bound.
        ended = endpoint => ended?.with_context(|| format!("failed to serve probes and metrics on {}", arguments.http)),
        () = worker.run(shutdown) => Ok(()),
    }
}

fn read(file: &Path) -> anyhow::Result<String> {
    std::fs::read_to_string(file).with_context(|| format!("failed to read {}", file.display()))
}

/// The logins at the brokers.
struct Logins {
    username: String,
    password: Bytes,
    folder: PathBuf,
}

/// The inputs of the worker's tasks.
struct Worker {
    owner: Owner,
    configuration: IngestConfiguration,
    uri: ConnectionUri,
    ordinal: i32,
    logins: Logins,
    registry: Arc<DeviceRegistry>,
    metrics: WorkerMetrics,
    readiness: Readiness,
    topic: Arc<TopicPattern>,
    decoder: Arc<Decoder>,
    rows: RowOptions,
}

impl Worker {
    fn new(
        mut configuration: IngestConfiguration,
        uri: ConnectionUri,
        ordinal: i32,
        logins: Logins,
        registry: Arc<DeviceRegistry>,
        metrics: WorkerMetrics,
        readiness: Readiness,
    ) -> anyhow::Result<Self> {
        configuration.decode = configuration.decode.with_key_first();
        let topic = Arc::new(TopicPattern::compile(&configuration.topic, configuration.decode.format)?);
        let descriptor = configuration.descriptor.as_deref().map(|text| BASE64_STANDARD.decode(text)).transpose()?;
        let decoder = Arc::new(Decoder::compile(&configuration.decode, descriptor.as_deref())?);
        let rows = RowOptions::new(&configuration.decode, &configuration.chunk_interval, configuration.on_conflict)?;
        let owner = configuration.owner();
        Ok(Self { owner, configuration, uri, ordinal, logins, registry, metrics, readiness, topic, decoder, rows })
    }

    async fn run(self, shutdown: CancellationToken) {
        let configuration = &self.configuration;
        info!(namespace = configuration.namespace, pipeline = configuration.pipeline, ordinal = self.ordinal, "starting");
        let registry = &self.registry;
        let mut helpers = JoinSet::new();
        helpers.spawn(follow(registry.clone(), self.uri.clone(), self.owner.cluster_namespace(), shutdown.clone()));
        helpers.spawn(report(registry.clone(), self.readiness.clone()));

        let target = Arc::new(Target {
            owner: self.owner.clone(),
            statements: Statements::new(&configuration.table, self.topic.tags(), &configuration.decode.fields, configuration.on_conflict),
            dead_letter_bytes_per_hour: configuration.dead_letter_bytes_per_hour,
        });
        let (up, retries) = (self.metrics.database_up.clone(), self.metrics.database_retries.clone());
        let health = Arc::new(DatabaseHealth::new(self.readiness.clone(), assignment::CONNECTIONS, up, retries));
        let sink = Sink::Timescale(TimescaleSink::start(&target, &self.uri, &health));
        let (assignment, assigned) = watch::channel(None);
        helpers.spawn(assignment::follow(self.uri.clone(), self.owner.clone(), assignment, health.clone(), shutdown.clone()));
        if self.ordinal == 0
            && let Some(replay) = configuration.replay.clone()
        {
            helpers.spawn(request::execute(configuration.clone(), self.uri.clone(), replay, shutdown.clone()));
        }
        self.run_sessions(assigned, &sink, &shutdown).await;
        info!("stopped");
    }

    /// Runs the sessions of this worker. A session that is assigned to another worker continues until that worker claims it, so that
    /// messages are read without a gap.
    async fn run_sessions(&self, mut assigned: watch::Receiver<Option<Assigned>>, sink: &Sink, shutdown: &CancellationToken) {
        let mut sessions = JoinSet::new();
        let mut running = HashSet::new();
        let mut lost = HashSet::new();
        // Sessions that have ended and are still in the last known assignment.
        let mut drained = HashSet::new();
        loop {
            let owned = match assigned.borrow_and_update().as_ref() {
                Some(assigned) => owned_sessions(&self.configuration.gateways, assigned, self.ordinal),
                None => Vec::new(),
            };
            drained.retain(|name| owned.iter().any(|session| session.drains && session.name == *name));
            for session in owned.iter().filter(|session| !drained.contains(&session.name)) {
                if running.insert(session.name.clone()) {
                    let wait = if lost.remove(&session.name) { RECLAIM_AFTER } else { Duration::ZERO };
                    let (name, session) = (session.name.clone(), self.session(session, owned.len(), sink.clone(), shutdown.clone()));
                    let shutdown = shutdown.clone();
                    sessions.spawn(async move {
                        tokio::select! {
                            () = shutdown.cancelled() => return (name, SessionEnd::Stopped),
                            () = sleep(wait) => {}
                        }
                        (name, session.run().await)
                    });
                }
            }
            if assigned.borrow().is_some() {
                self.readiness.holds(ASSIGNMENT);
            }
            tokio::select! {
                () = shutdown.cancelled() => break,
                Ok(()) = assigned.changed() => {}
                Some(Ok((session, end @ (SessionEnd::Lost | SessionEnd::Drained)))) = sessions.join_next() => {
                    self.readiness.remove(&check(&session));
                    running.remove(&session);
                    if end == SessionEnd::Lost {
                        info!(session, "another worker has claimed the session");
                        lost.insert(session);
                    } else {
                        drained.insert(session);
                    }
                }
            }
        }
        while sessions.join_next().await.is_some() {}
    }

    fn session(&self, owned: &OwnedSession<'_>, sessions: usize, sink: Sink, shutdown: CancellationToken) -> IngestSession {
        // A session that is drained does not affect the readiness of the worker.
        let readiness = if owned.drains { Readiness::default() } else { self.readiness.clone() };
        readiness.fails(&check(&owned.name), "starting");
        let share = MAX_BIRTH_BYTES / sessions.max(1);
        let stream = Stream::new(self.topic.clone(), self.decoder.clone()).with_birth_bytes(share);
        // A session that is drained had a shared subscription.
        let shares = owned.drains || owned.gateway.sessions() > 1;
        let Logins { username, password, folder } = &self.logins;
        IngestSession {
            login: BrokerLogin::new(owned.gateway, owned.number, username, password, folder),
            cluster: self.owner.cluster.clone(),
            name: format!("{}{}", self.owner.sessions(), owned.name),
            check: check(&owned.name),
            filter: (!owned.drains).then(|| owned.gateway.subscription(self.topic.filter())),
            processor: Processor {
                gateway: owned.gateway.name.clone(),
                stream: if shares { stream.sharing(owned.number) } else { stream },
                rows: self.rows,
            },
            registry: self.registry.clone(),
            sink,
            uri: self.uri.clone(),
            max_bytes: (MAX_IN_FLIGHT_BYTES / sessions.max(1)).max(MIN_SESSION_BYTES),
            readiness,
            metrics: self.metrics.session(&owned.name),
            shutdown,
            gateway: owned.gateway.clone(),
        }
    }
}

/// Updates the readiness check of the registry.
async fn report(registry: Arc<DeviceRegistry>, readiness: Readiness) {
    let mut follower = registry.watch();
    loop {
        match follower.borrow_and_update().failure.clone() {
            None => readiness.holds(REGISTRY),
            Some(failure) => readiness.fails(REGISTRY, failure),
        }
        if follower.changed().await.is_err() {
            return;
        }
    }
}
