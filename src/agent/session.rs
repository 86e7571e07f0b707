//! The agent's logins at the broker: the canary, which proves the credentials and reads the broker's counters, and logins that end the
//! sessions of other users.

use std::sync::Arc;
use std::time::Duration;

use rumqttc::{AsyncClient, ConnectReturnCode, ConnectionError, Event, EventLoop, Incoming, QoS};
use thiserror::Error;
use tokio::task::JoinHandle;
use tokio::time::timeout;

use super::fullness::{self, BOUNDS, EXCEEDED, FULL, REFUSED};
use super::metrics::AgentMetrics;
use crate::broker::credential::Password;
use crate::mqtt::client::{self, ClientSettings, connect};
use crate::mqtt::login::{BrokerSession, ClientTls, Login};
use crate::runtime::tls::TlsError;

/// How long a login may take. A reload blocks the broker for less than a second with 15,000 clients (measured).
const LOGIN_TIMEOUT: Duration = Duration::from_secs(5);

/// The keep alive interval, in seconds. A broker that hangs is detected after one and a half times that.
const KEEP_ALIVE_SECONDS: u16 = 10;

/// The agent publishes nothing, and subscribes to fewer topics than this.
const MAX_REQUESTS: usize = 16;

/// The broker's counters. It publishes changed counters every ten seconds, as retained messages.
const DROPPED: &str = "$SYS/broker/publish/messages/dropped";
const CONNECTED: &str = "$SYS/broker/clients/connected";
const STORED: &str = "$SYS/broker/store/messages/bytes";
const HEAP: &str = "$SYS/broker/heap/current";

/// The address of the broker.
#[derive(Clone, Debug)]
pub struct BrokerAddress {
    /// Host name or IP address.
    pub host: String,
    /// TCP port.
    pub port: u16,
}

/// Why a login failed.
#[derive(Debug, Error)]
pub enum LoginError {
    /// The broker refused the login: it has not loaded this user's password.
    #[error("the broker refused the login of {username:?} ({code:?})")]
    Refused {
        /// The user name.
        username: String,
        /// The reason code of the CONNACK.
        code: ConnectReturnCode,
    },

    /// An error of the agent's own TLS configuration.
    #[error(transparent)]
    SetUpTls(#[from] TlsError),

    /// The broker did not accept or answer the connection.
    #[error(transparent)]
    Connect(client::LoginError),

    /// The broker did not close the connection in time.
    #[error("the broker did not answer within {} s", LOGIN_TIMEOUT.as_secs())]
    Timeout,
}

/// The canary's session. Dropping it ends the connection.
#[derive(Debug)]
pub struct CanarySession {
    watching: JoinHandle<ConnectionError>,
}

impl CanarySession {
    /// Logs in, and updates `metrics` from the broker's counters until the session ends.
    ///
    /// # Errors
    /// If the broker does not accept the login.
    pub async fn login(
        address: &BrokerAddress,
        username: &str,
        password: &Password,
        metrics: &Arc<AgentMetrics>,
    ) -> Result<Self, LoginError> {
        let (client, mut events) = log_in(address, username, password).await?;
        let metrics = Arc::clone(metrics);
        let watching = tokio::spawn(async move {
            let refused = BOUNDS.map(|bound| format!("{REFUSED}{bound}"));
            let exceeded = format!("{EXCEEDED}+");
            for topic in [DROPPED, CONNECTED, STORED, HEAP, FULL, &exceeded].into_iter().chain(refused.iter().map(String::as_str)) {
                // This only queues the request, and the queue has room for all of them.
                if let Err(error) = client.subscribe(topic, QoS::AtMostOnce).await {
                    tracing::warn!(%error, topic, "failed to subscribe to a counter of the broker");
                }
            }
            loop {
                match events.poll().await {
                    Ok(Event::Incoming(Incoming::Publish(message))) => observe(&metrics, &message.topic, &message.payload),
                    Ok(_) => {}
                    Err(error) => break error,
                }
            }
        });
        Ok(Self { watching })
    }

    /// Waits until the session has ended. Returns the reason.
    pub async fn ended(&mut self) -> String {
        match (&mut self.watching).await {
            Ok(error) => error.to_string(),
            Err(error) => error.to_string(),
        }
    }
}

impl Drop for CanarySession {
    fn drop(&mut self) {
        self.watching.abort();
    }
}

/// Ends the session of a user, with its queue, by a login with a clean start.
///
/// # Errors
/// If the broker does not accept the login.
pub async fn end_session(address: &BrokerAddress, username: &str, password: &Password) -> Result<(), LoginError> {
    let (client, mut events) = log_in(address, username, password).await?;
    let disconnect = async {
        // The session ends with the connection, even if the broker does not receive the DISCONNECT.
        let _ = client.disconnect().await;
        while events.poll().await.is_ok() {}
    };
    timeout(LOGIN_TIMEOUT, disconnect).await.map_err(|_| LoginError::Timeout)
}

/// Logs in with a clean start.
async fn log_in(address: &BrokerAddress, username: &str, password: &Password) -> Result<(AsyncClient, EventLoop), LoginError> {
    // The connection does not leave the pod. After a change of the authority the broker presents the old certificate until the reload
    // that this login verifies. `presentation` checks the certificate of the listener.
    let tls = ClientTls::unverified()?;
    // The broker uses the user name as the client identifier.
    let login = Login {
        host: address.host.clone(),
        port: address.port,
        client_id: username.to_owned(),
        username: username.to_owned(),
        password: password.expose().to_owned().into(),
        tls: Some(tls),
        addresses: None,
    };
    let settings = ClientSettings {
        session: BrokerSession::Clean,
        keep_alive_seconds: KEEP_ALIVE_SECONDS,
        max_packet_bytes: None,
        max_outgoing: 1,
        max_requests: MAX_REQUESTS,
        connect_timeout: LOGIN_TIMEOUT,
    };
    connect(&login, &settings).await.map_err(|error| match error.refusal() {
        Some(code) => LoginError::Refused { username: username.to_owned(), code },
        None => LoginError::Connect(error),
    })
}

fn observe(metrics: &AgentMetrics, topic: &[u8], payload: &[u8]) {
    let (Ok(topic), Ok(text)) = (std::str::from_utf8(topic), std::str::from_utf8(payload)) else { return };
    if topic == FULL {
        if let Some(seen) = fullness::parse(text) {
            metrics.observe_fullness(seen);
        }
        return;
    }
    let Ok(value) = text.parse::<i64>() else { return };
    match topic {
        DROPPED => metrics.observe_dropped(value),
        CONNECTED => metrics.clients_connected.set(value),
        STORED => metrics.messages_stored_bytes.set(value),
        HEAP => metrics.heap_bytes.set(value),
        _ => {
            if let Some(bound) = topic.strip_prefix(REFUSED) {
                metrics.observe_refused(bound, value);
            } else if let Some(limit) = topic.strip_prefix(EXCEEDED) {
                metrics.observe_exceeded(limit, value);
            }
        }
    }
}
