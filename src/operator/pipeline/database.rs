//! The databases of the Pipelines: one connection each, kept, and a registry that follows the Devices.

use std::collections::HashMap;
use std::ops::Deref;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::{Instant, timeout};
use tokio_postgres::{Client, Error};
use tokio_util::task::AbortOnDropHandle;

use super::registry::{Devices, keep};
use crate::api::condition::Cause;
use crate::api::reason::Reason;
use crate::database::connect::{ConnectError, connect, drive};
use crate::database::uri::ConnectionUri;
use crate::runtime::error::chain;
use crate::state::owner::Owner;

/// Pause after the first failed attempt to connect; it doubles up to [`LONGEST_PAUSE`].
const FIRST_PAUSE: Duration = Duration::from_millis(500);

/// The longest pause between attempts to connect: how late a database that is back may be noticed.
const LONGEST_PAUSE: Duration = Duration::from_secs(5);

/// How long the database may take for a few rows; it takes milliseconds.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);

/// How far the registry of a database is.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum RegistryState {
    /// Not written yet.
    Waiting,
    /// It holds all Devices of the namespace.
    Filled,
    /// It could not be written.
    Failed(Cause),
}

/// One database as one namespace uses it.
pub struct Database {
    connection: Arc<Connection>,
    /// Fills the registry, until nobody uses this database any more.
    _keeper: AbortOnDropHandle<()>,
}

/// What the reconciler and the keeper of the registry share.
pub struct Connection {
    uri: ConnectionUri,
    session: tokio::sync::Mutex<Session>,
    /// Raised whenever the registry has to be filled as a whole; 0 until its table is there.
    wanted_fill: watch::Sender<u64>,
    registry: watch::Sender<RegistryState>,
}

struct Session {
    client: Option<Client>,
    /// How often a connection was made.
    number: u64,
    /// Number of the connection for which the registry was last asked to be filled.
    filled: u64,
    failures: u32,
    last_failure: Option<(Instant, Cause)>,
}

/// The connection of a database, for one user at a time.
pub struct SessionGuard<'a>(tokio::sync::MutexGuard<'a, Session>);

impl Database {
    fn new(namespace: &str, uri: ConnectionUri, devices: Devices) -> Self {
        let session = Session { client: None, number: 0, filled: 0, failures: 0, last_failure: None };
        let connection = Arc::new(Connection {
            uri,
            session: tokio::sync::Mutex::new(session),
            wanted_fill: watch::Sender::new(0),
            registry: watch::Sender::new(RegistryState::Waiting),
        });
        let keeper = tokio::spawn(keep(Arc::clone(&connection), namespace.to_owned(), devices));
        Self { connection, _keeper: AbortOnDropHandle::new(keeper) }
    }
}

impl Deref for Database {
    type Target = Connection;

    fn deref(&self) -> &Connection {
        &self.connection
    }
}

impl Connection {
    /// Where it leads to.
    #[must_use]
    pub fn uri(&self) -> &ConnectionUri {
        &self.uri
    }

    /// The connection, made where there is none.
    ///
    /// # Errors
    /// Why there is none; soon after a failure that of then, without another attempt.
    pub async fn session(&self) -> Result<SessionGuard<'_>, Cause> {
        let mut session = self.session.lock().await;
        if session.client.as_ref().is_some_and(|client| !client.is_closed()) {
            return Ok(SessionGuard(session));
        }
        if let Some((until, cause)) = &session.last_failure
            && Instant::now() < *until
        {
            return Err(cause.clone());
        }
        match connect(&self.uri, "fleetwright operator").await {
            Ok((client, connection)) => {
                drive(connection);
                *session =
                    Session { client: Some(client), number: session.number + 1, filled: session.filled, failures: 0, last_failure: None };
                Ok(SessionGuard(session))
            }
            Err(error) => {
                let cause = unreachable(&error);
                session.client = None;
                session.last_failure = Some((Instant::now() + pause(session.failures), cause.clone()));
                session.failures += 1;
                Err(cause)
            }
        }
    }

    /// Has the database answer something small. A connection on which that takes longer than [`ANSWER_TIMEOUT`] is given up.
    ///
    /// # Errors
    /// Why there is no connection, that it does not answer, or what `refused` makes of a refusal.
    pub async fn ask<T>(
        &self,
        question: impl AsyncFnOnce(&mut Client) -> Result<T, Error>,
        refused: impl FnOnce(Error) -> Cause,
    ) -> Result<T, Cause> {
        let mut session = self.session().await?;
        match timeout(ANSWER_TIMEOUT, question(session.client()?)).await {
            Ok(answer) => answer.map_err(refused),
            Err(_) => {
                session.discard();
                Err(Cause::new(Reason::DatabaseUnavailable, "the database does not answer"))
            }
        }
    }

    /// Whether the registry has been filled, waiting up to `patience` for a first attempt to end.
    pub async fn registry(&self, patience: Duration) -> RegistryState {
        let mut state = self.registry.subscribe();
        let settled = timeout(patience, state.wait_for(|state| *state != RegistryState::Waiting)).await;
        settled.ok().and_then(Result::ok).map_or(RegistryState::Waiting, |state| state.clone())
    }

    /// Says how far the registry is.
    pub fn set_registry(&self, state: RegistryState) {
        self.registry.send_replace(state);
    }

    /// Changes whenever the registry has to be filled as a whole.
    #[must_use]
    pub fn wanted_fill(&self) -> watch::Receiver<u64> {
        self.wanted_fill.subscribe()
    }

    /// The system tables have been seen on this connection: the registry is filled once a connection, since what is behind it may
    /// be another server or an older copy, and again where its table was `created` only now.
    pub fn system_seen(&self, session: &mut SessionGuard<'_>, created: bool) {
        if created || session.0.filled != session.0.number {
            session.0.filled = session.0.number;
            self.wanted_fill.send_modify(|number| *number += 1);
        }
    }
}

impl SessionGuard<'_> {
    /// Gives up the connection, which does not answer: the next user makes another.
    pub fn discard(mut self) {
        self.0.client = None;
    }

    /// The client.
    ///
    /// # Errors
    /// Never while the guard is as [`Connection::session`] made it.
    pub fn client(&mut self) -> Result<&mut Client, Cause> {
        self.0.client.as_mut().ok_or_else(|| Cause::new(Reason::DatabaseUnavailable, "the connection to the database was closed"))
    }
}

/// Why there is no connection, and what that means.
fn unreachable(error: &ConnectError) -> Cause {
    let mut message = chain(error);
    if error.reason() == Reason::DatabaseUnavailable {
        message.push_str("; the brokers keep what arrives until the database answers: start it, or correct the URI in the Secret");
    }
    Cause::new(error.reason(), message)
}

/// A growing pause with jitter, so that many do not come back at once.
fn pause(failures: u32) -> Duration {
    let longest = FIRST_PAUSE.saturating_mul(2_u32.saturating_pow(failures.min(16))).min(LONGEST_PAUSE);
    longest.mul_f64(0.5 + rand::random::<f64>() / 2.0)
}

/// The databases in use, by Pipeline.
#[derive(Clone)]
pub struct Databases {
    users: Arc<Mutex<HashMap<Owner, Arc<Database>>>>,
    devices: Devices,
}

impl Databases {
    /// None yet. Their registries will follow `devices`.
    #[must_use]
    pub fn new(devices: Devices) -> Self {
        Self { users: Arc::default(), devices }
    }

    /// The database of this URI for this Pipeline, which no longer uses any other.
    #[must_use]
    pub fn obtain(&self, owner: &Owner, uri: &ConnectionUri) -> Arc<Database> {
        let mut users = self.lock();
        let same = |(user, database): (&Owner, &Arc<Database>)| {
            (user.namespace == owner.namespace && database.uri == *uri).then(|| Arc::clone(database))
        };
        let found = users.iter().find_map(same);
        let database = found.unwrap_or_else(|| Arc::new(Database::new(&owner.namespace, uri.clone(), self.devices.clone())));
        users.insert(owner.clone(), Arc::clone(&database));
        database
    }

    /// The database that this Pipeline last used.
    #[must_use]
    pub fn last(&self, owner: &Owner) -> Option<Arc<Database>> {
        self.lock().get(owner).cloned()
    }

    /// Where the databases in use are, each once.
    #[must_use]
    pub fn uris(&self) -> Vec<ConnectionUri> {
        let mut uris: Vec<ConnectionUri> = Vec::new();
        for database in self.lock().values() {
            if !uris.contains(&database.uri) {
                uris.push(database.uri.clone());
            }
        }
        uris
    }

    /// The Pipeline uses no database any more.
    pub fn release(&self, owner: &Owner) {
        self.lock().remove(owner);
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<Owner, Arc<Database>>> {
        // Every update is one insertion or removal, so that a panic elsewhere leaves the map whole.
        self.users.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
