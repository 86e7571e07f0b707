//! A login with the client library (`rumqttc`), for roles with few messages: the operator and the agent.

use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use rumqttc::mqttbytes::v5::ConnectReturnCode;
use rumqttc::{
    AsyncClient, ConnectionError, Event, EventLoop, Incoming, MqttOptions, PersistedAckMode, PersistedSession, SessionMode, SessionStore,
    SessionStoreError, SessionStoreKey, StateError, TlsConfiguration, Transport,
};
use tokio::time::timeout;

use super::login::{BrokerSession, Login};
use crate::runtime::address::{self, AddressError};

/// The settings of a client.
#[derive(Clone, Copy, Debug)]
pub struct ClientSettings {
    /// The session at the broker.
    pub session: BrokerSession,
    /// The keep alive interval, in seconds.
    pub keep_alive_seconds: u16,
    /// The largest packet that the broker may send, in bytes (MQTT 5.0, 3.1.2.11.4). `None`: the default of the library.
    pub max_packet_bytes: Option<u32>,
    /// The maximum number of unacknowledged publishes. The library allocates 216 bytes for each of them at the login.
    pub max_outgoing: u16,
    /// The maximum number of requests that wait in the client.
    pub max_requests: usize,
    /// How long the login may take.
    pub connect_timeout: Duration,
}

/// Why a login failed.
#[derive(Debug, thiserror::Error)]
pub enum LoginError {
    /// The address of the broker is unknown, or refused.
    #[error(transparent)]
    Resolve(#[from] AddressError),

    /// The broker did not answer in time.
    #[error("the broker at {address} did not answer within {seconds} s")]
    Timeout {
        /// Host and port.
        address: String,
        /// The timeout, in seconds.
        seconds: u64,
    },

    /// The broker cannot be reached, or refused the login.
    #[error("failed to log in to the broker at {address}")]
    Connect {
        /// Host and port.
        address: String,
        /// The cause.
        #[source]
        source: Box<ConnectionError>,
    },
}

impl LoginError {
    /// The reason code of the CONNACK, if the broker refused the login.
    #[must_use]
    pub fn refusal(&self) -> Option<ConnectReturnCode> {
        let Self::Connect { source, .. } = self else { return None };
        match **source {
            ConnectionError::ConnectionRefused(code) | ConnectionError::MqttState(StateError::ConnFail { reason: code }) => Some(code),
            _ => None,
        }
    }
}

/// Connects and logs in. The caller polls the event loop.
///
/// # Errors
/// If the broker cannot be reached in time, or refuses the login.
pub async fn connect(login: &Login, settings: &ClientSettings) -> Result<(AsyncClient, EventLoop), LoginError> {
    let accepted = async {
        let mut options = options(login, settings);
        if let Some(policy) = &login.addresses {
            // The client library resolves no name again.
            let addresses: Arc<[SocketAddr]> = policy.resolve(&login.host, login.port).await?.into();
            options.set_socket_connector(move |_, _| {
                let addresses = Arc::clone(&addresses);
                async move { address::connect(&addresses).await }
            });
        }
        let (client, mut events) = AsyncClient::builder(options).capacity(settings.max_requests).build();
        loop {
            match events.poll().await {
                Ok(Event::Incoming(Incoming::ConnAck(_))) => return Ok((client, events)),
                Ok(_) => {}
                Err(source) => return Err(LoginError::Connect { address: login.address(), source: Box::new(source) }),
            }
        }
    };
    let timed_out = || LoginError::Timeout { address: login.address(), seconds: settings.connect_timeout.as_secs() };
    timeout(settings.connect_timeout, accepted).await.unwrap_or_else(|_| Err(timed_out()))
}

fn options(login: &Login, settings: &ClientSettings) -> MqttOptions {
    let mut options = MqttOptions::new(login.client_id.as_str(), (login.host.as_str(), login.port));
    options.set_credentials(login.username.as_str(), login.password.clone());
    if let Some(tls) = &login.tls {
        options.set_transport(Transport::tls_with_config(TlsConfiguration::Rustls(Arc::clone(&tls.configuration))));
    }
    options.set_keep_alive(settings.keep_alive_seconds);
    if settings.max_packet_bytes.is_some() {
        options.set_max_packet_size(settings.max_packet_bytes);
    }
    options.set_outgoing_inflight_upper_limit(settings.max_outgoing);
    match settings.session {
        BrokerSession::Clean => {
            options.set_session_mode(SessionMode::Clean);
        }
        BrokerSession::Persistent { expiry_seconds } => {
            options.set_session_mode(SessionMode::Persistent);
            options.set_session_expiry_interval(Some(expiry_seconds));
            options.set_session_store(NoUnacknowledgedPublishes { expiry_seconds, max_outgoing: settings.max_outgoing });
        }
    }
    options
}

/// Lets the library resume a session that another process has begun. Publishes of the earlier process are not repeated: each role
/// publishes its current state again after a login.
#[derive(Clone, Copy, Debug)]
struct NoUnacknowledgedPublishes {
    expiry_seconds: u32,
    max_outgoing: u16,
}

type StoreFuture<'a, T> = Pin<Box<dyn Future<Output = Result<T, SessionStoreError>> + Send + 'a>>;

impl SessionStore for NoUnacknowledgedPublishes {
    fn load<'a>(&'a self, key: &'a SessionStoreKey) -> StoreFuture<'a, Option<PersistedSession>> {
        let session = PersistedSession {
            format_version: 1,
            client_id: key.client_id().to_owned(),
            clean_start: false,
            session_expiry_interval: Some(self.expiry_seconds),
            outgoing_inflight_upper_limit: Some(self.max_outgoing),
            ack_mode: PersistedAckMode::Automatic,
            last_pkid: 0,
            last_puback: 0,
            replay: Vec::new(),
            incoming_qos2: Vec::new(),
        };
        Box::pin(async { Ok(Some(session)) })
    }

    fn save<'a>(&'a self, _: &'a SessionStoreKey, _: &'a PersistedSession) -> StoreFuture<'a, ()> {
        Box::pin(async { Ok(()) })
    }

    fn clear<'a>(&'a self, _: &'a SessionStoreKey) -> StoreFuture<'a, ()> {
        Box::pin(async { Ok(()) })
    }
}
