//! The role `simulate`: plays a fleet of devices, for demonstrations and load.
//!
//! Each Device of the namespace connects with the credential from its Secret, publishes the readings of a machine, and
//! counts what the broker acknowledged: what is in the report must be in the table.

mod connection;
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

use self::fleet::{Access, Fleet, Rate, Route};
use self::report::Tally;

/// Arguments of the role `simulate`.
#[derive(Args, Clone, Debug)]
pub struct Arguments {
    /// Namespace of the Devices
    #[arg(long, short, env = "POD_NAMESPACE", default_value = "default")]
    namespace: String,

    /// Devices to play, by their labels; left out, all of the namespace
    #[arg(long, short = 'l', default_value = "")]
    selector: String,

    /// The most devices to play, the first by name
    #[arg(long)]
    devices: Option<usize>,

    /// Messages a second of all devices together
    #[arg(long, default_value_t = 10.0, conflicts_with = "rate_per_device")]
    rate: f64,

    /// Messages a second of each device
    #[arg(long)]
    rate_per_device: Option<f64>,

    /// Readings in a message; more than one are an array
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    readings: u32,

    /// How long to play, in seconds; left out, until stopped
    #[arg(long, value_name = "SECONDS")]
    duration: Option<f64>,

    /// Host to connect to instead of the Gateways' Services
    #[arg(long, value_name = "HOST")]
    gateway_host: Option<String>,

    /// Port to connect to; left out, that of the first listener of the Gateway without TLS, or of its first one
    #[arg(long, value_name = "PORT")]
    gateway_port: Option<u16>,

    /// Take any certificate of a broker; otherwise it is verified by the ca.crt in its Secret, or by the public authorities
    #[arg(long)]
    insecure_skip_verify: bool,

    /// File to write at the end what was acknowledged, as JSON; - for standard output
    #[arg(long, value_name = "FILE")]
    report: Option<PathBuf>,
}

/// Runs until `shutdown` is cancelled, or for as long as was asked for.
///
/// # Errors
/// When an argument makes no sense, there is no cluster to talk to, or the report cannot be written.
pub async fn run(arguments: Arguments, shutdown: CancellationToken) -> anyhow::Result<()> {
    let rate = arguments.rate_per_device.map_or(Rate::Total(arguments.rate), Rate::PerDevice);
    let (Rate::Total(number) | Rate::PerDevice(number)) = rate;
    if !(number.is_finite() && number > 0.0) {
        bail!("failed to read the rate: expected messages a second above 0, found {number}");
    }
    let client =
        kube::Client::try_default().await.context("failed to find the cluster: expected a kubeconfig, or a pod's service account")?;
    let route = Route { host: arguments.gateway_host, port: arguments.gateway_port, verify: !arguments.insecure_skip_verify };
    let tally = Tally::default();
    let access = Access::new(client, arguments.namespace, route);
    let fleet = Fleet::new(access, rate, arguments.readings, arguments.devices, tally.clone());

    let stop = shutdown.child_token();
    if let Some(seconds) = arguments.duration {
        let duration = Duration::try_from_secs_f64(seconds).context("failed to read the duration")?;
        let stop = stop.clone();
        tokio::spawn(async move {
            tokio::time::sleep(duration).await;
            info!("the time is over");
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
