//! Arguments, telemetry and dispatch to a role; nothing else.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};
use fleetwright::{agent, api, check, ingest, operator, runtime, simulate};
use futures::future::LocalBoxFuture;
use tracing::error;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// A Kubernetes operator for IoT fleets. One binary, one image, and a role for each process.
#[derive(Parser)]
#[command(version, arg_required_else_help = true)]
struct Arguments {
    #[command(subcommand)]
    role: Role,
}

#[derive(Subcommand)]
enum Role {
    /// Reconciles Gateways, Devices and Pipelines
    Operator(operator::Arguments),
    /// Updates the files of a broker and verifies that the broker has read them; runs as a sidecar in the broker's pod
    Agent(agent::Arguments),
    /// Reads the telemetry of a Pipeline from its brokers and writes it into its table
    Ingest(ingest::Arguments),
    /// Decodes a message with a Pipeline and prints the row, without a cluster, broker or database
    #[command(after_help = check::EXAMPLES)]
    Check(check::Arguments),
    /// Decodes the dead letters of a Pipeline again and stores those that are accepted
    Replay(ingest::replay::Arguments),
    /// Simulates a fleet of devices, for demonstrations and load tests
    Simulate(simulate::Arguments),
    /// Prints the CustomResourceDefinitions
    Crds {
        /// Folder for one file per kind (default: standard output)
        #[arg(long)]
        output: Option<PathBuf>,

        /// File for the reference of the resources in Markdown
        #[arg(long)]
        reference: Option<PathBuf>,
    },
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    if let Role::Check(arguments) = &arguments.role {
        return check::run(arguments);
    }
    match run(arguments.role) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            error!("{failure:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(role: Role) -> anyhow::Result<()> {
    if let Role::Crds { output, reference } = role {
        return api::crd::write(output.as_deref(), reference.as_deref());
    }
    runtime::telemetry::start();
    let mut tokio = tokio::runtime::Builder::new_multi_thread();
    if let Role::Ingest(_) = role {
        tokio.worker_threads(ingest::threads());
    }
    // Boxed: tokio's `block_on` is compiled for either kind of runtime, and would be twice with all that a role does in it.
    let work: LocalBoxFuture<'_, anyhow::Result<()>> = Box::pin(async {
        let shutdown = runtime::shutdown::on_signal()?;
        match role {
            Role::Operator(arguments) => Box::pin(operator::run(arguments, shutdown)).await,
            Role::Agent(arguments) => agent::run(arguments, shutdown).await,
            Role::Ingest(arguments) => ingest::run(arguments, shutdown).await,
            Role::Replay(arguments) => Box::pin(ingest::replay::run(arguments, shutdown)).await,
            Role::Simulate(arguments) => simulate::run(arguments, shutdown).await,
            Role::Check(_) | Role::Crds { .. } => Ok(()),
        }
    });
    tokio.enable_all().build()?.block_on(work)
}
