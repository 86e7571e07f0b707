//! Logins at the broker: the canary's, which proves and then watches, and those that end the sessions of others.

use std::sync::Arc;
use std::time::Duration;

use rumqttc::{AsyncClient, ConnectReturnCode, ConnectionError, Event, EventLoop, Incoming, MqttOptions, QoS, SessionMode, StateError};
use thiserror::Error;
use tokio::task::JoinHandle;
use tokio::time::timeout;

use super::fullness::{self, BOUNDS, FULL, REFUSED};
use super::metrics::AgentMetrics;
use crate::broker::credential::Password;

/// The longest a login may take. A broker that reloads answers after that: measured, under a second for 15,000 clients.
const LOGIN_TIMEOUT: Duration = Duration::from_secs(5);

/// Seconds between signs of life: a broker that hangs is noticed in one and a half of them.
const KEEP_ALIVE_SECONDS: u16 = 10;

/// The broker's counters that are followed; it publishes them every ten seconds where they changed, and keeps them retained.
const DROPPED: &str = "$SYS/broker/publish/messages/dropped";
const CONNECTED: &str = "$SYS/broker/clients/connected";
const STORED: &str = "$SYS/broker/store/messages/bytes";
const HEAP: &str = "$SYS/broker/heap/current";

/// Where the broker is.
#[derive(Clone, Debug)]
pub struct Address {
    /// Host name or address.
    pub host: String,
    /// Port.
    pub port: u16,
}

/// Why a login did not succeed.
#[derive(Debug, Error)]
pub enum LoginError {
    /// The broker answered, and said no: it has not read this user's password.
    #[error("the broker refused the login of {username:?} ({code:?})")]
    Refused {
        /// Who.
        username: String,
        /// What it said.
        code: ConnectReturnCode,
    },

    /// The broker did not answer.
    #[error("failed to reach the broker at {}:{}", address.host, address.port)]
    Reach {
        /// Where.
        address: Address,
        /// Why.
        #[source]
        source: Box<ConnectionError>,
    },

    /// The broker took too long.
    #[error("the broker did not answer within {} s", LOGIN_TIMEOUT.as_secs())]
    Timeout,
}

/// The canary's session. It ends when this is dropped.
#[derive(Debug)]
pub struct Session {
    watching: JoinHandle<ConnectionError>,
}

impl Session {
    /// Logs in, and from then on keeps the broker's counters in `metrics`.
    ///
    /// # Errors
    /// When the broker does not accept the login.
    pub async fn login(address: &Address, username: &str, password: &Password, metrics: &Arc<AgentMetrics>) -> Result<Self, LoginError> {
        let (client, mut events) = connect(address, username, password).await?;
        let metrics = Arc::clone(metrics);
        let watching = tokio::spawn(async move {
            let refused = BOUNDS.map(|bound| format!("{REFUSED}{bound}"));
            for topic in [DROPPED, CONNECTED, STORED, HEAP, FULL].into_iter().chain(refused.iter().map(String::as_str)) {
                // Queued only, and there is room for all.
                if let Err(error) = client.subscribe(topic, QoS::AtMostOnce).await {
                    tracing::warn!(%error, topic, "failed to follow a counter of the broker");
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

    /// Returns when the broker has ended the session, with the reason.
    pub async fn ended(&mut self) -> String {
        match (&mut self.watching).await {
            Ok(error) => error.to_string(),
            Err(error) => error.to_string(),
        }
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        self.watching.abort();
    }
}

/// Ends the session of a user, with its queue: logs in with a clean start, and leaves.
///
/// # Errors
/// When the broker does not accept the login.
pub async fn end_session(address: &Address, username: &str, password: &Password) -> Result<(), LoginError> {
    let (client, mut events) = connect(address, username, password).await?;
    let leave = async {
        // The session ends with the connection, whether or not the broker hears the farewell.
        let _ = client.disconnect().await;
        while events.poll().await.is_ok() {}
    };
    timeout(LOGIN_TIMEOUT, leave).await.map_err(|_| LoginError::Timeout)
}

/// A connection with a clean start that the broker has accepted.
async fn connect(address: &Address, username: &str, password: &Password) -> Result<(AsyncClient, EventLoop), LoginError> {
    // The broker takes the user name for the client identifier, whatever is sent.
    let mut options = MqttOptions::new(username, (address.host.as_str(), address.port));
    options.set_credentials(username, password.expose().to_owned());
    options.set_keep_alive(KEEP_ALIVE_SECONDS);
    options.set_session_mode(SessionMode::Clean);
    // Nothing is published. Without a limit the client makes room for 65,535 messages at each login, which are 14 MB.
    options.set_outgoing_inflight_upper_limit(1);
    let (client, mut events) = AsyncClient::builder(options).capacity(16).build();
    let accepted = async {
        loop {
            match events.poll().await {
                Ok(Event::Incoming(Incoming::ConnAck(_))) => return Ok(()),
                Ok(_) => {}
                Err(error) => return Err(error),
            }
        }
    };
    match timeout(LOGIN_TIMEOUT, accepted).await {
        Ok(Ok(())) => Ok((client, events)),
        Ok(Err(error)) => Err(login_error(address, username, error)),
        Err(_) => Err(LoginError::Timeout),
    }
}

fn login_error(address: &Address, username: &str, error: ConnectionError) -> LoginError {
    match error {
        ConnectionError::ConnectionRefused(code) | ConnectionError::MqttState(StateError::ConnFail { reason: code }) => {
            LoginError::Refused { username: username.to_owned(), code }
        }
        source => LoginError::Reach { address: address.clone(), source: Box::new(source) },
    }
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
            }
        }
    }
}
