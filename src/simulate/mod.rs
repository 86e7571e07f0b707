//! The role `simulate`: simulates the devices of a namespace, for demonstrations and load tests.
//!
//! Each Device connects with the credential from its Secret, publishes the readings of a machine, and counts the acknowledged
//! readings: all readings of the report must be in the table.

mod access;
mod device;
mod fleet;
mod machine;
mod report;

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, bail};
use clap::Args;
use tokio_util::sync::CancellationToken;
use tracing::info;

use self::access::{DeviceAccess, Route};
use self::fleet::{PublishRate, SimulatedFleet};
use self::report::Tally;

/// Arguments of the role `simulate`.
#[derive(Args, Clone, Debug)]
pub struct Arguments {
    /// Namespace of the Devices
    #[arg(long, short, env = "POD_NAMESPACE", default_value = "default")]
    namespace: String,

    /// Label selector of the Devices to simulate (default: all)
    #[arg(long, short = 'l', default_value = "")]
    selector: String,

    /// Maximum number of devices, in the order of their names
    #[arg(long)]
    devices: Option<usize>,

    /// Messages per second of all devices together
    #[arg(long, default_value_t = 10.0, conflicts_with = "rate_per_device")]
    rate: f64,

    /// Messages per second of each device
    #[arg(long)]
    rate_per_device: Option<f64>,

    /// Readings per message; several readings are a JSON array
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    readings: u32,

    /// Duration in seconds (default: until stopped)
    #[arg(long, value_name = "SECONDS")]
    duration: Option<f64>,

    /// Host to connect to, instead of the Services of the Gateways
    #[arg(long, value_name = "HOST")]
    gateway_host: Option<String>,

    /// Port to connect to (default: that of the first listener without TLS, or of the first listener)
    #[arg(long, value_name = "PORT")]
    gateway_port: Option<u16>,

    /// Accept any certificate of a broker (default: verify it by the ca.crt in its Secret, or by the public authorities)
    #[arg(long)]
    insecure_skip_verify: bool,

    /// File for the JSON report of the acknowledged readings; - for standard output
    #[arg(long, value_name = "FILE")]
    report: Option<PathBuf>,
}

/// Runs until `shutdown` is cancelled, or for the given duration.
///
/// # Errors
/// If an argument is invalid, no cluster is configured, or the report cannot be written.
pub async fn run(arguments: Arguments, shutdown: CancellationToken) -> anyhow::Result<()> {
    let rate = arguments.rate_per_device.map_or(PublishRate::Total(arguments.rate), PublishRate::PerDevice);
    let (PublishRate::Total(number) | PublishRate::PerDevice(number)) = rate;
    if !(number.is_finite() && number > 0.0) {
        bail!("failed to read the rate: expected messages per second above 0, found {number}");
    }
    let client = kube::Client::try_default()
        .await
        .context("failed to configure the Kubernetes client: expected a kubeconfig or the service account of a pod")?;
    let route = Route { host: arguments.gateway_host, port: arguments.gateway_port, verify: !arguments.insecure_skip_verify };
    let tally = Tally::default();
    let access = DeviceAccess::new(client, arguments.namespace, route);
    let fleet = SimulatedFleet::new(access, rate, arguments.readings, arguments.devices, tally.clone());

    let stop = shutdown.child_token();
    if let Some(seconds) = arguments.duration {
        let duration = Duration::try_from_secs_f64(seconds).context("failed to read the duration")?;
        let stop = stop.clone();
        tokio::spawn(async move {
            tokio::time::sleep(duration).await;
            info!("the duration has passed");
            stop.cancel();
        });
    }
    let line = tokio::spawn(tally.clone().show(stop.clone()));
    fleet.run(&arguments.selector, &stop).await;
    stop.cancel();
    line.await?;
    match arguments.report {
        Some(file) => tally.write(&file).with_context(|| format!("failed to write the report to {}", file.display())),
        None => Ok(()),
    }
}
