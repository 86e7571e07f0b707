//! One connection to a broker, with a persistent session: bytes in large reads, answers gathered into one write.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

use bytes::{BufMut, Bytes, BytesMut};
use rumqttc::mqttbytes::QoS;
use rumqttc::mqttbytes::v5::{
    Connect, ConnectAuth, ConnectProperties, ConnectReturnCode, Disconnect, DisconnectProperties, DisconnectReasonCode, Packet, Publish,
    RetainForwardRule, Subscribe, SubscribeFilter, Unsubscribe,
};
use tokio::time::timeout;

use super::frame::{Frame, FrameError, frames, take_whole};
use super::login::Login;
use super::stream::Stream;
use crate::runtime::tls::TlsError;

/// How long connecting may take, login included. A broker that reads thousands of credentials again answers nobody for up to
/// a second.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// How long to wait for what a dead connection may still hold: it stands in the kernel's memory already.
const REST_TIMEOUT: Duration = Duration::from_millis(200);

/// Seconds after which a broker that hears nothing takes the connection for dead, at one and a half times that. Half of it is
/// how often a quiet connection is tried.
pub const KEEP_ALIVE_SECONDS: u16 = 20;

/// The most messages that may be unacknowledged (receive maximum, MQTT 5.0, 3.1.2.11.3): nearly all that there are packet
/// identifiers for, since it is the worker's memory that bounds the window, in bytes. But one less than there are: Mosquitto 2.1
/// takes 65,535 for no maximum (<https://github.com/eclipse-mosquitto/mosquitto/issues/3579>).
pub const RECEIVE_MAXIMUM: u16 = 65_534;

/// How much is read at once.
const READ_SIZE: usize = 64 * 1024;

/// Packet identifier of the one SUBSCRIBE and the one UNSUBSCRIBE of a connection. Theirs are apart from those of the broker's
/// messages (MQTT 5.0, 2.2.1).
const SUBSCRIBE_ID: u16 = 1;
const UNSUBSCRIBE_ID: u16 = 2;

/// Why a connection is not, or no longer, there.
#[derive(Debug, thiserror::Error)]
pub enum ConnectionError {
    /// No answer in time.
    #[error("failed to connect to the broker at {address} within {} s", CONNECT_TIMEOUT.as_secs())]
    Await {
        /// Host and port.
        address: String,
    },

    /// The broker refused the login.
    #[error("failed to log in to the broker at {address} as {username}: it answered {code:?}")]
    LogIn {
        /// Host and port.
        address: String,
        /// User name.
        username: String,
        /// The broker's answer.
        code: ConnectReturnCode,
    },

    /// A file of the login could not be read.
    #[error("failed to read {}: expected the login at the external broker, from the Secret that its Gateway names", .file.display())]
    ReadLogin {
        /// Which.
        file: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },

    /// The user name is no text.
    #[error("failed to read {}: expected a user name in UTF-8", .file.display())]
    ReadUsername {
        /// Which file.
        file: PathBuf,
    },

    /// The authorities are no certificates.
    #[error("failed to set up TLS for the external broker")]
    Encrypt(#[from] TlsError),

    /// The broker refused the subscription.
    #[error("failed to subscribe to {filter}: the broker answered {reasons}")]
    Subscribe {
        /// The filter.
        filter: String,
        /// The broker's answer.
        reasons: String,
    },

    /// The network.
    #[error("failed to talk to the broker")]
    Talk(#[from] io::Error),

    /// Bytes that are no MQTT.
    #[error("failed to understand the broker")]
    Understand(#[from] FrameError),

    /// A packet could not be written.
    #[error("failed to write a packet")]
    Write(#[source] rumqttc::mqttbytes::Error),

    /// A packet that has no place here.
    #[error("failed to make sense of a packet: expected {expected}, found {found}")]
    Expect {
        /// What would have had its place.
        expected: &'static str,
        /// What came.
        found: String,
    },

    /// The broker ended the connection.
    #[error("the broker ended the connection: {reason:?}")]
    End {
        /// Its reason.
        reason: DisconnectReasonCode,
    },

    /// The broker did not close the connection.
    #[error("failed to end the session: the broker did not close the connection within {seconds} s")]
    Close {
        /// How long it was waited for.
        seconds: u64,
    },

    /// The broker is silent.
    #[error("failed to hear from the broker for {seconds} s")]
    Hear {
        /// For how long.
        seconds: u64,
    },
}

/// A connection, logged in.
#[derive(Debug)]
pub struct Connection {
    stream: Stream,
    input: BytesMut,
    output: BytesMut,
}

impl Connection {
    /// Connects and logs in, and says whether the broker has kept the session.
    pub async fn open(host: &str, port: u16, login: &Login) -> Result<(Self, bool), ConnectionError> {
        let address = format!("{host}:{port}");
        match timeout(CONNECT_TIMEOUT, Self::log_in(&address, host, port, login)).await {
            Ok(opened) => opened,
            Err(_) => Err(ConnectionError::Await { address }),
        }
    }

    async fn log_in(address: &str, host: &str, port: u16, login: &Login) -> Result<(Self, bool), ConnectionError> {
        let stream = Stream::open(host, port, login.tls.as_ref()).await?;
        let mut connection = Self { stream, input: BytesMut::with_capacity(READ_SIZE), output: BytesMut::new() };
        let properties = ConnectProperties {
            session_expiry_interval: Some(login.session_expiry_seconds),
            receive_maximum: Some(RECEIVE_MAXIMUM),
            ..ConnectProperties::new()
        };
        let connect = Connect {
            keep_alive: KEEP_ALIVE_SECONDS,
            client_id: login.client_id.clone(),
            clean_start: false,
            properties: Some(properties),
        };
        let auth = ConnectAuth::UsernamePassword { username: login.username.clone(), password: login.password.clone() };
        connection.put(&Packet::Connect(connect, None, auth))?;
        // The broker may send messages right behind its answer: they stay in the input.
        let answer = loop {
            if let Some(answer) = Packet::read(&mut connection.input, None).map(Some).or_else(|error| match error {
                rumqttc::mqttbytes::Error::InsufficientBytes(_) => Ok(None),
                other => Err(FrameError::Decode(other)),
            })? {
                break answer;
            }
            connection.flush()?;
            if connection.ready(true).await? {
                match connection.stream.try_read(&mut connection.input) {
                    Ok(0) => return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into()),
                    Ok(_) => {}
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                    Err(error) => return Err(error.into()),
                }
            }
        };
        match answer {
            Packet::ConnAck(answer) if answer.code == ConnectReturnCode::Success => Ok((connection, answer.session_present)),
            Packet::ConnAck(answer) => {
                Err(ConnectionError::LogIn { address: address.to_owned(), username: login.username.clone(), code: answer.code })
            }
            other => Err(ConnectionError::Expect { expected: "CONNACK", found: format!("{:?}", other.packet_type()) }),
        }
    }

    /// Waits until there is something to read, if `read`, or until what is to be written can be. With neither, for ever.
    pub async fn ready(&self, read: bool) -> io::Result<bool> {
        self.stream.ready(read, !self.output.is_empty()).await
    }

    /// Packets that were read together with the answer to the login, or left over.
    pub fn take_whole(&mut self) -> Result<Option<Bytes>, ConnectionError> {
        Ok(take_whole(&mut self.input)?)
    }

    /// Reads once; the whole packets that there are now. Never waits.
    pub fn read(&mut self) -> Result<Option<Bytes>, ConnectionError> {
        if self.input.capacity() - self.input.len() < READ_SIZE / 4 {
            self.input.reserve(READ_SIZE);
        }
        match self.stream.try_read(&mut self.input) {
            Ok(0) => Err(io::Error::from(io::ErrorKind::UnexpectedEof).into()),
            Ok(_) => self.take_whole(),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    /// The packets that came before the connection ended and were not read yet.
    ///
    /// A broker that is killed may have acknowledged messages to their publishers that it had not written down yet: Mosquitto 2.1
    /// does, unless a plugin keeps it from that as with brokers of ours. It had sent them here before, so that here they are safe.
    pub async fn read_rest(&mut self) -> Vec<Bytes> {
        let mut blocks = Vec::new();
        let rest = async {
            while self.stream.ready(true, false).await.is_ok() {
                match self.read() {
                    Ok(block) => blocks.extend(block),
                    // The end.
                    Err(_) => return,
                }
            }
        };
        // Where the end was not noticed yet, as after a silence, there may be nothing to read for ever.
        let _ = timeout(REST_TIMEOUT, rest).await;
        blocks
    }

    /// Writes what can be written. Never waits.
    pub fn flush(&mut self) -> Result<(), ConnectionError> {
        self.stream.push()?;
        while !self.output.is_empty() {
            match self.stream.try_write(&self.output) {
                Ok(written) => drop(self.output.split_to(written)),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) => return Err(error.into()),
            }
        }
        self.output.clear();
        Ok(())
    }

    /// Acknowledges a message (PUBACK, reason Success: MQTT 5.0, 3.4).
    pub fn acknowledge(&mut self, packet_id: u16) {
        self.output.put_u16(0x4002);
        self.output.put_u16(packet_id);
    }

    /// Asks the broker for an answer.
    pub fn ping(&mut self) -> Result<(), ConnectionError> {
        self.put(&Packet::PingReq)
    }

    /// Subscribes at QoS 1. Retained messages are not telemetry: none are sent on that account (retain handling 2).
    pub fn subscribe(&mut self, filter: &str) -> Result<(), ConnectionError> {
        let mut wanted = SubscribeFilter::new(filter.to_owned(), QoS::AtLeastOnce);
        wanted.retain_forward_rule = RetainForwardRule::Never;
        let mut subscribe = Subscribe::new(wanted, None);
        subscribe.pkid = SUBSCRIBE_ID;
        self.put(&Packet::Subscribe(subscribe))
    }

    /// Publishes at QoS 0: the broker does not answer.
    pub fn publish(&mut self, topic: String, payload: Vec<u8>) -> Result<(), ConnectionError> {
        self.put(&Packet::Publish(Publish::new(topic, QoS::AtMostOnce, payload, None)))
    }

    /// Ends subscriptions.
    pub fn unsubscribe(&mut self, filters: Vec<String>) -> Result<(), ConnectionError> {
        self.put(&Packet::Unsubscribe(Unsubscribe { pkid: UNSUBSCRIBE_ID, filters, properties: None }))
    }

    /// Ends the session (session expiry 0 in DISCONNECT: MQTT 5.0, 3.14.2.2.2), and waits until the broker has closed the connection, so
    /// that it has done so.
    pub async fn end(mut self) -> Result<(), ConnectionError> {
        let mut goodbye = Disconnect::new(DisconnectReasonCode::NormalDisconnection);
        goodbye.properties = Some(DisconnectProperties {
            session_expiry_interval: Some(0),
            reason_string: None,
            user_properties: Vec::new(),
            server_reference: None,
        });
        self.put(&Packet::Disconnect(goodbye))?;
        self.flush_all().await?;
        let closed = async { while self.ready(true).await.is_ok() && self.read().is_ok() {} };
        timeout(CONNECT_TIMEOUT, closed).await.map_err(|_| ConnectionError::Close { seconds: CONNECT_TIMEOUT.as_secs() })
    }

    /// Says goodbye, so that the broker keeps the session, and closes.
    pub async fn close(mut self) {
        let goodbye = Packet::Disconnect(Disconnect::new(DisconnectReasonCode::NormalDisconnection));
        if self.put(&goodbye).is_ok() {
            // A broker that does not read keeps the session all the same.
            let _ = timeout(CONNECT_TIMEOUT, self.flush_all()).await;
            let _ = timeout(CONNECT_TIMEOUT, self.stream.shutdown()).await;
        }
    }

    async fn flush_all(&mut self) -> Result<(), ConnectionError> {
        self.flush()?;
        while !self.output.is_empty() || self.stream.has_unsent() {
            self.ready(false).await?;
            self.flush()?;
        }
        Ok(())
    }

    fn put(&mut self, packet: &Packet) -> Result<(), ConnectionError> {
        packet.write(&mut self.output, None).map(drop).map_err(ConnectionError::Write)
    }
}

/// The packets of a block.
pub fn packets(block: &Bytes) -> impl Iterator<Item = Result<Frame, ConnectionError>> + '_ {
    frames(block).map(|frame| frame.map_err(ConnectionError::from))
}
