//! The connection to one database, which is reopened after a failure.

use std::time::Duration;

use tokio::sync::watch;
use tokio::time::{Instant, timeout};
use tokio_postgres::{Client, Error};

use crate::api::condition::Cause;
use crate::api::reason::Reason;
use crate::database::connect::{ConnectError, connect_as_operator, drive};
use crate::database::uri::ConnectionUri;
use crate::runtime::address::AddressPolicy;
use crate::runtime::backoff::Backoff;
use crate::runtime::error::chain;
use crate::state::owner::ClusterNamespace;

/// The delay after the first failed attempt to connect; it doubles up to [`MAX_RECONNECT_DELAY`].
const INITIAL_RECONNECT_DELAY: Duration = Duration::from_millis(500);

/// The longest delay between attempts to connect, and so the longest time until the operator notices that a database is back.
const MAX_RECONNECT_DELAY: Duration = Duration::from_secs(5);

/// Timeout for a query of a few rows, which takes milliseconds.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);

/// The state of a database's registry.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum RegistryState {
    /// Not written yet.
    Waiting,
    /// The registry contains all Devices of the namespace.
    Filled,
    /// A write has failed.
    Failed(Cause),
}

/// The connection that the reconciler and the task of the registry share.
pub struct DatabaseConnection {
    uri: ConnectionUri,
    namespace: ClusterNamespace,
    addresses: AddressPolicy,
    since: Instant,
    session: tokio::sync::Mutex<DatabaseSession>,
    /// Incremented whenever the registry has to be filled completely; 0 until its table exists.
    wanted_fill: watch::Sender<u64>,
    registry: watch::Sender<RegistryState>,
}

struct DatabaseSession {
    client: Option<Client>,
    /// Number of connections that were opened.
    number: u64,
    /// Number of the connection for which filling the registry was last requested.
    filled: u64,
    backoff: Backoff,
    last_failure: Option<(Instant, Cause)>,
}

/// The connection of a database, for one user at a time.
pub struct SessionGuard<'a>(tokio::sync::MutexGuard<'a, DatabaseSession>);

impl DatabaseConnection {
    /// A state without a connection.
    #[must_use]
    pub fn new(uri: ConnectionUri, namespace: ClusterNamespace, addresses: AddressPolicy) -> Self {
        let session = DatabaseSession { client: None, number: 0, filled: 0, backoff: reconnect_backoff(), last_failure: None };
        Self {
            uri,
            namespace,
            addresses,
            since: Instant::now(),
            session: tokio::sync::Mutex::new(session),
            wanted_fill: watch::Sender::new(0),
            registry: watch::Sender::new(RegistryState::Waiting),
        }
    }

    /// The namespace that uses the database.
    #[must_use]
    pub fn namespace(&self) -> &ClusterNamespace {
        &self.namespace
    }

    /// The connection URI.
    #[must_use]
    pub fn uri(&self) -> &ConnectionUri {
        &self.uri
    }

    /// The connection. It is opened if there is none.
    ///
    /// # Errors
    /// The cause why no connection can be opened. Until the delay after a failure has passed, returns that failure without an attempt.
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
        match connect_as_operator(&self.uri, "fleetwright operator", &self.addresses).await {
            Ok((client, connection)) => {
                drive(connection);
                (session.client, session.last_failure) = (Some(client), None);
                session.number += 1;
                session.backoff.reset();
                Ok(SessionGuard(session))
            }
            Err(error) => {
                let cause = unreachable(&error);
                session.client = None;
                session.last_failure = Some((Instant::now() + session.backoff.next_delay(), cause.clone()));
                Err(cause)
            }
        }
    }

    /// Runs a small query. If the answer takes longer than [`ANSWER_TIMEOUT`], the connection is closed.
    ///
    /// # Errors
    /// The cause of a failed connection, a timeout, or the result of `refused` for an error of the database.
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

    /// Time since the first Pipeline used this database.
    #[must_use]
    pub fn age(&self) -> Duration {
        self.since.elapsed()
    }

    /// The state of the registry.
    #[must_use]
    pub fn registry(&self) -> RegistryState {
        self.registry.borrow().clone()
    }

    /// Sets the state of the registry.
    pub fn set_registry(&self, state: RegistryState) {
        self.registry.send_replace(state);
    }

    /// Changes whenever the registry has to be filled completely.
    #[must_use]
    pub fn wanted_fill(&self) -> watch::Receiver<u64> {
        self.wanted_fill.subscribe()
    }

    /// Records that the system tables were read on this connection. The registry is filled once for each connection, because the server
    /// may be another one or a restored backup, and again if its table was `created` now.
    pub fn system_seen(&self, session: &mut SessionGuard<'_>, created: bool) {
        if created || session.0.filled != session.0.number {
            session.0.filled = session.0.number;
            self.wanted_fill.send_modify(|number| *number += 1);
        }
    }
}

impl SessionGuard<'_> {
    /// Closes a connection that does not answer. The next user opens another one.
    pub fn discard(mut self) {
        self.0.client = None;
    }

    /// The client.
    ///
    /// # Errors
    /// Never for a guard from [`DatabaseConnection::session`].
    pub fn client(&mut self) -> Result<&mut Client, Cause> {
        self.0.client.as_mut().ok_or_else(|| Cause::new(Reason::DatabaseUnavailable, "the connection to the database was closed"))
    }
}

/// The cause of a failed connection, with its consequence.
fn unreachable(error: &ConnectError) -> Cause {
    let mut message = chain(error);
    if error.reason() == Reason::DatabaseUnavailable {
        message.push_str("; the brokers queue messages until the database answers: start it, or correct the URI in the Secret");
    }
    Cause::new(error.reason(), message)
}

const fn reconnect_backoff() -> Backoff {
    Backoff::new(INITIAL_RECONNECT_DELAY, MAX_RECONNECT_DELAY)
}
