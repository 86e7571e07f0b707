//! A fleet at scale on a real Kubernetes, beside the floor (the fewest writes that any implementation needs) and beside a naive
//! controller, in one run.

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

/// Namespace of the fleet under Fleetwright.
const FLEET: &str = "bench-fleet";

/// Devices at fleet scale, beside the floor and a naive controller. Needs a cluster with Fleetwright installed, KUBECONFIG and
/// AUDIT_LOG; run.sh sees to them.
#[derive(Clone, Debug, Parser)]
struct Arguments {
    #[command(subcommand)]
    role: Option<Role>,

    /// Devices to declare
    #[arg(long, default_value_t = 15_000)]
    devices: usize,

    /// Gateways to spread them over
    #[arg(long, default_value_t = 12)]
    gateways: usize,

    /// Calls at the same time: that of the operator (`deviceConcurrency`)
    #[arg(long, default_value_t = 32)]
    concurrency: usize,

    /// What to measure, in this order; all of them where none is named
    #[arg(long = "scenario", value_enum)]
    scenarios: Vec<Scenario>,

    /// Single changes to measure, one after another
    #[arg(long, default_value_t = 100)]
    changes: usize,

    /// Minutes of churn, with one device of a hundred changed a minute
    #[arg(long, default_value_t = 10)]
    churn_minutes: u64,

    /// Leave the fleet, for a look or for another run
    #[arg(long)]
    keep: bool,

    /// Go on with the fleet that a run with --keep and as many Devices and Gateways left
    #[arg(long)]
    adopt: bool,
}

/// What this process is.
#[derive(Clone, Debug, Subcommand)]
enum Role {
    /// The naive controller, which the benchmark starts as a process of its own
    #[command(hide = true)]
    Naive {
        /// Namespace of the Devices
        namespace: String,
    },
}

/// What is measured.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd, ValueEnum)]
enum Scenario {
    /// The fewest writes that are needed, by a bare client
    Floor,
    /// The same Devices under a naive controller
    Naive,
    /// All Devices at once, until the brokers have proven each; then a second look
    Declare,
    /// Restart of the operator
    Restart,
    /// Single changes among all Devices, until the broker has proven each
    Changes,
    /// One device of a hundred changed a minute
    Churn,
    /// Revocation while all devices are connected, and how long a reload holds their broker
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
