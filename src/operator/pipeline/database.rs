//! The databases of the Pipelines: one connection for each namespace and URI, and a task that keeps the device registry current.

use std::collections::HashMap;
use std::ops::Deref;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio_util::task::AbortOnDropHandle;

use super::connection::DatabaseConnection;
use super::observe::owner;
use super::registry::{Devices, keep};
use crate::api::Pipeline;
use crate::database::uri::ConnectionUri;
use crate::runtime::address::AddressPolicy;
use crate::state::owner::{ClusterNamespace, Owner};

/// A database that one namespace uses.
pub struct Database {
    connection: Arc<DatabaseConnection>,
    /// Fills the registry until no Pipeline uses this database.
    _keeper: AbortOnDropHandle<()>,
}

impl Database {
    fn new(namespace: ClusterNamespace, uri: ConnectionUri, devices: Devices, addresses: AddressPolicy) -> Self {
        let connection = Arc::new(DatabaseConnection::new(uri, namespace, addresses));
        let keeper = tokio::spawn(keep(Arc::clone(&connection), devices));
        Self { connection, _keeper: AbortOnDropHandle::new(keeper) }
    }
}

impl Deref for Database {
    type Target = DatabaseConnection;

    fn deref(&self) -> &DatabaseConnection {
        &self.connection
    }
}

/// The databases in use, by Pipeline.
#[derive(Clone)]
pub struct Databases {
    users: Arc<Mutex<HashMap<Owner, Arc<Database>>>>,
    cluster: Arc<str>,
    devices: Devices,
    addresses: AddressPolicy,
}

impl Databases {
    /// An empty set, for the cluster with this identity. The registries follow `devices`.
    #[must_use]
    pub fn new(cluster: Arc<str>, devices: Devices, addresses: AddressPolicy) -> Self {
        Self { users: Arc::default(), cluster, devices, addresses }
    }

    /// Identity of the cluster.
    #[must_use]
    pub fn cluster(&self) -> &str {
        &self.cluster
    }

    /// The Pipeline, as the owner of its rows and of its table.
    #[must_use]
    pub fn owner(&self, pipeline: &Pipeline) -> Owner {
        owner(&self.cluster, pipeline)
    }

    /// The database with this URI for this Pipeline, which stops using any other.
    #[must_use]
    pub fn obtain(&self, owner: &Owner, uri: &ConnectionUri) -> Arc<Database> {
        let mut users = self.lock();
        let same = |(user, database): (&Owner, &Arc<Database>)| {
            (user.namespace == owner.namespace && database.uri() == uri).then(|| Arc::clone(database))
        };
        let found = users.iter().find_map(same);
        let database = found.unwrap_or_else(|| {
            Arc::new(Database::new(owner.cluster_namespace(), uri.clone(), self.devices.clone(), self.addresses.clone()))
        });
        users.insert(owner.clone(), Arc::clone(&database));
        database
    }

    /// The database that this Pipeline last used.
    #[must_use]
    pub fn last(&self, owner: &Owner) -> Option<Arc<Database>> {
        self.lock().get(owner).cloned()
    }

    /// The connections of the databases in use, each once.
    #[must_use]
    pub fn uris(&self) -> Vec<ConnectionUri> {
        let mut uris: Vec<ConnectionUri> = Vec::new();
        for database in self.lock().values() {
            if !uris.contains(database.uri()) {
                uris.push(database.uri().clone());
            }
        }
        uris
    }

    /// Removes the Pipeline from its database.
    pub fn release(&self, owner: &Owner) {
        self.lock().remove(owner);
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<Owner, Arc<Database>>> {
        // Every update is one insertion or removal, so that a panic of another task leaves the map consistent.
        self.users.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
