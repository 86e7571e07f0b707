//! Has dead letters deleted that are older than their Pipeline keeps them, in every database in use.

use std::sync::Arc;
use std::time::Duration;

use futures::future::join_all;
use prometheus::core::{AtomicU64, GenericCounter};
use prometheus::{IntCounterVec, Opts, Registry};
use tokio::sync::Notify;
use tokio::time::{sleep, timeout};
use tracing::{info, warn};

use super::database::Databases;
use crate::database::connect::{ConnectError, connect, drive};
use crate::database::uri::ConnectionUri;
use crate::runtime::error::chain;
use crate::state::dead_letter_retention::{Swept, sweep};

/// How often is looked: a dead letter is this much older at most. A look that finds nothing is a few reads of indexes.
const INTERVAL: Duration = Duration::from_mins(10);

/// How long after the start is looked first: an operator that restarts often must not put it off for ever.
const FIRST_AFTER: Duration = Duration::from_mins(1);

/// How long a sweep may take. A million dead letters take a minute or two; what is left is done the next time.
const PATIENCE: Duration = Duration::from_mins(5);

/// How long after a change of a retention is waited for others, such as those of a whole folder.
const GATHERING: Duration = Duration::from_secs(2);

#[derive(Debug, thiserror::Error)]
enum SweepError {
    #[error(transparent)]
    Connect(#[from] ConnectError),
    #[error("failed to delete dead letters that are older than their Pipeline keeps them")]
    Delete(#[from] tokio_postgres::Error),
    #[error("failed to delete all dead letters that are older than their Pipeline keeps them within {} s", PATIENCE.as_secs())]
    Await,
}

/// Deletes what is too old.
#[derive(Clone)]
pub struct Retention {
    changed: Arc<Notify>,
    deleted: GenericCounter<AtomicU64>,
    dropped: GenericCounter<AtomicU64>,
    sweeps: IntCounterVec,
}

impl Retention {
    /// Nothing is deleted before [`Self::run`].
    ///
    /// # Errors
    /// When the registry refuses a metric.
    pub fn new(metrics: &Registry) -> Result<Self, prometheus::Error> {
        let deleted = GenericCounter::new("fleetwright_dead_letters_expired_total", "Dead letters that were deleted for their age.")?;
        let dropped =
            GenericCounter::new("fleetwright_dead_letter_chunks_dropped_total", "Chunks of dead letters that were dropped for their age.")?;
        let sweeps = Opts::new("fleetwright_dead_letter_sweeps_total", "Looks for dead letters that are too old, by outcome.");
        let sweeps = IntCounterVec::new(sweeps, &["outcome"])?;
        metrics.register(Box::new(deleted.clone()))?;
        metrics.register(Box::new(dropped.clone()))?;
        metrics.register(Box::new(sweeps.clone()))?;
        Ok(Self { changed: Arc::default(), deleted, dropped, sweeps })
    }

    /// A retention has changed: what is too old by now goes at once.
    pub fn changed(&self) {
        self.changed.notify_one();
    }

    /// Deletes until dropped. What is too old is known by its age alone, so that a restart forgets nothing.
    pub async fn run(&self, databases: &Databases) {
        let mut wait = FIRST_AFTER;
        loop {
            tokio::select! {
                () = sleep(wait) => {}
                () = self.changed.notified() => sleep(GATHERING).await,
            }
            wait = INTERVAL;
            join_all(databases.uris().iter().map(|uri| self.sweep(uri))).await;
        }
    }

    /// Deletes what is too old in one database.
    pub async fn sweep(&self, uri: &ConnectionUri) {
        let outcome = timeout(PATIENCE, sweep_once(uri)).await.unwrap_or(Err(SweepError::Await));
        match outcome {
            Ok(swept) => {
                self.sweeps.with_label_values(&["swept"]).inc();
                self.note(&swept);
            }
            Err(failure) => {
                self.sweeps.with_label_values(&["failed"]).inc();
                warn!(
                    database = uri.address(),
                    failure = chain(&failure),
                    "dead letters that are too old are still there: trying again later"
                );
            }
        }
    }

    fn note(&self, swept: &Swept) {
        self.dropped.inc_by(swept.chunks);
        if swept.chunks > 0 {
            info!(chunks = swept.chunks, "dropped chunks of dead letters that nobody keeps any more");
        }
        for (owner, count) in &swept.deleted {
            self.deleted.inc_by(*count);
            info!(namespace = owner.namespace, pipeline = owner.pipeline, count, "deleted dead letters that are older than they are kept");
        }
    }
}

/// By a connection of its own: the operator's other work does not wait for it.
async fn sweep_once(uri: &ConnectionUri) -> Result<Swept, SweepError> {
    let (client, connection) = connect(uri, "fleetwright operator retention").await?;
    drive(connection);
    Ok(sweep(&client).await?)
}
