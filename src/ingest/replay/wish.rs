//! The replay that a Pipeline asks for (`spec.replay`), carried out by its first worker beside its other work.
//!
//! Its token is begun once, with the dead letters that there are at that moment, and its progress is part of the transactions that
//! do it: a worker that comes after one that was killed goes on where that was, and a token that is done is never begun again.

use std::time::{Duration, Instant};

use anyhow::Context;
use tokio::time::{sleep, timeout};
use tokio_postgres::Client;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use super::filter::{Condition, Filter};
use super::{Source, replayer};
use crate::api::dead_letter::Replay;
use crate::configuration::ingest::IngestConfiguration;
use crate::database::connect::{connect, drive};
use crate::database::uri::ConnectionUri;
use crate::state::owner::Owner;
use crate::state::replay_progress::{ReplayProgress, fail, finish, read, start};

/// The shortest and the longest wait after a failure; doubled at each.
const BACKOFF: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(30));

/// How long the pause between two pages is at most. It is as long as the page before it took, so that at least half of this
/// processor's and this database's time is left to what arrives now.
const LONGEST_PAUSE: Duration = Duration::from_secs(2);

/// How long it may take to write down why it does not go on.
const NOTE_TIMEOUT: Duration = Duration::from_secs(5);

/// Puts the dead letters through that the wish names, until that is done or `shutdown`.
pub async fn carry_out(configuration: IngestConfiguration, uri: ConnectionUri, wish: Replay, shutdown: CancellationToken) {
    let owner = Owner { namespace: configuration.namespace.clone(), pipeline: configuration.pipeline.clone() };
    let mut wait = BACKOFF.0;
    loop {
        let attempt = tokio::select! {
            () = shutdown.cancelled() => return,
            attempt = attempt(&configuration, &uri, &owner, &wish) => attempt,
        };
        let Err(failure) = attempt else { return };
        let failure = format!("{failure:#}");
        warn!(token = wish.token, failure, "the replay of dead letters does not go on: trying again");
        // Where the database is away, that is what the status tells anyway.
        let _ = note(&uri, &owner, &wish.token, &failure).await;
        tokio::select! {
            () = shutdown.cancelled() => return,
            () = sleep(wait) => {}
        }
        wait = (wait * 2).min(BACKOFF.1);
    }
}

async fn attempt(configuration: &IngestConfiguration, uri: &ConnectionUri, owner: &Owner, wish: &Replay) -> anyhow::Result<()> {
    let client = open(uri).await?;
    let before = progress(&client, owner, &wish.token).await?;
    if before.is_some_and(|before| before.finished) {
        info!(token = wish.token, "this replay was done before");
        return Ok(());
    }
    let source = Source::of_configuration(configuration.clone())?;
    let mut replayer = replayer(&source, uri, &Filter::of(wish), false).await?;
    replayer.token = Some(wish.token.clone());
    if before.is_none() {
        start(&replayer.client, Condition::SQL, replayer.condition.parameters(), &wish.token)
            .await
            .context("failed to begin the replay")?;
    }
    info!(token = wish.token, "putting dead letters through again");
    loop {
        let started = Instant::now();
        let progress = progress(&client, owner, &wish.token).await?.context("failed to go on with the replay: its row is gone")?;
        if progress.finished {
            return Ok(());
        }
        let page = replayer.next(progress.done, progress.last).await.context("failed to put dead letters through again")?;
        if page.is_none() {
            finish(&client, owner, &wish.token).await.context("failed to write down that the replay is done")?;
            info!(token = wish.token, "the dead letters are put through again");
            return Ok(());
        }
        sleep(started.elapsed().min(LONGEST_PAUSE)).await;
    }
}

async fn open(uri: &ConnectionUri) -> anyhow::Result<Client> {
    let (client, connection) = connect(uri, "fleetwright ingest replay").await?;
    drive(connection);
    Ok(client)
}

async fn progress(client: &Client, owner: &Owner, token: &str) -> anyhow::Result<Option<ReplayProgress>> {
    read(client, owner, token).await.context("failed to read how far the replay is")
}

async fn note(uri: &ConnectionUri, owner: &Owner, token: &str, failure: &str) -> anyhow::Result<()> {
    let client = open(uri).await?;
    Ok(timeout(NOTE_TIMEOUT, fail(&client, owner, token, failure)).await??)
}
