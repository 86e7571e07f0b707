//! Reads the worker's configuration, and starts its parts.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, bail};
use bytes::Bytes;
use clap::Args;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tracing::info;

use super::decode::Decoder;
use super::decode::time::Time;
use super::intake::Intake;
use super::metrics::Metrics;
use super::mqtt::connection::Login;
use super::session::{Session, check};
use super::sink::health::Health;
use super::sink::statements::Statements;
use super::sink::{Sink, Target, WRITERS};
use super::topic::TopicPattern;
use crate::api::name::ingest_username;
use crate::configuration::ingest::{IngestConfiguration, IngestGateway};
use crate::registry::follow::{Registry, follow};
use crate::runtime::http;
use crate::runtime::readiness::Readiness;
use crate::timescale::uri::ConnectionUri;

/// The most memory that messages on their way may hold, in all sessions together, in bytes. Two batches being written and
/// one being gathered need 6 MiB; the rest bridges the pauses of a database.
const BUDGET: usize = 12 * 1024 * 1024;

/// The least that one session is given of it.
const LEAST_BUDGET: usize = 1024 * 1024;

/// Readiness check: the devices are loaded and followed.
const REGISTRY: &str = "registry";

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

    /// Number of this worker; left out: the one that the pod's name ends with
    #[arg(long, value_name = "N")]
    ordinal: Option<i32>,

    /// Name of the pod, as its StatefulSet gave it
    #[arg(long, env = "POD_NAME", value_name = "NAME")]
    pod_name: Option<String>,

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
    let login = Login { username: ingest_username(&configuration.pipeline, ordinal), password };

    let metrics = prometheus::Registry::new();
    let gateways = configuration.gateways.iter().map(|gateway| check(&gateway.name)).collect::<Vec<_>>();
    let readiness = Readiness::awaiting(gateways.iter().map(String::as_str).chain([REGISTRY]));
    let worker = Worker::new(configuration, uri, ordinal, login, Metrics::register(&metrics)?, readiness.clone())?;

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

/// The parts, before they start.
struct Worker {
    configuration: IngestConfiguration,
    uri: ConnectionUri,
    ordinal: i32,
    login: Login,
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
        login: Login,
        metrics: Metrics,
        readiness: Readiness,
    ) -> anyhow::Result<Self> {
        let topic = Arc::new(TopicPattern::compile(&configuration.topic)?);
        let decoder = Arc::new(Decoder::compile(&configuration.decode)?);
        Ok(Self { configuration, uri, ordinal, login, metrics, readiness, topic, decoder })
    }

    async fn run(self, shutdown: CancellationToken) {
        let configuration = &self.configuration;
        info!(namespace = configuration.namespace, pipeline = configuration.pipeline, ordinal = self.ordinal, "starting");
        let registry = Arc::new(Registry::default());
        let mut helpers = JoinSet::new();
        helpers.spawn(follow(registry.clone(), self.uri.clone(), configuration.namespace.clone(), shutdown.clone()));
        helpers.spawn(report(registry.clone(), self.readiness.clone()));

        let target = Arc::new(Target {
            namespace: configuration.namespace.clone(),
            pipeline: configuration.pipeline.clone(),
            statements: Statements::new(&configuration.table, self.topic.tags(), &configuration.decode.fields),
        });
        let health = Arc::new(Health::new(self.readiness.clone(), WRITERS));
        let sink = Sink::start(&target, &self.uri, &health, &self.metrics, &shutdown);
        let mut sessions = JoinSet::new();
        for gateway in &configuration.gateways {
            sessions.spawn(self.session(gateway.clone(), registry.clone(), sink.clone(), shutdown.clone()).run());
        }
        shutdown.cancelled().await;
        while sessions.join_next().await.is_some() {}
        info!("stopped");
    }

    fn session(&self, gateway: IngestGateway, registry: Arc<Registry>, sink: Sink, shutdown: CancellationToken) -> Session {
        let configuration = &self.configuration;
        Session {
            login: self.login.clone(),
            name: format!("{}/{}/{}/{}", configuration.namespace, configuration.pipeline, self.ordinal, gateway.name),
            intake: Intake {
                gateway: gateway.name.clone(),
                topic: self.topic.clone(),
                decoder: self.decoder.clone(),
                last_arrival: Time::default(),
            },
            registry,
            sink,
            uri: self.uri.clone(),
            budget: (BUDGET / configuration.gateways.len().max(1)).max(LEAST_BUDGET),
            readiness: self.readiness.clone(),
            metrics: self.metrics.session(&gateway.name),
            shutdown,
            gateway,
        }
    }
}

/// Keeps the readiness check of the registry.
async fn report(registry: Arc<Registry>, readiness: Readiness) {
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
