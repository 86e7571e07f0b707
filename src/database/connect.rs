//! Connects to a database: encrypted as its URI requires, with a limit on every wait.

use std::time::Duration;

use tokio_postgres::error::SqlState;
use tokio_postgres::tls::MakeTlsConnect;
use tokio_postgres::{Client, Socket};
use tokio_postgres_rustls::MakeRustlsConnect;
use tracing::debug;

use super::uri::{ConnectionUri, TlsMode};
use crate::api::reason::Reason;
use crate::runtime::tls::{TlsError, Verification, client_configuration};

/// How long connecting may take, from resolving the name to the end of authentication. Enough for a remote server under load, and short
/// enough that a status soon reports an unavailable one.
pub const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// How long a peer may be silent before the kernel sends keepalives, and how long sent bytes may stay unacknowledged: the time after which
/// a lost machine is detected.
const PEER_TIMEOUT: Duration = Duration::from_secs(15);

/// The other half of a connection: drives the protocol, and yields notifications.
pub type DatabaseConnection = tokio_postgres::Connection<Socket, <MakeRustlsConnect as MakeTlsConnect<Socket>>::Stream>;

/// Why connecting failed.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// No answer in time.
    #[error("failed to connect to {address} within {} s: expected a PostgreSQL server that answers; check the host and any NetworkPolicy", CONNECT_TIMEOUT.as_secs())]
    Await {
        /// Host and port.
        address: String,
    },

    /// The server, the network or TLS refused.
    #[error("failed to connect to {address}")]
    Connect {
        /// Host and port.
        address: String,
        /// What was refused.
        source: tokio_postgres::Error,
    },

    /// The TLS library refused its settings.
    #[error(transparent)]
    SetUpTls(#[from] TlsError),
}

impl ConnectError {
    /// A reason for conditions, events and metrics.
    #[must_use]
    pub fn reason(&self) -> Reason {
        let code = match self {
            Self::Connect { source, .. } => source.code(),
            Self::Await { .. } | Self::SetUpTls(_) => None,
        };
        match code {
            Some(code) if *code == SqlState::INVALID_PASSWORD || *code == SqlState::INVALID_AUTHORIZATION_SPECIFICATION => {
                Reason::LoginRefused
            }
            Some(code) if *code == SqlState::INVALID_CATALOG_NAME => Reason::DatabaseNotFound,
            _ => Reason::DatabaseUnavailable,
        }
    }
}

/// Connects. `application_name` is what `pg_stat_activity` shows, unless the URI names another.
///
/// The caller must poll the [`DatabaseConnection`], by [`drive`] or for notifications by hand.
pub async fn connect(uri: &ConnectionUri, application_name: &str) -> Result<(Client, DatabaseConnection), ConnectError> {
    let mut configuration = uri.configuration().clone();
    if configuration.get_application_name().is_none() {
        configuration.application_name(application_name);
    }
    configuration.connect_timeout(CONNECT_TIMEOUT).keepalives_idle(PEER_TIMEOUT).keepalives_interval(PEER_TIMEOUT / 3);
    configuration.keepalives_retries(3).tcp_user_timeout(PEER_TIMEOUT);
    let tls = MakeRustlsConnect::new(client_configuration(verification(uri.tls()))?);
    match tokio::time::timeout(CONNECT_TIMEOUT, configuration.connect(tls)).await {
        Ok(Ok(connected)) => Ok(connected),
        Ok(Err(source)) => Err(ConnectError::Connect { address: uri.address(), source }),
        Err(_) => Err(ConnectError::Await { address: uri.address() }),
    }
}

/// Drives a connection in the background until its client is dropped or the server goes; the client's next call then fails.
pub fn drive(connection: DatabaseConnection) {
    tokio::spawn(async move {
        if let Err(error) = connection.await {
            debug!(%error, "a database connection ended");
        }
    });
}

fn verification(mode: TlsMode) -> Verification<'static> {
    match mode {
        TlsMode::VerifyFull => Verification::Public,
        // As libpq reads `sslmode`. `disable` never comes to a handshake.
        TlsMode::Disable | TlsMode::Prefer | TlsMode::Require => Verification::Unverified,
    }
}
