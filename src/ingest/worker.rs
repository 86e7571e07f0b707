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
use super::metrics::Metrics;
use super::own::{Own, own};
use super::processor::Processor;
use super::replay::wish::carry_out;
use super::session::{End, Session, check};
use crate::api::name::{external_session_client, ingest_username};
use crate::api::topic::TopicPattern;
use crate::configuration::ingest::{ExternalAccess, IngestConfiguration};
use crate::database::health::DatabaseHealth;
use crate::database::uri::ConnectionUri;
use crate::decode::Decoder;
use crate::decode::stream::Stream;
use crate::mqtt::login::{Access, Login};
use crate::runtime::http;
use crate::runtime::readiness::Readiness;
use crate::sink::Sink;
use crate::sink::timescale::statements::Statements;
use crate::sink::timescale::target::Target;
use crate::sink::timescale::writers::TimescaleSink;
use crate::state::assignment::Assigned;
use crate::state::owner::Owner;
use crate::state::registry::follow::{DeviceRegistry, follow};

/// The most memory that messages on their way may hold, in all sessions together, in bytes: two batches being written and one
/// being gathered. What comes meanwhile waits with the broker, which bounds it by the Gateway's own limits. With 3 MiB
/// and batches of 1 MiB a worker takes 2 MiB less, and stores large messages at two thirds of the rate or less (measured).
const BUDGET: usize = 4 * 1024 * 1024;

/// The least that one session is given of it.
const LEAST_BUDGET: usize = 1024 * 1024;

/// The most threads. Each keeps memory of its own: with eight a worker held 41 to 45 MiB where it holds 30 to 32 with two, and was no
/// faster (measured on two processors, of which it takes a fifth at full load).
const MOST_THREADS: usize = 2;

/// Readiness check: the devices are loaded and followed.
const REGISTRY: &str = "registry";

/// Readiness check: it is known which gateways are this worker's.
const ASSIGNMENT: &str = "assignment";

/// How long to wait before a session that was taken over is taken back, where it is assigned to this worker still: two
/// processes that both think so must not spend their time on that.
const TAKE_BACK_AFTER: Duration = Duration::from_secs(5);

/// Arguments of the role `ingest`.
#[derive(Args, Clone, Debug)]
pub struct Arguments {
    /// What to do: the JSON of the Pipeline's ConfigMap
    #[arg(long, value_name = "FILE")]
    config: PathBuf,

    /// File with the connection URI of the database
    #[arg(long, value_name = "FILE")]
    database_uri_file: PathBuf,

    /// File with the password of the worker's MQTT user
    #[arg(long, value_name = "FILE")]
    password_file: PathBuf,

    /// Folder with a folder for each external broker, by the name of its Gateway: the files username, password and perhaps ca.crt
    #[arg(long, default_value = "gateways", value_name = "FOLDER")]
    gateways_folder: PathBuf,

    /// Number of this worker; left out: the one that the pod's name ends with
    #[arg(long, value_name = "N")]
    ordinal: Option<i32>,

    /// Name of the pod, as its StatefulSet gave it
    #[arg(long, env = "POD_NAME", value_name = "NAME")]
    pod_name: Option<String>,

    /// How long a device may be declared after its first message, before that is a dead letter
    #[arg(long, default_value_t = 2, value_name = "SECONDS")]
    device_grace_seconds: u64,

    /// Address of the probes and metrics
    #[arg(long, default_value = "0.0.0.0:9090", value_name = "ADDRESS")]
    http: SocketAddr,
}

impl Arguments {
    fn ordinal(&self) -> anyhow::Result<i32> {
        match (self.ordinal, self.pod_name.as_deref()) {
            (Some(ordinal), _) => Ok(ordinal),
            (None, Some(pod)) => {
                let ordinal = pod.rsplit_once('-').and_then(|(_, ordinal)| ordinal.parse().ok());
                ordinal.with_context(|| {
                    format!("failed to read the number at the end of the pod's name {pod}: expected one like vibration-ingest-0")
                })
            }
            (None, None) => bail!("failed to find the number of this worker: expected --ordinal, or POD_NAME in the environment"),
        }
    }
}

/// How many threads the worker runs on.
#[must_use]
pub fn threads() -> usize {
    std::thread::available_parallelism().map_or(1, |processors| processors.get().min(MOST_THREADS))
}

/// Runs until `shutdown` is cancelled.
///
/// # Errors
/// When the configuration cannot be read, or the address of the probes cannot be bound.
pub async fn run(arguments: Arguments, shutdown: CancellationToken) -> anyhow::Result<()> {
    let configuration: IngestConfiguration = serde_json::from_str(&read(&arguments.config)?)
        .with_context(|| format!("failed to understand {}: expected the JSON of a Pipeline's workers", arguments.config.display()))?;
    let uri: ConnectionUri = read(&arguments.database_uri_file)?
        .parse()
        .with_context(|| format!("failed to understand {}", arguments.database_uri_file.display()))?;
    // One line, as an editor may have left it; a password holds no control characters.
    let password = Bytes::from(read(&arguments.password_file)?.trim_end_matches(['\r', '\n']).to_owned());
    let ordinal = arguments.ordinal()?;
    let login = Login::own(ingest_username(&configuration.pipeline), password);

    let metrics = prometheus::Registry::new();
    let readiness = Readiness::awaiting([REGISTRY, ASSIGNMENT]);
    let registry = Arc::new(DeviceRegistry::new(Duration::from_secs(arguments.device_grace_seconds)));
    let logins = Logins { own: login, folder: arguments.gateways_folder };
    let worker = Worker::new(configuration, uri, ordinal, logins, registry, Metrics::register(&metrics)?, readiness.clone())?;

    let endpoint = tokio::spawn(http::serve(arguments.http, readiness, metrics, CancellationToken::new()));
    tokio::select! {
        // Ends only when it cannot be bound.
        ended = endpoint => ended?.with_context(|| format!("failed to serve probes and metrics on {}", arguments.http)),
        () = worker.run(shutdown) => Ok(()),
    }
}

fn read(file: &Path) -> anyhow::Result<String> {
    std::fs::read_to_string(file).with_context(|| format!("failed to read {}", file.display()))
}

/// Whom to log in as.
struct Logins {
    own: Login,
    folder: PathBuf,
}

impl Logins {
    fn of(&self, own: &Own<'_>) -> Access {
        match own.gateway.external.clone() {
            Some(external) => {
                let client_id = external_session_client(&external.client_id, own.number);
                Access::Files { folder: self.folder.join(&own.gateway.name), external: ExternalAccess { client_id, ..external } }
            }
            None => Access::Own(self.own.clone()),
        }
    }
}

/// The parts, before they start.
struct Worker {
    owner: Owner,
    configuration: IngestConfiguration,
    uri: ConnectionUri,
    ordinal: i32,
    logins: Logins,
    registry: Arc<DeviceRegistry>,
    metrics: Metrics,
    readiness: Readiness,
    topic: Arc<TopicPattern>,
    decoder: Arc<Decoder>,
}

impl Worker {
    fn new(
        configuration: IngestConfiguration,
        uri: ConnectionUri,
        ordinal: i32,
        logins: Logins,
        registry: Arc<DeviceRegistry>,
        metrics: Metrics,
        readiness: Readiness,
    ) -> anyhow::Result<Self> {
        let topic = Arc::new(TopicPattern::compile(&configuration.topic, configuration.decode.format)?);
        let descriptor = configuration.descriptor.as_deref().map(|text| BASE64_STANDARD.decode(text)).transpose()?;
        let decoder = Arc::new(Decoder::compile(&configuration.decode, descriptor.as_deref())?);
        let owner = Owner { namespace: configuration.namespace.clone(), pipeline: configuration.pipeline.clone() };
        Ok(Self { owner, configuration, uri, ordinal, logins, registry, metrics, readiness, topic, decoder })
    }

    async fn run(self, shutdown: CancellationToken) {
        let configuration = &self.configuration;
        info!(namespace = configuration.namespace, pipeline = configuration.pipeline, ordinal = self.ordinal, "starting");
        let registry = &self.registry;
        let mut helpers = JoinSet::new();
        helpers.spawn(follow(registry.clone(), self.uri.clone(), configuration.namespace.clone(), shutdown.clone()));
        helpers.spawn(report(registry.clone(), self.readiness.clone()));

        let target = Arc::new(Target {
            namespace: configuration.namespace.clone(),
            pipeline: configuration.pipeline.clone(),
            statements: Statements::new(&configuration.table, self.topic.tags(), &configuration.decode.fields),
            dead_letter_bytes_per_hour: configuration.dead_letter_bytes_per_hour,
        });
        let (up, retries) = (self.metrics.database_up.clone(), self.metrics.database_retries.clone());
        let health = Arc::new(DatabaseHealth::new(self.readiness.clone(), assignment::CONNECTIONS, up, retries));
        let sink = Sink::Timescale(TimescaleSink::start(&target, &self.uri, &health));
        let (teller, assigned) = watch::channel(None);
        helpers.spawn(assignment::follow(self.uri.clone(), self.owner.clone(), teller, health.clone(), shutdown.clone()));
        if self.ordinal == 0
            && let Some(wish) = configuration.replay.clone()
        {
            helpers.spawn(carry_out(configuration.clone(), self.uri.clone(), wish, shutdown.clone()));
        }
        self.run_sessions(assigned, &sink, &shutdown).await;
        info!("stopped");
    }

    /// Runs the sessions that are this worker's. One that becomes another's goes on until that one takes it over, so that nobody misses
    /// what comes meanwhile.
    async fn run_sessions(&self, mut assigned: watch::Receiver<Option<Assigned>>, sink: &Sink, shutdown: &CancellationToken) {
        let mut sessions = JoinSet::new();
        let mut running = HashSet::new();
        let mut lost = HashSet::new();
        // Those that have ended and that the database was not asked for again.
        let mut left = HashSet::new();
        loop {
            let own = match assigned.borrow_and_update().as_ref() {
                Some(assigned) => own(&self.configuration.gateways, assigned, self.ordinal),
                None => Vec::new(),
            };
            left.retain(|name| own.iter().any(|session| session.leaves && session.name == *name));
            for session in own.iter().filter(|session| !left.contains(&session.name)) {
                if running.insert(session.name.clone()) {
                    let wait = if lost.remove(&session.name) { TAKE_BACK_AFTER } else { Duration::ZERO };
                    let (name, session) = (session.name.clone(), self.session(session, own.len(), sink.clone(), shutdown.clone()));
                    let shutdown = shutdown.clone();
                    sessions.spawn(async move {
                        tokio::select! {
                            () = shutdown.cancelled() => return (name, End::Stopped),
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
                Some(Ok((session, end @ (End::Lost | End::Left)))) = sessions.join_next() => {
                    self.readiness.remove(&check(&session));
                    running.remove(&session);
                    if end == End::Lost {
                        info!(session, "another worker reads the gateway now");
                        lost.insert(session);
                    } else {
                        left.insert(session);
                    }
                }
            }
        }
        while sessions.join_next().await.is_some() {}
    }

    fn session(&self, own: &Own<'_>, of: usize, sink: Sink, shutdown: CancellationToken) -> Session {
        // One that leaves says nothing of whether this worker does its work.
        let readiness = if own.leaves { Readiness::default() } else { self.readiness.clone() };
        readiness.fails(&check(&own.name), "starting");
        let stream = Stream::new(self.topic.clone(), self.decoder.clone());
        // One that leaves has shared.
        let shares = own.leaves || own.gateway.sessions() > 1;
        Session {
            access: self.logins.of(own),
            name: format!("{}{}", self.owner.sessions(), own.name),
            check: check(&own.name),
            filter: (!own.leaves).then(|| own.gateway.subscription(self.topic.filter())),
            processor: Processor { gateway: own.gateway.name.clone(), stream: if shares { stream.sharing(own.number) } else { stream } },
            registry: self.registry.clone(),
            sink,
            uri: self.uri.clone(),
            budget: (BUDGET / of.max(1)).max(LEAST_BUDGET),
            readiness,
            metrics: self.metrics.session(&own.name),
            shutdown,
            gateway: own.gateway.clone(),
        }
    }
}

/// Keeps the readiness check of the registry.
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
