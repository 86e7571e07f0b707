//! The role `operator`: the control plane. One reconciler for each kind, one lease that gates all writes, and one module that writes.

pub mod context;
pub mod device;
pub mod gateway;
pub mod kubernetes;
pub mod pipeline;
pub mod presence;
pub mod startup;
pub mod twin_sync;

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context as _, bail};
use clap::Args;
use k8s_controller::LeaderElection;
use kube::{Client, Config};
use tokio::sync::{broadcast, mpsc};
use tokio::task::JoinSet;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use crate::runtime::address::AddressPolicy;
use crate::runtime::backoff::Backoff;
use crate::runtime::error::chain;
use crate::runtime::network::Network;
use crate::runtime::readiness::Readiness;
use crate::runtime::{http, telemetry};
use context::{Context, Images};
use device::driver::{Driver, Subscribers};
use gateway::GatewayRequests;
use kubernetes::namespaces::WatchedNamespaces;
use pipeline::registry::Devices;
use pipeline::retention::Retention;
use presence::PresenceController;
use twin_sync::TwinSync;

/// Timeout of a single read of a response; long enough for a watch's bookmarks (one a minute).
const READ_TIMEOUT: Duration = Duration::from_secs(295);

/// The delay after the first failed attempt to reach the API server at the start; it doubles up to [`MAX_REACH_DELAY`].
const INITIAL_REACH_DELAY: Duration = Duration::from_millis(500);

/// The longest delay between such attempts.
const MAX_REACH_DELAY: Duration = Duration::from_secs(10);

/// Timeout of such an attempt.
const REACH_TIMEOUT: Duration = Duration::from_secs(15);

/// Check that holds once all Devices have been listed.
const DEVICES_CHECK: &str = "devices";

/// Changes of Devices that a registry may lag behind before it restarts from a full list.
const REGISTRY_BACKLOG: usize = 16_384;

/// Check that holds once this instance has the lease or waits for it: a stand-by is ready to take over.
const LEASE_CHECK: &str = "lease";

/// Arguments of the role `operator`.
#[derive(Args, Clone, Debug)]
pub struct Arguments {
    /// Image of this binary, for agents and workers
    #[arg(long, env = "FLEETWRIGHT_IMAGE")]
    image: String,

    /// Image of the broker
    #[arg(long, env = "FLEETWRIGHT_MOSQUITTO_IMAGE")]
    mosquitto_image: String,

    /// imagePullPolicy of agents, workers and brokers
    #[arg(long, env = "FLEETWRIGHT_IMAGE_PULL_POLICY")]
    image_pull_policy: Option<String>,

    /// Namespace of the operator itself, where its lease is
    #[arg(long, env = "POD_NAMESPACE", default_value = "fleetwright-system")]
    namespace: String,

    /// Namespaces to watch, separated by commas (default: all). Each must exist, and the operator needs its permissions in each: it is not ready
    /// before it has listed the objects of all
    #[arg(long, env = "FLEETWRIGHT_WATCH_NAMESPACES", value_delimiter = ',')]
    watch_namespaces: Vec<String>,

    /// Name of this instance in the lease and in events
    #[arg(long, env = "POD_NAME", default_value = "fleetwright")]
    instance: String,

    /// Maximum of concurrent calls to the API server for Devices
    #[arg(long, env = "FLEETWRIGHT_DEVICE_CONCURRENCY", default_value_t = 32)]
    device_concurrency: usize,

    /// Maximum writes per second of the connection state of all Devices together
    #[arg(long, env = "FLEETWRIGHT_PRESENCE_WRITES_PER_SECOND", default_value_t = presence::DEFAULT_WRITES_PER_SECOND, value_parser = positive)]
    presence_writes_per_second: f64,

    /// Maximum writes per second of the reported state of all Devices together
    #[arg(long, env = "FLEETWRIGHT_REPORT_WRITES_PER_SECOND", default_value_t = twin_sync::reports::DEFAULT_WRITES_PER_SECOND, value_parser = positive)]
    report_writes_per_second: f64,

    /// Networks (CIDR) and IP addresses, separated by commas, that Gateways and Pipelines may name although the operator refuses them by
    /// default: loopback, link-local, multicast and the API server
    #[arg(long, env = "FLEETWRIGHT_ALLOW_ADDRESSES", value_delimiter = ',')]
    allow_addresses: Vec<Network>,

    /// Address of the endpoint for probes and metrics
    #[arg(long, env = "FLEETWRIGHT_HTTP", default_value = "0.0.0.0:9090")]
    http: SocketAddr,
}

/// Runs until `shutdown` is cancelled, or the lease is lost.
///
/// # Errors
/// If the API server is not configured, or the lease is lost: the process ends, so that no work outlives the lease.
pub async fn run(arguments: Arguments, shutdown: CancellationToken) -> anyhow::Result<()> {
    let mut config = Config::infer().await.context("failed to find the API server: neither in a pod nor with a kubeconfig")?;
    config.read_timeout = Some(READ_TIMEOUT);
    let client = Client::try_from(config)?;
    let images = Images {
        fleetwright: arguments.image.clone(),
        mosquitto: arguments.mosquitto_image.clone(),
        pull_policy: arguments.image_pull_policy.clone().filter(|policy| !policy.is_empty()),
    };
    let metrics = telemetry::metrics()?;
    let context = Context::new(client.clone(), images, arguments.namespace.clone(), arguments.instance.clone(), metrics.clone())?;
    let readiness = Readiness::awaiting([LEASE_CHECK]);
    let endpoint = tokio::spawn(http::serve(arguments.http, readiness.clone(), metrics, shutdown.clone()));

    tokio::select! {
        () = reach(&client) => {}
        () = shutdown.cancelled() => {
            info!("stopped");
            endpoint.await.context("the endpoint ended")??;
            return Ok(());
        }
    }
    readiness.holds(LEASE_CHECK);
    let election = LeaderElection::new(client, &arguments.namespace, "fleetwright-operator", &arguments.instance);
    let outcome = tokio::select! {
        outcome = election.with_lease(reconcile(context, &arguments, readiness)) => outcome,
        () = shutdown.cancelled() => {
            election.release().await;
            info!("stopped");
            endpoint.await.context("the endpoint ended")??;
            return Ok(());
        }
    };
    match outcome {
        Some(result) => result,
        None => bail!("the lease is lost: ending, so that only its holder writes"),
    }
}

/// Waits for the API server, which may start after the operator when a node boots. The process is alive but not ready meanwhile.
async fn reach(client: &Client) {
    let mut backoff = Backoff::new(INITIAL_REACH_DELAY, MAX_REACH_DELAY);
    loop {
        let error = match timeout(REACH_TIMEOUT, client.apiserver_version()).await {
            Ok(Ok(_)) => return,
            Ok(Err(error)) => chain(&error),
            Err(_) => format!("no answer in {} s", REACH_TIMEOUT.as_secs()),
        };
        warn!(error, "failed to reach the API server, retrying");
        backoff.wait().await;
    }
}

/// A number above zero.
fn positive(text: &str) -> Result<f64, String> {
    let number: f64 = text.parse().map_err(|_| format!("expected a number, found {text:?}"))?;
    if number.is_finite() && number > 0.0 { Ok(number) } else { Err(format!("expected a number above 0, found {text}")) }
}

/// Runs all reconcilers until one of them ends, which is an error.
async fn reconcile(mut context: Context, arguments: &Arguments, readiness: Readiness) -> anyhow::Result<()> {
    info!("holding the lease: reconciling");
    readiness.fails(DEVICES_CHECK, "listing");
    let report = |failure: &str| readiness.fails(DEVICES_CHECK, failure);
    let started = startup::start(&context.writer("fleetwright/operator"), &context.namespace, report).await;
    context.cluster = started.cluster.into();
    context.watched = WatchedNamespaces::new(context.client.clone(), &arguments.watch_namespaces);
    context.addresses = AddressPolicy::new(&arguments.allow_addresses, &started.api_server);
    context.fleet.lock().set_digest_key(started.digest_key);
    let (totals, totals_of_gateways) = mpsc::unbounded_channel();
    let (request, requests) = mpsc::unbounded_channel();
    let registry = broadcast::Sender::new(REGISTRY_BACKLOG);
    let (desired, desired_changes) = mpsc::unbounded_channel();
    let listed = CancellationToken::new();
    let devices = Devices { fleet: context.fleet.clone(), changes: registry.clone(), listed: listed.clone() };
    let presence = PresenceController::new(context.clone(), arguments.presence_writes_per_second, totals.clone())?;
    let links = TwinSync::new(context.clone(), desired_changes, arguments.report_writes_per_second, presence.updates(), request)?;
    let driver = Driver::new(context.clone(), arguments.device_concurrency, Subscribers { totals, registry, desired })?;
    let retention = Retention::new(&context.metrics, context.addresses.clone())?;
    let listed_sender = listed.clone();
    let all_listed = move || {
        readiness.holds(DEVICES_CHECK);
        listed_sender.cancel();
    };
    // Each reconciler is a separate task: while one reads lists of thousands of objects, the others and the renewal of the lease continue.
    // The tasks end with the set.
    let mut reconcilers = JoinSet::new();
    reconcilers.spawn(driver.run(all_listed));
    reconcilers.spawn(presence.run(listed.clone()));
    reconcilers.spawn(links.run(listed));
    reconcilers.spawn(gateway::run(context.clone(), GatewayRequests { totals: totals_of_gateways, reconcile: requests }));
    reconcilers.spawn(pipeline::run(context, devices, retention));
    match reconcilers.join_next().await {
        Some(Err(error)) => Err(error).context("a reconciler ended unexpectedly"),
        Some(Ok(())) | None => bail!("a reconciler ended unexpectedly"),
    }
}
