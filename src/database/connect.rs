//! Connects to a database: encrypted as its URI requires, with a limit on every wait.

use std::error::Error;
use std::io;
use std::time::Duration;

use tokio_postgres::config::{Host, SslMode, SslNegotiation};
use tokio_postgres::error::SqlState;
use tokio_postgres::{Client, Config, Socket};
use tokio_postgres_rustls::MakeRustlsConnect;
use tracing::debug;

use super::read_limits::ReadLimits;
use super::transport::{DatabaseStream, Transport};
use super::uri::{ConnectionUri, DEFAULT_PORT, TlsMode};
use crate::api::reason::Reason;
use crate::runtime::address::{AddressError, AddressPolicy};
use crate::runtime::tls::{TlsError, Verification, client_configuration};

/// How long connecting may take, from resolving the name to the end of authentication. Enough for a remote server under load, and short
/// enough that a status soon reports an unavailable one.
pub const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// How long a peer may be silent before the kernel sends keepalives, and how long sent bytes may stay unacknowledged: the time after which
/// a lost machine is detected.
const PEER_TIMEOUT: Duration = Duration::from_secs(15);

/// The other half of a connection: drives the protocol, and yields notifications.
pub type DatabaseConnection = tokio_postgres::Connection<Socket, DatabaseStream>;

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

    /// The certificate of the server is not that of the named server.
    #[error(
        "failed to verify the server at {address}: expected a certificate for this name from an authority in the key ca.crt of the Secret, or \
         from a public authority if there is no such key; sslmode=require in the URI encrypts without verification"
    )]
    Verify {
        /// Host and port.
        address: String,
        /// What was refused.
        source: tokio_postgres::Error,
    },

    /// The policy refuses the address, or there is none.
    #[error(transparent)]
    Resolve(#[from] AddressError),

    /// Hosts and addresses do not correspond.
    #[error(
        "failed to read the hosts in the URI: expected one address in hostaddr for each host, found {hosts} hosts and {addresses} addresses"
    )]
    MatchHosts {
        /// The number of hosts.
        hosts: usize,
        /// The number of addresses.
        addresses: usize,
    },

    /// The operator has no database in its pod.
    #[error("failed to connect to a Unix socket: expected a host name or an IP address in the URI")]
    UseSocketFile,

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
            Self::Resolve(AddressError::Forbid { .. }) => return Reason::AddressNotAllowed,
            Self::MatchHosts { .. } | Self::UseSocketFile => return Reason::InvalidConnectionUri,
            Self::Await { .. } | Self::Verify { .. } | Self::Resolve(_) | Self::SetUpTls(_) => None,
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

/// Connects as a worker or a command-line tool, to any address. `application_name` is what `pg_stat_activity` shows, unless the URI names
/// another.
///
/// The caller must poll the [`DatabaseConnection`], by [`drive`] or for notifications by hand.
pub async fn connect(uri: &ConnectionUri, application_name: &str) -> Result<(Client, DatabaseConnection), ConnectError> {
    within_timeout(uri, open(uri.configuration().clone(), uri, application_name, ReadLimits::WORKER)).await
}

/// Connects as the operator, which all tenants share: only to addresses that the policy allows, and with low limits on what the server
/// sends.
pub async fn connect_as_operator(
    uri: &ConnectionUri,
    application_name: &str,
    addresses: &AddressPolicy,
) -> Result<(Client, DatabaseConnection), ConnectError> {
    within_timeout(uri, async {
        let configuration = resolved(uri.configuration(), addresses).await?;
        open(configuration, uri, application_name, ReadLimits::OPERATOR).await
    })
    .await
}

async fn within_timeout<T>(uri: &ConnectionUri, connecting: impl Future<Output = Result<T, ConnectError>>) -> Result<T, ConnectError> {
    let timeout = tokio::time::timeout(CONNECT_TIMEOUT, connecting).await;
    timeout.unwrap_or_else(|_| Err(ConnectError::Await { address: uri.address() }))
}

async fn open(
    mut configuration: Config,
    uri: &ConnectionUri,
    application_name: &str,
    limits: ReadLimits,
) -> Result<(Client, DatabaseConnection), ConnectError> {
    if configuration.get_application_name().is_none() {
        configuration.application_name(application_name);
    }
    configuration.connect_timeout(CONNECT_TIMEOUT).keepalives_idle(PEER_TIMEOUT).keepalives_interval(PEER_TIMEOUT / 3);
    configuration.keepalives_retries(3).tcp_user_timeout(PEER_TIMEOUT);
    let direct = configuration.get_ssl_negotiation() == SslNegotiation::Direct;
    // The transport requests TLS, or does not.
    configuration.ssl_mode(SslMode::Require).ssl_negotiation(SslNegotiation::Direct);
    let tls = MakeRustlsConnect::new(client_configuration(verification(uri))?);
    let transport = Transport { tls, mode: uri.tls(), direct, limits };
    let failed = |source| {
        let address = uri.address();
        if is_unverified(&source) { ConnectError::Verify { address, source } } else { ConnectError::Connect { address, source } }
    };
    configuration.connect(transport).await.map_err(failed)
}

/// Whether the certificate of the server was refused. The library wraps the error of the TLS library in an I/O error.
fn is_unverified(error: &tokio_postgres::Error) -> bool {
    let mut next = error.source();
    while let Some(error) = next {
        let inner = error.downcast_ref::<io::Error>().and_then(io::Error::get_ref);
        let tls = inner.and_then(|inner| inner.downcast_ref::<rustls::Error>()).or_else(|| error.downcast_ref());
        if let Some(rustls::Error::InvalidCertificate(_)) = tls {
            return true;
        }
        next = error.source();
    }
    false
}

/// The same configuration with the addresses of its hosts, all of which the policy allows: the library resolves no name again.
async fn resolved(configuration: &Config, policy: &AddressPolicy) -> Result<Config, ConnectError> {
    let (hosts, given) = (configuration.get_hosts(), configuration.get_hostaddrs());
    if !hosts.is_empty() && !given.is_empty() && hosts.len() != given.len() {
        return Err(ConnectError::MatchHosts { hosts: hosts.len(), addresses: given.len() });
    }
    let ports = configuration.get_ports();
    let mut resolved = without_hosts(configuration);
    for index in 0..hosts.len().max(given.len()) {
        let port = ports.get(index).or(ports.first()).copied().unwrap_or(DEFAULT_PORT);
        let address = given.get(index).map(ToString::to_string);
        let name = match hosts.get(index) {
            Some(Host::Tcp(name)) => Some(name.clone()),
            Some(Host::Unix(_)) => return Err(ConnectError::UseSocketFile),
            None => None,
        };
        let Some(name) = name.or_else(|| address.clone()) else { continue };
        for found in policy.resolve(address.as_ref().unwrap_or(&name), port).await? {
            resolved.host(&name).hostaddr(found.ip()).port(port);
        }
    }
    Ok(resolved)
}

/// A configuration has no way to remove hosts.
fn without_hosts(configuration: &Config) -> Config {
    let mut copy = Config::new();
    copy.target_session_attrs(configuration.get_target_session_attrs());
    copy.channel_binding(configuration.get_channel_binding());
    copy.load_balance_hosts(configuration.get_load_balance_hosts());
    copy.ssl_negotiation(configuration.get_ssl_negotiation());
    if let Some(user) = configuration.get_user() {
        copy.user(user);
    }
    if let Some(password) = configuration.get_password() {
        copy.password(password);
    }
    if let Some(name) = configuration.get_dbname() {
        copy.dbname(name);
    }
    if let Some(options) = configuration.get_options() {
        copy.options(options);
    }
    if let Some(name) = configuration.get_application_name() {
        copy.application_name(name);
    }
    copy
}

/// Drives a connection in the background until its client is dropped or the server goes; the client's next call then fails.
pub fn drive(connection: DatabaseConnection) {
    tokio::spawn(async move {
        if let Err(error) = connection.await {
            debug!(%error, "a database connection ended");
        }
    });
}

fn verification(uri: &ConnectionUri) -> Verification<'_> {
    match uri.tls() {
        TlsMode::VerifyFull => uri.authorities().map_or(Verification::Public, Verification::Authorities),
        // As libpq reads `sslmode`. `disable` never comes to a handshake.
        TlsMode::Disable | TlsMode::Prefer | TlsMode::Require => Verification::Unverified,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn hosts(uri: &str) -> Result<Config, ConnectError> {
        let policy = AddressPolicy::new(&["127.0.0.0/8".parse().unwrap()], &[]);
        resolved(uri.parse::<ConnectionUri>().unwrap().configuration(), &policy).await
    }

    #[tokio::test]
    async fn every_host_is_resolved_once() {
        let found = hosts("postgresql://u:p@127.0.0.1:1,127.0.0.2:2/fleet?target_session_attrs=read-write&options=-cx%3D1").await.unwrap();
        let addresses: Vec<String> = found.get_hostaddrs().iter().map(ToString::to_string).collect();
        assert_eq!((addresses, found.get_ports()), (vec!["127.0.0.1".to_owned(), "127.0.0.2".to_owned()], &[1, 2][..]));
        assert_eq!((found.get_user(), found.get_password(), found.get_dbname()), (Some("u"), Some(&b"p"[..]), Some("fleet")));
        assert_eq!(found.get_options(), Some("-cx=1"));
        assert_eq!(found.get_target_session_attrs(), tokio_postgres::config::TargetSessionAttrs::ReadWrite);
        let found = hosts("postgresql://u@db.invalid/x?hostaddr=127.0.0.1").await.unwrap();
        assert_eq!((found.get_hosts(), found.get_hostaddrs().len()), (&[Host::Tcp("db.invalid".to_owned())][..], 1));
    }

    #[tokio::test]
    async fn addresses_that_are_refused() {
        for (uri, reason) in [
            ("postgresql://u@169.254.169.254/x", Reason::AddressNotAllowed),
            ("postgresql://u@[::1]/x", Reason::AddressNotAllowed),
            ("postgresql://u@db.example/x?hostaddr=169.254.169.254", Reason::AddressNotAllowed),
            ("postgresql://u@127.0.0.1,0.0.0.0/x", Reason::AddressNotAllowed),
            ("postgresql://u@127.0.0.1/x?host=169.254.1.1", Reason::AddressNotAllowed),
            ("postgresql://u@a,b/x?hostaddr=127.0.0.1", Reason::InvalidConnectionUri),
            ("postgresql://u@%2Ftmp/x", Reason::InvalidConnectionUri),
            ("postgresql://u@nowhere.invalid/x", Reason::DatabaseUnavailable),
        ] {
            assert_eq!(hosts(uri).await.unwrap_err().reason(), reason, "{uri}");
        }
    }
}
