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
    /// Keeps the files of a broker current and proves that the broker has read them; runs beside it in its pod
    Agent(agent::Arguments),
    /// Takes the telemetry of a Pipeline from its brokers into its table
    Ingest(ingest::Arguments),
    /// Prints what a Pipeline makes of a message, with no cluster, broker or database
    #[command(after_help = check::EXAMPLES)]
    Check(check::Arguments),
    /// Puts dead letters through the decoder of their Pipeline again
    Replay(ingest::replay::Arguments),
    /// Plays a fleet of devices, for demonstrations and load
    Simulate(simulate::Arguments),
    /// Prints the CustomResourceDefinitions
    Crds {
        /// Folder to write a file a kind into; standard output without it
        #[arg(long)]
        output: Option<PathBuf>,

        /// File to write the reference of the resources into, as Markdown
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
            Role::Replay(arguments) => ingest::replay::run(arguments, shutdown).await,
            Role::Simulate(arguments) => simulate::run(arguments, shutdown).await,
            Role::Check(_) | Role::Crds { .. } => Ok(()),
        }
    });
    tokio.enable_all().build()?.block_on(work)
}
