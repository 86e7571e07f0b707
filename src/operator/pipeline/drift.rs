//! Sees when a table is no longer as wanted. Kubernetes tells of its objects by watches; a database tells nobody.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures::future::join_all;
use kube::runtime::reflector::ObjectRef;
use tokio::sync::mpsc::UnboundedSender;
use tokio::time::{MissedTickBehavior, interval};
use tracing::info;

use super::database::{Database, RegistryState};
use crate::api::Pipeline;
use crate::timescale::execute::look;
use crate::timescale::plan::plan;
use crate::timescale::schema::{Desired, Owner};

/// How often each table is looked at: some four small reads of the catalog, on a connection that is there already.
const LOOK_INTERVAL: Duration = Duration::from_secs(5);

/// A table that was as wanted when it was last looked at.
#[derive(Clone)]
struct Steady {
    database: Arc<Database>,
    desired: Desired,
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
    pub fn watch(&self, database: Arc<Database>, desired: Desired) {
        self.lock().insert(desired.owner.clone(), Steady { database, desired });
    }

    /// The table of this Pipeline is not to be looked at.
    pub fn forget(&self, owner: &Owner) {
        self.lock().remove(owner);
    }

    /// Looks until dropped.
    pub async fn run(&self) {
        let mut ticks = interval(LOOK_INTERVAL);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            ticks.tick().await;
            let tables: Vec<Steady> = self.lock().values().cloned().collect();
            join_all(tables.iter().map(|table| self.look_at(table))).await;
        }
    }

    async fn look_at(&self, steady: &Steady) {
        if is_steady(steady).await {
            return;
        }
        let owner = &steady.desired.owner;
        info!(namespace = owner.namespace, pipeline = owner.pipeline, table = steady.desired.table.name, "a table is no longer as wanted");
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
    if steady.database.registry(Duration::ZERO).await != RegistryState::Filled {
        return false;
    }
    let Ok(mut session) = steady.database.session().await else { return false };
    let Ok(client) = session.client() else { return false };
    match look(client, &steady.desired.table.name).await {
        Ok(observed) => {
            steady.database.system_seen(&mut session, false);
            plan(&steady.desired, &observed).is_ok_and(|plan| plan.steps.is_empty())
        }
        Err(_) => {
            session.discard();
            false
        }
    }
}
