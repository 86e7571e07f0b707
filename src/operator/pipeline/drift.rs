//! Sees when a table is no longer as wanted, or a Pipeline's dead letters no longer as shown. Kubernetes tells of its objects by watches; a database tells nobody.

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

/// How often each table is looked at: some six small reads, on a connection that is there already.
const POLL_INTERVAL: Duration = Duration::from_secs(5);

/// How long after the last look at a Pipeline another number of dead letters alone is no reason for the next one.
const NUMBERS_INTERVAL: Duration = Duration::from_mins(5);

/// A table that was as wanted when it was last looked at.
#[derive(Clone)]
struct Steady {
    database: Arc<Database>,
    desired: Desired,
    /// What the status shows of dead letters.
    letters: DeadLetterView,
    since: Instant,
}

/// The tables that are as wanted.
#[derive(Clone)]
pub struct Drift {
    tables: Arc<Mutex<HashMap<Owner, Steady>>>,
    noticed: UnboundedSender<ObjectRef<Pipeline>>,
}

impl Drift {
    /// No tables yet. The Pipeline of each one that drifts is sent once.
    #[must_use]
    pub fn new(noticed: UnboundedSender<ObjectRef<Pipeline>>) -> Self {
        Self { tables: Arc::default(), noticed }
    }

    /// The table is as wanted: from now on it is looked at.
    pub fn watch(&self, database: Arc<Database>, desired: Desired, letters: DeadLetterView) {
        let steady = Steady { database, desired, letters, since: Instant::now() };
        self.lock().insert(steady.desired.owner.clone(), steady);
    }

    /// The table of this Pipeline is not to be looked at.
    pub fn forget(&self, owner: &Owner) {
        self.lock().remove(owner);
    }

    /// Looks until dropped.
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

/// Whether the table and the registry are as they were found last. A new connection is told to the registry.
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
