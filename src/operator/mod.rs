//! The role `operator`.

pub mod device;
pub mod gateway;
pub mod pipeline;
use clap::Args;
use tokio_util::sync::CancellationToken;

/// Arguments of the role `operator`.
#[derive(Args, Clone, Debug)]
pub struct Arguments {}

/// Runs until `shutdown` is cancelled.
pub async fn run(_arguments: Arguments, _shutdown: CancellationToken) -> anyhow::Result<()> {
    Ok(())
}
