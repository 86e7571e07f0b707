//! Executes the replay that a Pipeline requests (`spec.replay`), in its first worker beside its sessions.
//!
//! A token begins once, with the dead letters that exist at that time. The transactions of the replay record its progress. The next
//! worker continues the replay of a killed worker, and a finished token never begins again.

use std::time::{Duration, Instant};

use anyhow::Context;
use tokio::time::{sleep, timeout};
use tokio_postgres::Client;
use tokio_util::sync::CancellationToken;
use tracing::{debug, info, warn};

use super::filter::{Filter, FilterCondition};
use super::{ReplaySource, replayer};
use crate::api::dead_letter::Replay;
use crate::configuration::ingest::IngestConfiguration;
use crate::database::connect::{connect, drive};
use crate::database::uri::ConnectionUri;
use crate::runtime::backoff::Backoff;
use crate::state::owner::Owner;
use crate::state::replay_progress::{ReplayProgress, fail, finish, read, start};

/// The delays before the next attempt.
const INITIAL_RETRY_DELAY: Duration = Duration::from_secs(1);
const MAX_RETRY_DELAY: Duration = Duration::from_secs(30);

/// The maximum pause between two pages. A pause is as long as the page before it, so that at least half of the time of this CPU and of
/// the database remains for new messages.
const MAX_PAUSE: Duration = Duration::from_secs(2);

/// How long it may take to record a failure.
const NOTE_TIMEOUT: Duration = Duration::from_secs(5);

/// Replays the requested dead letters, until that is finished or `shutdown`.
pub async fn execute(configuration: IngestConfiguration, uri: ConnectionUri, request: Replay, shutdown: CancellationToken) {
    let owner = configuration.owner();
    let mut backoff = Backoff::new(INITIAL_RETRY_DELAY, MAX_RETRY_DELAY);
    loop {
        let attempt = tokio::select! {
            () = shutdown.cancelled() => return,
            attempt = attempt(&configuration, &uri, &owner, &request) => attempt,
        };
        let Err(failure) = attempt else { return };
        let failure = format!("{failure:#}");
        warn!(token = request.token, failure, "failed to replay dead letters: retrying");
        // While the database is unavailable, the status of the Pipeline reports that.
        if let Err(error) = record_failure(&uri, &owner, &request.token, &failure).await {
            debug!(token = request.token, error = format!("{error:#}"), "failed to record the failure of a replay");
        }
        if shutdown.run_until_cancelled(backoff.wait()).await.is_none() {
            return;
        }
    }
}

async fn attempt(configuration: &IngestConfiguration, uri: &ConnectionUri, owner: &Owner, request: &Replay) -> anyhow::Result<()> {
    let client = open(uri).await?;
    let before = progress(&client, owner, &request.token).await?;
    if before.is_some_and(|before| before.finished) {
        info!(token = request.token, "this replay is already finished");
        return Ok(());
    }
    let source = ReplaySource::of_configuration(configuration.clone())?;
    let mut replayer = replayer(&source, uri, &Filter::of(request), false).await?;
    replayer.token = Some(request.token.clone());
    if before.is_none() {
        start(&replayer.client, FilterCondition::SQL, replayer.condition.parameters(), &request.token)
            .await
            .context("failed to begin the replay")?;
    }
    info!(token = request.token, "replaying dead letters");
    loop {
        let started = Instant::now();
        let progress =
            progress(&client, owner, &request.token).await?.context("failed to continue the replay: its record has been deleted")?;
        if progress.finished {
            return Ok(());
        }
        let page = replayer.next(progress.done, progress.last).await.context("failed to replay dead letters")?;
        if page.is_none() {
            finish(&client, owner, &request.token).await.context("failed to record the end of the replay")?;
            info!(token = request.token, "finished the replay of dead letters");
            return Ok(());
        }
        sleep(started.elapsed().min(MAX_PAUSE)).await;
    }
}

async fn open(uri: &ConnectionUri) -> anyhow::Result<Client> {
    let (client, connection) = connect(uri, "fleetwright ingest replay").await?;
    drive(connection);
    Ok(client)
}

async fn progress(client: &Client, owner: &Owner, token: &str) -> anyhow::Result<Option<ReplayProgress>> {
    read(client, owner, token).await.context("failed to read the progress of the replay")
}

async fn record_failure(uri: &ConnectionUri, owner: &Owner, token: &str, failure: &str) -> anyhow::Result<()> {
    let client = open(uri).await?;
    Ok(timeout(NOTE_TIMEOUT, fail(&client, owner, token, failure)).await??)
}
