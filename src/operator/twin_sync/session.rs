//! The operator's session with a broker, and the messages from it.
//!
//! The broker keeps the session for some minutes after a disconnect, so reports of devices survive a restart of the operator. Publishes
//! of the operator are not kept: each connection first reads the retained messages, and publishes what differs.

use std::collections::VecDeque;
use std::time::Duration;

use rumqttc::{AsyncClient, ConnectionError, Event, EventLoop, Incoming, Outgoing, Publish, QoS, SubscribeNoticeError};
use thiserror::Error;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio::time::timeout;

use crate::api::name::{self, LINK_USERNAME};
use crate::broker::credential::Password;
use crate::mqtt::client::{ClientSettings, LoginError, connect};
use crate::mqtt::login::{BrokerSession, CONNECT_TIMEOUT, ClientTls, Login};
use crate::runtime::address::AddressError;

/// How long the answer to a subscription may take. The broker may be about to reload.
const TIMEOUT: Duration = Duration::from_secs(10);

/// The keep alive interval, in seconds.
const KEEP_ALIVE_SECONDS: u16 = 10;

/// How long the broker keeps the session without a connection, in seconds: longer than the restart of the operator after the loss of
/// its node (five minutes, the default toleration of a pod).
const SESSION_EXPIRY_SECONDS: u32 = 600;

/// The largest packet that the broker may send, in bytes. It is much larger than the maximum size of a report, so that the operator
/// receives a report that is too long and can say so in the status of its Device.
const MAX_PACKET_BYTES: u32 = 1 << 20;

/// The maximum number of messages that wait for the operator. The broker waits if there are more.
const MAX_WAITING: usize = 64;

/// The maximum size of the messages of an external broker that arrive before the answers to the subscriptions: the retained messages of some
/// 50,000 devices, which a broker may send before its answer (MQTT 5.0, 3.8.4).
const MAX_EARLY_BYTES: usize = 16 << 20;

/// What a kept message costs beside topic and payload: itself, in a queue that grows by doubling, and its share of a read buffer.
const MESSAGE_OVERHEAD_BYTES: usize = 2 * size_of::<Publish>() + 128;

/// The maximum number of unacknowledged publishes: twice the maximum of [`super::session_loop`].
const MAX_OUTGOING: u16 = 128;

/// The operator's login at the internal listener of a managed broker.
#[must_use]
pub fn internal_login(host: String, port: u16, password: &Password, tls: Option<ClientTls>) -> Login {
    let [client_id, username] = [LINK_USERNAME; 2].map(str::to_owned);
    Login { host, port, client_id, username, password: password.expose().to_owned().into(), tls, addresses: None }
}

/// Why a session did not begin, or ended.
#[derive(Debug, Error)]
pub enum SessionError {
    /// The address of the broker is unknown, or refused.
    #[error(transparent)]
    Resolve(#[from] AddressError),

    /// The broker cannot be reached, refuses the login, or ended the connection.
    #[error("lost or failed to open the connection to the broker at {address}")]
    Connection {
        /// Host and port.
        address: String,
        /// The cause.
        #[source]
        source: Box<ConnectionError>,
    },

    /// The broker did not answer the login or a subscription.
    #[error("the broker at {address} did not answer within {} s", TIMEOUT.as_secs())]
    Timeout {
        /// Host and port.
        address: String,
    },

    /// The broker refused a subscription.
    #[error("the broker at {address} refused a subscription: expected that the user may subscribe to the topics of the devices")]
    Subscribe {
        /// Host and port.
        address: String,
        /// The cause.
        #[source]
        source: SubscribeNoticeError,
    },

    /// The broker sends messages instead of an answer to a subscription.
    #[error("the broker at {address} sent {} MiB of messages before it answered a subscription: expected the answer", MAX_EARLY_BYTES >> 20)]
    Flood {
        /// Host and port.
        address: String,
    },

    /// The MQTT client has stopped unexpectedly.
    #[error("the MQTT client of the broker at {address} has stopped")]
    Ended {
        /// Host and port.
        address: String,
    },
}

impl From<LoginError> for SessionError {
    fn from(error: LoginError) -> Self {
        match error {
            LoginError::Timeout { address, .. } => Self::Timeout { address },
            LoginError::Resolve(error) => Self::Resolve(error),
            LoginError::Connect { address, source } => Self::Connection { address, source },
        }
    }
}

/// A session with its subscriptions. Dropping it ends the connection.
#[derive(Debug)]
pub struct TwinSession {
    /// Publishes.
    pub client: AsyncClient,
    address: String,
    /// The messages that arrived before the answers to the subscriptions, at most [`MAX_EARLY_BYTES`].
    early: VecDeque<Publish>,
    /// How many more bytes of them are kept.
    early_room: usize,
    messages: mpsc::Receiver<Result<Publish, ConnectionError>>,
    polling: JoinHandle<()>,
}

impl Drop for TwinSession {
    fn drop(&mut self) {
        self.polling.abort();
    }
}

impl TwinSession {
    /// Logs in, and subscribes to the desired and reported states of all devices, and to their presence messages if `presence`. At most
    /// `max_requests` requests of the client may wait.
    ///
    /// # Errors
    /// If the broker cannot be reached, or refuses the login or a subscription.
    pub async fn begin(login: &Login, max_requests: usize, presence: bool) -> Result<Self, SessionError> {
        let settings = ClientSettings {
            session: BrokerSession::Persistent { expiry_seconds: SESSION_EXPIRY_SECONDS },
            keep_alive_seconds: KEEP_ALIVE_SECONDS,
            max_packet_bytes: Some(MAX_PACKET_BYTES),
            max_outgoing: MAX_OUTGOING,
            max_requests,
            connect_timeout: CONNECT_TIMEOUT,
        };
        let (client, events) = connect(login, &settings).await?;
        let (sender, messages) = mpsc::channel(MAX_WAITING);
        // The devices of a managed broker are Devices.
        let early_room = if presence { MAX_EARLY_BYTES } else { usize::MAX };
        let polling = tokio::spawn(poll(events, sender));
        let mut session = Self { client, address: login.address(), early: VecDeque::new(), early_room, messages, polling };
        // QoS 0: each connection reads the retained messages again, so the broker need not queue them.
        session.subscribe(name::desired_topic("+"), QoS::AtMostOnce).await?;
        session.subscribe(name::reported_topic("+"), QoS::AtLeastOnce).await?;
        if presence {
            // QoS 0, because these messages are retained too.
            session.subscribe(name::connection_topic("+"), QoS::AtMostOnce).await?;
        }
        Ok(session)
    }

    /// Subscribes. Reads messages meanwhile, because the answer may follow many of them.
    async fn subscribe(&mut self, filter: String, qos: QoS) -> Result<(), SessionError> {
        let queued = timeout(TIMEOUT, self.client.subscribe_tracked(filter, qos)).await;
        let Ok(Ok(notice)) = queued else { return Err(SessionError::Ended { address: self.address.clone() }) };
        let answer = timeout(TIMEOUT, notice.wait_completion_async());
        let mut answer = std::pin::pin!(answer);
        let answer = loop {
            tokio::select! {
                answer = &mut answer => break answer,
                Some(message) = self.messages.recv() => match message {
                    Ok(message) => self.keep(message)?,
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

    /// Keeps a message until the subscriptions are answered.
    fn keep(&mut self, message: Publish) -> Result<(), SessionError> {
        let bytes = message.topic.len() + message.payload.len() + MESSAGE_OVERHEAD_BYTES;
        let room = self.early_room.checked_sub(bytes);
        self.early_room = room.ok_or_else(|| SessionError::Flood { address: self.address.clone() })?;
        self.early.push_back(message);
        Ok(())
    }

    /// The next message. Cancel safe.
    ///
    /// # Errors
    /// If the connection has ended.
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

/// Ends the session of this client identifier at the broker, with its queue: a login with a clean start and no session expiry leaves no
/// session (MQTT 5.0, 3.1.2.4). The broker disconnects a client that uses the session.
///
/// # Errors
/// If the broker cannot be reached, or refuses the login.
pub async fn discard(login: &Login) -> Result<(), SessionError> {
    let settings = ClientSettings {
        session: BrokerSession::Clean,
        keep_alive_seconds: KEEP_ALIVE_SECONDS,
        max_packet_bytes: None,
        max_outgoing: 1,
        max_requests: 1,
        connect_timeout: CONNECT_TIMEOUT,
    };
    let (client, mut events) = connect(login, &settings).await?;
    // The session has ended with the login. It does not matter how this connection ends.
    if client.try_disconnect().is_ok() {
        let closed = async { while !matches!(events.poll().await, Ok(Event::Outgoing(Outgoing::Disconnect)) | Err(_)) {} };
        timeout(TIMEOUT, closed).await.map_err(|_| SessionError::Timeout { address: login.address() })?;
    }
    Ok(())
}

/// Polls in its own task, so that the connection stays alive while the receiver is busy.
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
