//! The role `ingest`.

pub mod batch;
pub mod dead_letter;
pub mod decode;
pub mod ledger;
pub mod mqtt;
pub mod topic;

use clap::Args;
use tokio_util::sync::CancellationToken;

/// Arguments of the role `ingest`.
#[derive(Args, Clone, Debug)]
pub struct Arguments {}

/// Runs until `shutdown` is cancelled.
pub async fn run(_arguments: Arguments, _shutdown: CancellationToken) -> anyhow::Result<()> {
    Ok(())
}
