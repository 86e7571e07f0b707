//! The role `agent`: updates the files of a broker, and verifies that the broker has read them.
//!
//! Secrets ([`source`]) -> the wanted content of the broker ([`state`]) -> [`files`] -> one reload ([`process`]) -> a login with a
//! password that only these files have ([`session`]), a handshake with each TLS listener ([`presentation`]) -> the [`report`].
//! [`driver`] runs these steps. In parallel, [`presence`] reports the connected clients to the operator.

pub mod driver;
pub mod files;
pub mod fullness;
pub mod metrics;
pub mod presence;
pub mod presentation;
pub mod process;
pub mod report;
pub mod session;
pub mod source;
pub mod state;

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::Context;
use clap::Args;
use kube::{Client, Config};
use prometheus::Registry;
use rustix::process::{DumpableBehavior, set_dumpable_behavior};
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;
use tracing::warn;

use self::driver::{BROKER_CHECK, BrokerPaths, Driver};
use self::metrics::AgentMetrics;
use self::presence::Presence;
use self::presence::follow::LogFollower;
use self::session::BrokerAddress;
use crate::configuration::agent::{
    AgentConfiguration, CONFIGURATION_FOLDER, DATA_FOLDER, FILE, LOG_FOLDER, MOSQUITTO_FILE, RUNTIME_FOLDER, SECRETS_FOLDER,
};
use crate::runtime::error::chain;
use crate::runtime::http;
use crate::runtime::readiness::Readiness;

/// Capacity of the channel of changes. A full channel slows the watches down, and loses nothing.
const MAX_QUEUED_CHANGES: usize = 128;

/// Arguments of the role `agent`.
#[derive(Args, Clone, Debug)]
pub struct Arguments {
    /// Folder with agent.json and mosquitto.conf
    #[arg(long, default_value = CONFIGURATION_FOLDER)]
    configuration: PathBuf,

    /// Folder where the Secrets are mounted
    #[arg(long, default_value = SECRETS_FOLDER)]
    secrets: PathBuf,

    /// Folder for the files that Mosquitto reads
    #[arg(long, default_value = RUNTIME_FOLDER)]
    runtime: PathBuf,

    /// Folder of the broker's volume
    #[arg(long, default_value = DATA_FOLDER)]
    data: PathBuf,

    /// Folder where Mosquitto writes its log
    #[arg(long, default_value = LOG_FOLDER)]
    log: PathBuf,

    /// Host of the broker
    #[arg(long, default_value = "127.0.0.1")]
    broker_host: String,

    /// Address of the endpoint for probes and metrics; it answers once the files exist
    #[arg(long, env = "FLEETWRIGHT_HTTP", default_value = "0.0.0.0:9090")]
    http: SocketAddr,

    /// Address of the HTTPS endpoint for the operator
    #[arg(long, default_value = "0.0.0.0:9443")]
    https: SocketAddr,
}

/// Runs until `shutdown` is cancelled.
///
/// # Errors
/// If the configuration cannot be read, a file cannot be written, or the endpoint's address is in use.
pub async fn run(arguments: Arguments, shutdown: CancellationToken) -> anyhow::Result<()> {
    // The containers of the pod share a user and a process namespace. Without this the broker could read the agent's token through
    // /proc/<pid>/root; with it that takes the capability CAP_SYS_PTRACE, which no container of the pod has.
    set_dumpable_behavior(DumpableBehavior::NotDumpable).context("failed to make the agent's process not dumpable")?;
    let configuration = read_configuration(&arguments.configuration.join(FILE))?;
    let registry = Registry::new();
    let metrics = Arc::new(AgentMetrics::register(&registry)?);
    let readiness = Readiness::awaiting([BROKER_CHECK]);
    let (changes, incoming) = mpsc::channel(MAX_QUEUED_CHANGES);
    let (verified, verified_receiver) = watch::channel(None);
    let presence = Presence::new();
    let configured = arguments.configuration.join(MOSQUITTO_FILE);
    let presence_metrics = presence::metrics::PresenceMetrics::register(&registry)?;
    tokio::spawn(LogFollower::new(&arguments.log, &configured, presence.clone(), presence_metrics).run(shutdown.clone()));
    let (presented, presentations) = watch::channel(None);
    tokio::spawn(metrics::follow_presented(Arc::clone(&metrics), presentations.clone()));
    let paths = BrokerPaths {
        configuration: configured,
        runtime: arguments.runtime,
        data: arguments.data,
        broker: BrokerAddress { host: arguments.broker_host, port: configuration.internal.port },
    };
    let driver = Driver::new(paths, &configuration, incoming, verified, presented, readiness.clone(), Arc::clone(&metrics))
        .with_presence(presence.clone());
    let (first_written, served) = (driver.first_written(), driver.served());
    let client = client().await;
    if let Some(client) = client.clone() {
        let (reported, fullness) = watch::channel(None);
        tokio::spawn(fullness::settle(metrics.fullness(), reported));
        let inputs =
            report::ReportInputs { verified: verified_receiver, presented: presentations, has_dropped: metrics.has_dropped(), fullness };
        tokio::spawn(report::run(client, configuration.clone(), inputs));
    }
    tokio::spawn(source::run(client, configuration, arguments.secrets, changes));
    let routes = presence::endpoint::router(presence, shutdown.clone());
    let tls = Arc::new(served.server_configuration()?);
    // Mosquitto starts when the startup probe succeeds. The endpoint therefore opens only after its files exist.
    let endpoint = async {
        tokio::select! {
            () = first_written.cancelled() => {}
            () = shutdown.cancelled() => return Ok(()),
        }
        let probes = http::serve(arguments.http, readiness, registry, shutdown.clone());
        let operator = http::serve_encrypted(arguments.https, tls, routes, shutdown.clone());
        tokio::try_join!(probes, operator).map(|_| ()).context("failed to serve the endpoints")
    };
    let drive = async { driver.run(shutdown.clone()).await.context("failed to keep the broker's files") };
    tokio::try_join!(drive, endpoint).map(|_| ())
}

fn read_configuration(path: &Path) -> anyhow::Result<AgentConfiguration> {
    let text = std::fs::read_to_string(path).with_context(|| format!("failed to read {}", path.display()))?;
    serde_json::from_str(&text).with_context(|| format!("failed to parse {}: is it of another version?", path.display()))
}

/// A client of the API server, if it can be configured. Without it the agent reads only the pod's volume.
async fn client() -> Option<Client> {
    let config = Config::infer().await.inspect_err(|error| warn!(error = chain(error), "failed to find the API server")).ok()?;
    Client::try_from(config).inspect_err(|error| warn!(error = chain(error), "failed to create a client of the API server")).ok()
}
