//! A login at a broker, and what comes from it.
//!
//! The broker keeps the session for a while after the connection has ended: what a device reports while the operator restarts
//! comes afterwards. What the operator itself had under way is not kept: each connection begins with a look at what the
//! broker retains.

use std::collections::VecDeque;
use std::fmt;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use rumqttc::{
    AsyncClient, ConnectionError, Event, EventLoop, Incoming, MqttOptions, Outgoing, PersistedAckMode, PersistedSession, Publish, QoS,
    SessionMode, SessionStore, SessionStoreError, SessionStoreKey, SubscribeNoticeError, TlsConfiguration, Transport,
};
use rustls::ClientConfig;
use thiserror::Error;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio::time::timeout;

use crate::api::name::{self, LINK_USERNAME};
use crate::broker::credential::Password;

/// The longest that a login may take, or the answer to a subscription. The broker may be about to reload.
const TIMEOUT: Duration = Duration::from_secs(10);

/// Seconds between signs of life.
const KEEP_ALIVE_SECONDS: u16 = 10;

/// Seconds that the broker keeps the session without a connection: a restart of the operator takes one, the loss of its node
/// five minutes (the default toleration of a pod).
const SESSION_EXPIRY_SECONDS: u32 = 600;

/// The largest message that is taken: the broker keeps larger ones to itself (MQTT 5.0 section 3.1.2.11.4). Much larger than a
/// report may be, so that its device is told.
const MAX_PACKET_BYTES: u32 = 1 << 20;

/// Messages that were read and not looked at. The broker waits when there are more.
const BACKLOG: usize = 64;

/// Where a broker is, and with what to log in there.
#[derive(Clone)]
pub struct Login {
    /// Host name or address.
    pub host: String,
    /// Port.
    pub port: u16,
    /// Client identifier.
    pub client_id: String,
    /// User name.
    pub username: String,
    /// Password of that user.
    pub password: Bytes,
    /// Encryption, and what it was made of; none for a plain listener.
    pub tls: Option<Tls>,
    /// Whether devices say there themselves whether they are connected.
    pub hears_connections: bool,
}

/// Encryption.
#[derive(Clone)]
pub struct Tls {
    /// The authorities to trust (PEM); none for the public ones.
    pub authorities: Option<Vec<u8>>,
    /// The configuration that follows.
    pub configuration: Arc<ClientConfig>,
}

impl Login {
    /// At a broker of ours, by its internal listener.
    #[must_use]
    pub fn internal(host: String, port: u16, password: &Password) -> Self {
        let [client_id, username] = [LINK_USERNAME; 2].map(str::to_owned);
        Self { host, port, client_id, username, password: password.expose().to_owned().into(), tls: None, hears_connections: false }
    }

    /// Host and port, for people.
    #[must_use]
    pub fn address(&self) -> String {
        if self.host.contains(':') { format!("[{}]:{}", self.host, self.port) } else { format!("{}:{}", self.host, self.port) }
    }
}

impl fmt::Debug for Login {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("Login").field("address", &self.address()).field("username", &self.username).finish_non_exhaustive()
    }
}

impl PartialEq for Login {
    fn eq(&self, other: &Self) -> bool {
        let all = |login: &Self| {
            let authorities = login.tls.as_ref().map(|tls| tls.authorities.clone());
            (login.host.clone(), login.port, login.client_id.clone(), login.username.clone(), login.password.clone(), authorities)
        };
        all(self) == all(other) && self.hears_connections == other.hears_connections
    }
}

impl Eq for Login {}

/// Why a session did not begin, or ended.
#[derive(Debug, Error)]
pub enum SessionError {
    /// The broker cannot be reached, refuses the login, or ended the connection.
    #[error("failed to stay connected to the broker at {address}")]
    Connection {
        /// Where.
        address: String,
        /// Why.
        #[source]
        source: Box<ConnectionError>,
    },

    /// No answer to the login or to a subscription.
    #[error("the broker at {address} did not answer within {} s", TIMEOUT.as_secs())]
    Timeout {
        /// Where.
        address: String,
    },

    /// It refuses a subscription.
    #[error("the broker at {address} refused a subscription: has it read the operator's access rights?")]
    Subscribe {
        /// Where.
        address: String,
        /// Why.
        #[source]
        source: SubscribeNoticeError,
    },

    /// The client has ended unexpectedly.
    #[error("the client of the broker at {address} has ended")]
    Ended {
        /// Where.
        address: String,
    },
}

/// A session, logged in and subscribed. It ends when this is dropped.
#[derive(Debug)]
pub struct Session {
    /// For publishing.
    pub client: AsyncClient,
    address: String,
    /// What came before the answers to the subscriptions.
    early: VecDeque<Publish>,
    messages: mpsc::Receiver<Result<Publish, ConnectionError>>,
    polling: JoinHandle<()>,
}

impl Drop for Session {
    fn drop(&mut self) {
        self.polling.abort();
    }
}

impl Session {
    /// Logs in, and subscribes to what is desired of all devices and to what they report; at most `capacity` requests of the
    /// client may wait.
    ///
    /// # Errors
    /// When the broker cannot be reached, or refuses.
    pub async fn begin(login: &Login, capacity: usize) -> Result<Self, SessionError> {
        let address = login.address();
        let (client, mut events) = AsyncClient::builder(options(login)).capacity(capacity).build();
        let accepted = async {
            loop {
                match events.poll().await {
                    Ok(Event::Incoming(Incoming::ConnAck(_))) => return Ok(()),
                    Ok(_) => {}
                    Err(source) => return Err(source),
                }
            }
        };
        match timeout(TIMEOUT, accepted).await {
            Ok(Ok(())) => {}
            Ok(Err(source)) => return Err(SessionError::Connection { address, source: Box::new(source) }),
            Err(_) => return Err(SessionError::Timeout { address }),
        }
        let (sender, messages) = mpsc::channel(BACKLOG);
        let polling = tokio::spawn(poll(events, sender));
        let mut session = Self { client, address, early: VecDeque::new(), messages, polling };
        // At most once: what is desired is looked at again with each connection, and is not to be queued meanwhile.
        session.subscribe(name::desired_topic("+"), QoS::AtMostOnce).await?;
        session.subscribe(name::reported_topic("+"), QoS::AtLeastOnce).await?;
        if login.hears_connections {
            // At most once, too: the broker retains the last word of each.
            session.subscribe(name::connection_topic("+"), QoS::AtMostOnce).await?;
        }
        Ok(session)
    }

    /// The answer may come behind many messages, which have to be read meanwhile.
    async fn subscribe(&mut self, filter: String, qos: QoS) -> Result<(), SessionError> {
        let queued = timeout(TIMEOUT, self.client.subscribe_tracked(filter, qos)).await;
        let Ok(Ok(notice)) = queued else { return Err(SessionError::Ended { address: self.address.clone() }) };
        let answer = timeout(TIMEOUT, notice.wait_completion_async());
        let mut answer = std::pin::pin!(answer);
        let answer = loop {
            tokio::select! {
                answer = &mut answer => break answer,
                Some(message) = self.messages.recv() => match message {
                    Ok(message) => self.early.push_back(message),
                    Err(source) => return Err(SessionError::Connection { address: self.address.clone(), source: Box::new(source) }),
                },
            }
        };
        match answer {
            Ok(Ok(())) => Ok(()),
            Ok(Err(source)) => Err(SessionError::Subscribe { address: self.address.clone(), source }),
            Err(_) => Err(SessionError::Timeout { address: self.address.clone() }),
        }
    }

    /// The next message.
    ///
    /// # Errors
    /// When the connection has ended.
    pub async fn message(&mut self) -> Result<Publish, SessionError> {
        if let Some(message) = self.early.pop_front() {
            return Ok(message);
        }
        match self.messages.recv().await {
            Some(Ok(message)) => Ok(message),
            Some(Err(source)) => Err(SessionError::Connection { address: self.address.clone(), source: Box::new(source) }),
            None => Err(SessionError::Ended { address: self.address.clone() }),
        }
    }
}

/// Publishes under way at the same time: those of [`super::session_loop`] twice over. The client makes room for as many, in 216 bytes
/// each, and without a limit for 65,535: 14 MB a Gateway.
const OUTGOING_IN_FLIGHT: u16 = 128;

/// Ends the session of this login's client identifier at the broker, with all that is queued for it: a login without a session (clean
/// start, no session expiry: MQTT 5.0, 3.1.2.4) leaves none behind. Whoever has that session is disconnected.
///
/// # Errors
/// When the broker cannot be reached, or refuses the login.
pub async fn discard(login: &Login) -> Result<(), SessionError> {
    let address = login.address();
    let mut options = access(login);
    options.set_session_mode(SessionMode::Clean);
    let (client, mut events) = AsyncClient::builder(options).capacity(1).build();
    let discarded = async {
        loop {
            match events.poll().await {
                Ok(Event::Incoming(Incoming::ConnAck(_))) => break,
                Ok(_) => {}
                Err(source) => return Err(source),
            }
        }
        // The session is gone by now, and there is none to keep: how this connection ends does not matter.
        if client.try_disconnect().is_ok() {
            while !matches!(events.poll().await, Ok(Event::Outgoing(Outgoing::Disconnect)) | Err(_)) {}
        }
        Ok(())
    };
    match timeout(TIMEOUT, discarded).await {
        Ok(Ok(())) => Ok(()),
        Ok(Err(source)) => Err(SessionError::Connection { address, source: Box::new(source) }),
        Err(_) => Err(SessionError::Timeout { address }),
    }
}

/// Where to, and with what.
fn access(login: &Login) -> MqttOptions {
    let mut options = MqttOptions::new(login.client_id.as_str(), (login.host.as_str(), login.port));
    options.set_credentials(login.username.as_str(), login.password.clone());
    if let Some(tls) = &login.tls {
        options.set_transport(Transport::tls_with_config(TlsConfiguration::Rustls(Arc::clone(&tls.configuration))));
    }
    options.set_keep_alive(KEEP_ALIVE_SECONDS);
    options
}

fn options(login: &Login) -> MqttOptions {
    let mut options = access(login);
    options.set_session_mode(SessionMode::Persistent);
    options.set_session_expiry_interval(Some(SESSION_EXPIRY_SECONDS));
    options.set_max_packet_size(Some(MAX_PACKET_BYTES));
    options.set_session_store(NothingUnderWay);
    options.set_outgoing_inflight_upper_limit(OUTGOING_IN_FLIGHT);
    options
}

/// In a task of its own, so that the connection lives while others are busy.
async fn poll(mut events: EventLoop, messages: mpsc::Sender<Result<Publish, ConnectionError>>) {
    loop {
        let message = match events.poll().await {
            Ok(Event::Incoming(Incoming::Publish(message))) => Ok(message),
            Ok(_) => continue,
            Err(error) => Err(error),
        };
        let last = message.is_err();
        if messages.send(message).await.is_err() || last {
            return;
        }
    }
}

/// Says that nothing of ours was under way when the last connection ended, which lets a session go on that another process
/// began: nothing is published in it but what is published anew anyway.
#[derive(Debug)]
struct NothingUnderWay;

type Answer<'a, T> = Pin<Box<dyn Future<Output = Result<T, SessionStoreError>> + Send + 'a>>;

impl SessionStore for NothingUnderWay {
    fn load<'a>(&'a self, key: &'a SessionStoreKey) -> Answer<'a, Option<PersistedSession>> {
        let session = PersistedSession {
            format_version: 1,
            client_id: key.client_id().to_owned(),
            clean_start: false,
            session_expiry_interval: Some(SESSION_EXPIRY_SECONDS),
            outgoing_inflight_upper_limit: Some(OUTGOING_IN_FLIGHT),
            ack_mode: PersistedAckMode::Automatic,
            last_pkid: 0,
            last_puback: 0,
            replay: Vec::new(),
            incoming_qos2: Vec::new(),
        };
        Box::pin(async { Ok(Some(session)) })
    }

    fn save<'a>(&'a self, _: &'a SessionStoreKey, _: &'a PersistedSession) -> Answer<'a, ()> {
        Box::pin(async { Ok(()) })
    }

    fn clear<'a>(&'a self, _: &'a SessionStoreKey) -> Answer<'a, ()> {
        Box::pin(async { Ok(()) })
    }
}
