//! Deletes dead letters that are older than the retention of their Pipeline, in every database in use.

use std::sync::Arc;
use std::time::Duration;

use futures::future::join_all;
use prometheus::core::{AtomicU64, GenericCounter};
use prometheus::{IntCounterVec, Opts, Registry};
use tokio::sync::Notify;
use tokio::time::{sleep, timeout};
use tracing::{info, warn};

use super::database::Databases;
use crate::database::connect::{ConnectError, connect_as_operator, drive};
use crate::database::uri::ConnectionUri;
use crate::runtime::address::AddressPolicy;
use crate::runtime::error::chain;
use crate::state::dead_letter_retention::{Swept, sweep};

/// Interval between sweeps: a dead letter exceeds its retention by at most this. A sweep without expired rows is a few index reads.
const INTERVAL: Duration = Duration::from_mins(10);

/// Delay of the first sweep after the start: short, so that an operator that restarts often still sweeps.
const INITIAL_DELAY: Duration = Duration::from_mins(1);

/// Timeout of a sweep. A million dead letters take a minute or two; the next sweep deletes the rest.
const PATIENCE: Duration = Duration::from_mins(5);

/// Delay after a change of a retention, to collect further changes such as those of one `kubectl apply`.
const GATHERING: Duration = Duration::from_secs(2);

#[derive(Debug, thiserror::Error)]
enum SweepError {
    #[error(transparent)]
    Connect(#[from] ConnectError),
    #[error("failed to delete expired dead letters")]
    Delete(#[from] tokio_postgres::Error),
    #[error("failed to delete all expired dead letters within {} s", PATIENCE.as_secs())]
    Await,
}

/// Deletes expired dead letters.
#[derive(Clone)]
pub struct Retention {
    changed: Arc<Notify>,
    addresses: AddressPolicy,
    deleted: GenericCounter<AtomicU64>,
    dropped: GenericCounter<AtomicU64>,
    sweeps: IntCounterVec,
}

impl Retention {
    /// A sweeper that deletes nothing before [`Self::run`].
    ///
    /// # Errors
    /// If the registry refuses a metric.
    pub fn new(metrics: &Registry, addresses: AddressPolicy) -> Result<Self, prometheus::Error> {
        let deleted =
            GenericCounter::new("fleetwright_dead_letters_expired_total", "Expired dead letters that were deleted individually.")?;
        let dropped = GenericCounter::new(
            "fleetwright_dead_letter_chunks_dropped_total",
            "Dropped chunks of dead letters that no Pipeline retains.",
        )?;
        let sweeps = Opts::new("fleetwright_dead_letter_sweeps_total", "Retention runs, by outcome.");
        let sweeps = IntCounterVec::new(sweeps, &["outcome"])?;
        metrics.register(Box::new(deleted.clone()))?;
        metrics.register(Box::new(dropped.clone()))?;
        metrics.register(Box::new(sweeps.clone()))?;
        Ok(Self { changed: Arc::default(), addresses, deleted, dropped, sweeps })
    }

    /// A retention has changed: starts a sweep at once.
    pub fn changed(&self) {
        self.changed.notify_one();
    }

    /// Sweeps until dropped. Only the age of a dead letter decides, so a restart needs no state.
    pub async fn run(&self, databases: &Databases) {
        let mut wait = INITIAL_DELAY;
        loop {
            tokio::select! {
                () = sleep(wait) => {}
                () = self.changed.notified() => sleep(GATHERING).await,
            }
            wait = INTERVAL;
            join_all(databases.uris().iter().map(|uri| self.sweep(uri))).await;
        }
    }

    /// Deletes expired dead letters in one database.
    pub async fn sweep(&self, uri: &ConnectionUri) {
        let outcome = timeout(PATIENCE, sweep_once(uri, &self.addresses)).await.unwrap_or(Err(SweepError::Await));
        match outcome {
            Ok(swept) => {
                self.sweeps.with_label_values(&["swept"]).inc();
                self.note(&swept);
            }
            Err(failure) => {
                self.sweeps.with_label_values(&["failed"]).inc();
                warn!(database = uri.address(), failure = chain(&failure), "failed to delete expired dead letters: retrying later");
            }
        }
    }

    fn note(&self, swept: &Swept) {
        self.dropped.inc_by(swept.chunks);
        if swept.chunks > 0 {
            info!(chunks = swept.chunks, "dropped chunks of expired dead letters");
        }
        for (owner, count) in &swept.deleted {
            self.deleted.inc_by(*count);
            info!(namespace = owner.namespace, pipeline = owner.pipeline, count, "deleted expired dead letters");
        }
    }
}

/// Uses a separate connection, so that other work of the operator does not wait.
async fn sweep_once(uri: &ConnectionUri, addresses: &AddressPolicy) -> Result<Swept, SweepError> {
    let (client, connection) = connect_as_operator(uri, "fleetwright operator retention", addresses).await?;
    drive(connection);
    Ok(sweep(&client).await?)
}
