//! Compares, in one run on a Kubernetes cluster, a large fleet with the floor (the fewest writes that any implementation needs) and
//! with a naive controller.

mod changes;
mod clients;
mod cluster;
mod fleet;
mod floor;
mod naive;
mod operator;
mod report;
mod restart;
mod storm;

use std::collections::BTreeSet;
use std::time::Duration;

use clap::{Parser, Subcommand, ValueEnum};

use self::cluster::Cluster;
use self::fleet::Fleet;
use self::operator::Operator;
use self::report::{heading, row};

/// Namespace of the fleet that Fleetwright operates.
const FLEET: &str = "bench-fleet";

/// Measures a large fleet, the floor and a naive controller. Needs a cluster with Fleetwright installed, KUBECONFIG and
/// AUDIT_LOG; run.sh sets them up.
#[derive(Clone, Debug, Parser)]
struct Arguments {
    #[command(subcommand)]
    role: Option<Role>,

    /// Number of Devices
    #[arg(long, default_value_t = 15_000)]
    devices: usize,

    /// Number of Gateways
    #[arg(long, default_value_t = 12)]
    gateways: usize,

    /// Number of concurrent requests, equal to that of the operator (`deviceConcurrency`)
    #[arg(long, default_value_t = 32)]
    concurrency: usize,

    /// Measurements to run, in this order; default: all
    #[arg(long = "scenario", value_enum)]
    scenarios: Vec<Scenario>,

    /// Number of single changes to measure, one after another
    #[arg(long, default_value_t = 100)]
    changes: usize,

    /// Minutes of churn, in which one percent of the devices is changed per minute
    #[arg(long, default_value_t = 10)]
    churn_minutes: u64,

    /// Keep the fleet for inspection or another run
    #[arg(long)]
    keep: bool,

    /// Continue with the fleet of a run with --keep and the same numbers of Devices and Gateways
    #[arg(long)]
    adopt: bool,
}

/// The role of this process.
#[derive(Clone, Debug, Subcommand)]
enum Role {
    /// The naive controller, which the benchmark starts as a separate process
    #[command(hide = true)]
    Naive {
        /// Namespace of the Devices
        namespace: String,
    },
}

/// A measurement.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd, ValueEnum)]
enum Scenario {
    /// The fewest necessary writes, by a plain client
    Floor,
    /// The same Devices with a naive controller
    Naive,
    /// All Devices at once until the brokers have confirmed each, then writes while idle
    Declare,
    /// Restart of the operator
    Restart,
    /// Single changes among all Devices, until the broker has confirmed each
    Changes,
    /// Changes of one percent of the devices per minute
    Churn,
    /// Revocation while all devices are connected, and how long the reload blocks their broker
    Revoke,
    /// All devices reconnect at once
    Storm,
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let arguments = Arguments::parse();
    if let Some(Role::Naive { namespace }) = &arguments.role {
        return naive::run(namespace).await;
    }
    let scenarios: BTreeSet<Scenario> = match arguments.scenarios.as_slice() {
        [] => Scenario::value_variants().iter().copied().collect(),
        named => named.iter().copied().collect(),
    };
    let cluster = Cluster::connect().await?;
    heading(&format!("{} Devices on {} Gateways, {} calls at once", arguments.devices, arguments.gateways, arguments.concurrency));

    let mut floor_time = None;
    if scenarios.contains(&Scenario::Floor) {
        floor_time = Some(floor::measure(&cluster, &arguments).await?);
    }
    if scenarios.contains(&Scenario::Naive) {
        naive::measure(&cluster, &arguments, floor_time).await?;
    }
    if scenarios.iter().any(|scenario| *scenario > Scenario::Naive) {
        of_fleetwright(&cluster, &arguments, &scenarios, floor_time).await?;
    }
    Ok(())
}

async fn of_fleetwright(
    cluster: &Cluster,
    arguments: &Arguments,
    scenarios: &BTreeSet<Scenario>,
    floor_time: Option<Duration>,
) -> anyhow::Result<()> {
    let operator = Operator::new(cluster);
    let fleet = if arguments.adopt {
        Fleet { cluster, namespace: FLEET }
    } else {
        let fleet = Fleet::prepare(cluster, FLEET, arguments.gateways).await?;
        fleet.measure_declaration(&operator, arguments, floor_time).await?;
        fleet
    };
    if scenarios.contains(&Scenario::Restart) {
        restart::measure(&operator, &fleet).await?;
    }
    if scenarios.contains(&Scenario::Changes) {
        changes::single(&fleet, arguments).await?;
    }
    if scenarios.contains(&Scenario::Churn) {
        changes::churn(&fleet, &operator, arguments).await?;
    }
    if scenarios.contains(&Scenario::Revoke) || scenarios.contains(&Scenario::Storm) {
        let mut clients = clients::Clients::connect_all(&fleet, arguments).await?;
        if scenarios.contains(&Scenario::Revoke) {
            changes::revoke(&fleet, &clients, arguments).await?;
        }
        if scenarios.contains(&Scenario::Storm) {
            storm::measure(&fleet, &operator, &mut clients).await?;
        }
    }
    row("operator: most memory seen", &format!("{:.0} MiB", operator.peak_mebibytes()));
    if !arguments.keep {
        fleet.remove().await?;
    }
    Ok(())
}
