//! Polls for tables that differ from the spec and for dead letters that differ from the status: a database has no watches as the
//! Kubernetes API does.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures::future::join_all;
use kube::runtime::reflector::ObjectRef;
use tokio::sync::mpsc::UnboundedSender;
use tokio::time::{Instant, MissedTickBehavior, interval, timeout};
use tokio_postgres::Client;
use tracing::info;

use super::connection::RegistryState;
use super::database::Database;
use super::dead_letter_status::DeadLetterView;
use crate::api::Pipeline;
use crate::sink::timescale::execute::observe_schema;
use crate::sink::timescale::plan::plan;
use crate::sink::timescale::schema::Desired;
use crate::state::dead_letter;
use crate::state::owner::Owner;

/// Interval between checks of each table: about six small reads, on an existing connection.
const POLL_INTERVAL: Duration = Duration::from_secs(5);

/// Minimum time between two reconciliations of a Pipeline that only a new number of dead letters causes.
const NUMBERS_INTERVAL: Duration = Duration::from_mins(5);

/// A table that matched the spec at its last check.
#[derive(Clone)]
struct Steady {
    database: Arc<Database>,
    desired: Desired,
    /// The dead letters in the status.
    letters: DeadLetterView,
    since: Instant,
}

/// The tables that match their specs.
#[derive(Clone)]
pub struct Drift {
    tables: Arc<Mutex<HashMap<Owner, Steady>>>,
    noticed: UnboundedSender<ObjectRef<Pipeline>>,
}

impl Drift {
    /// A set without tables. The Pipeline of each table that drifts is sent once.
    #[must_use]
    pub fn new(noticed: UnboundedSender<ObjectRef<Pipeline>>) -> Self {
        Self { tables: Arc::default(), noticed }
    }

    /// Adds a table that matches its spec: it is checked from now on.
    pub fn watch(&self, database: Arc<Database>, desired: Desired, letters: DeadLetterView) {
        let steady = Steady { database, desired, letters, since: Instant::now() };
        self.lock().insert(steady.desired.owner.clone(), steady);
    }

    /// Removes the table of this Pipeline.
    pub fn forget(&self, owner: &Owner) {
        self.lock().remove(owner);
    }

    /// Checks the tables until dropped.
    pub async fn run(&self) {
        let mut ticks = interval(POLL_INTERVAL);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            ticks.tick().await;
            let tables: Vec<Steady> = self.lock().values().cloned().collect();
            join_all(tables.iter().map(|table| self.inspect(table))).await;
        }
    }

    async fn inspect(&self, steady: &Steady) {
        if is_steady(steady).await {
            return;
        }
        let owner = &steady.desired.owner;
        info!(
            namespace = owner.namespace,
            pipeline = owner.pipeline,
            table = steady.desired.table.name,
            "a table is no longer as wanted, or its dead letters are no longer as shown"
        );
        self.forget(owner);
        // The receiver lives as long as the reconciler: both end with the lease.
        let _ = self.noticed.send(ObjectRef::new(&owner.pipeline).within(&owner.namespace));
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<Owner, Steady>> {
        // Every update is one insertion or removal, so that a panic elsewhere leaves the map whole.
        self.tables.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Whether the table and the registry are unchanged since the last check. Notifies the registry of a new connection.
async fn is_steady(steady: &Steady) -> bool {
    if steady.database.registry() != RegistryState::Filled {
        return false;
    }
    let Ok(mut session) = steady.database.session().await else { return false };
    let Ok(client) = session.client() else { return false };
    let Ok(observed) = observe_schema(client, &steady.desired.table.name).await else {
        session.discard();
        return false;
    };
    let is_as_wanted = plan(&steady.desired, &observed).is_ok_and(|plan| plan.steps.is_empty());
    let is_as_shown = is_as_wanted && are_letters_as_shown(client, steady).await;
    steady.database.system_seen(&mut session, false);
    is_as_shown
}

async fn are_letters_as_shown(client: &Client, steady: &Steady) -> bool {
    let shown = &steady.letters;
    let token = shown.replay.as_ref().map(|replay| replay.token.as_str());
    let reading = dead_letter::read(client, &steady.desired.owner, token);
    let Ok(Ok(found)) = timeout(POLL_INTERVAL, reading).await else { return false };
    let next = shown.after(token, Some(&found));
    next == *shown || !shown.is_news(&next) && steady.since.elapsed() < NUMBERS_INTERVAL
}
