//! A connection of MQTT packets: large reads, answers collected into one write, and acknowledgements by the caller.

use std::io;
use std::time::Duration;

use bytes::{BufMut, Bytes, BytesMut};
use rumqttc::mqttbytes::QoS;
use rumqttc::mqttbytes::v5::{
    Connect, ConnectAuth, ConnectProperties, ConnectReturnCode, Disconnect, DisconnectProperties, DisconnectReasonCode, Packet, Publish,
    RetainForwardRule, Subscribe, SubscribeFilter, Unsubscribe,
};
use tokio::time::timeout;

use super::error::ConnectionError;
use super::frame::{Frame, FrameError, MAX_PACKET_BYTES, frames, take_whole};
use super::login::{BrokerSession, CONNECT_TIMEOUT, Login};
use super::stream::Stream;

/// How long to read from a failed connection. The remaining bytes are in the kernel's buffers already.
const MAX_READ_REST: Duration = Duration::from_millis(200);

/// The packet identifiers of the only SUBSCRIBE and the only UNSUBSCRIBE of a connection. They are independent of those of the
/// broker's messages (MQTT 5.0, 2.2.1).
const SUBSCRIBE_ID: u16 = 1;
const UNSUBSCRIBE_ID: u16 = 2;

/// The settings of a connection.
#[derive(Clone, Copy, Debug)]
pub struct ConnectSettings {
    /// The session at the broker.
    pub session: BrokerSession,
    /// The keep alive interval, in seconds. The caller sends the PINGREQs.
    pub keep_alive_seconds: u16,
    /// The maximum number of messages that the broker may send before their acknowledgement. `None`: the default of MQTT.
    pub receive_maximum: Option<u16>,
    /// The largest packet that the broker may send, in bytes. `None`: the limit of MQTT.
    pub max_packet_bytes: Option<u32>,
    /// The buffer of a read, in bytes.
    pub read_bytes: usize,
}

/// A connection with a successful login.
#[derive(Debug)]
pub struct PacketConnection {
    stream: Stream,
    input: BytesMut,
    output: BytesMut,
    max_packet_bytes: usize,
    read_bytes: usize,
}

impl PacketConnection {
    /// Connects and logs in. Also returns whether the broker has kept the session.
    ///
    /// # Errors
    /// If the broker cannot be reached within [`CONNECT_TIMEOUT`], or refuses the login.
    pub async fn open(login: &Login, settings: &ConnectSettings) -> Result<(Self, bool), ConnectionError> {
        match timeout(CONNECT_TIMEOUT, Self::log_in(login, settings)).await {
            Ok(opened) => opened,
            Err(_) => Err(ConnectionError::Timeout { address: login.address() }),
        }
    }

    async fn log_in(login: &Login, settings: &ConnectSettings) -> Result<(Self, bool), ConnectionError> {
        let connect_error = |source| ConnectionError::Connect { address: login.address(), source };
        let tls = login.tls.as_ref().map(|tls| &tls.configuration);
        let stream = Stream::open(&login.host, login.port, tls).await.map_err(connect_error)?;
        let mut connection = Self {
            stream,
            input: BytesMut::with_capacity(settings.read_bytes),
            output: BytesMut::new(),
            max_packet_bytes: settings.max_packet_bytes.and_then(|bytes| usize::try_from(bytes).ok()).unwrap_or(MAX_PACKET_BYTES),
            read_bytes: settings.read_bytes,
        };
        connection.put(&connect_packet(login, settings))?;
        match connection.read_first().await.map_err(|error| match error {
            ConnectionError::Io(source) => connect_error(source),
            other => other,
        })? {
            Packet::ConnAck(answer) if answer.code == ConnectReturnCode::Success => Ok((connection, answer.session_present)),
            Packet::ConnAck(answer) => Err(ConnectionError::Refused { address: login.address(), code: answer.code }),
            other => Err(ConnectionError::UnexpectedPacket { expected: "CONNACK", found: format!("{:?}", other.packet_type()) }),
        }
    }

    /// Reads one packet. The broker may send messages directly after the CONNACK: they stay in the input.
    async fn read_first(&mut self) -> Result<Packet, ConnectionError> {
        loop {
            match Packet::read(&mut self.input, Some(u32::try_from(self.max_packet_bytes).unwrap_or(u32::MAX))) {
                Ok(packet) => return Ok(packet),
                Err(rumqttc::mqttbytes::Error::InsufficientBytes(_)) => {}
                Err(error) => return Err(FrameError::Decode(error).into()),
            }
            self.flush()?;
            if self.ready(true).await? {
                match self.stream.try_read(&mut self.input) {
                    Ok(0) => return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into()),
                    Ok(_) => {}
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                    Err(error) => return Err(error.into()),
                }
            }
        }
    }

    /// Waits until the socket is readable, if `read`, or until buffered output can be written. Waits forever if neither applies.
    /// Returns whether the socket is readable. Cancel safe.
    ///
    /// # Errors
    /// If the socket fails.
    pub async fn ready(&self, read: bool) -> io::Result<bool> {
        self.stream.ready(read, !self.output.is_empty()).await
    }

    /// The whole packets that were read already, for example together with the CONNACK.
    ///
    /// # Errors
    /// If the bytes are not MQTT packets.
    pub fn take_whole(&mut self) -> Result<Option<Bytes>, ConnectionError> {
        Ok(take_whole(&mut self.input, self.max_packet_bytes)?)
    }

    /// Reads once without waiting, and returns the whole packets.
    ///
    /// # Errors
    /// If the connection has ended, or the bytes are not MQTT packets.
    pub fn read(&mut self) -> Result<Option<Bytes>, ConnectionError> {
        if self.input.capacity() - self.input.len() < self.read_bytes / 4 {
            self.input.reserve(self.read_bytes);
        }
        match self.stream.try_read(&mut self.input) {
            Ok(0) => Err(io::Error::from(io::ErrorKind::UnexpectedEof).into()),
            Ok(_) => self.take_whole(),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    /// The packets that arrived before the connection failed and were not read yet.
    ///
    /// A broker that is killed may have acknowledged messages to their publishers before it stored them. An unpatched Mosquitto 2.1 does
    /// so. It may have sent these messages to this connection.
    pub async fn read_rest(&mut self) -> Vec<Bytes> {
        let mut blocks = Vec::new();
        let rest = async {
            while self.stream.ready(true, false).await.is_ok() {
                match self.read() {
                    Ok(block) => blocks.extend(block),
                    // The end of the stream.
                    Err(_) => return,
                }
            }
        };
        // A silent connection may stay open without data. The blocks read so far are the result in either case.
        let _ = timeout(MAX_READ_REST, rest).await;
        blocks
    }

    /// Writes as much of the output as possible without waiting.
    ///
    /// # Errors
    /// If the socket fails.
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

    /// Buffers a PUBACK with the reason Success (MQTT 5.0, 3.4).
    pub fn acknowledge(&mut self, packet_id: u16) {
        self.output.put_u16(0x4002);
        self.output.put_u16(packet_id);
    }

    /// Buffers a PINGREQ.
    ///
    /// # Errors
    /// If the packet cannot be encoded.
    pub fn ping(&mut self) -> Result<(), ConnectionError> {
        self.put(&Packet::PingReq)
    }

    /// Buffers a SUBSCRIBE at QoS 1, without retained messages (retain handling 2): they are not telemetry.
    ///
    /// # Errors
    /// If the packet cannot be encoded.
    pub fn subscribe(&mut self, filter: &str) -> Result<(), ConnectionError> {
        let mut filter = SubscribeFilter::new(filter.to_owned(), QoS::AtLeastOnce);
        filter.retain_forward_rule = RetainForwardRule::Never;
        let mut subscribe = Subscribe::new(filter, None);
        subscribe.pkid = SUBSCRIBE_ID;
        self.put(&Packet::Subscribe(subscribe))
    }

    /// Buffers a PUBLISH at QoS 0: the broker does not answer.
    ///
    /// # Errors
    /// If the packet cannot be encoded.
    pub fn publish(&mut self, topic: String, payload: Vec<u8>) -> Result<(), ConnectionError> {
        self.put(&Packet::Publish(Publish::new(topic, QoS::AtMostOnce, payload, None)))
    }

    /// Buffers an UNSUBSCRIBE.
    ///
    /// # Errors
    /// If the packet cannot be encoded.
    pub fn unsubscribe(&mut self, filters: Vec<String>) -> Result<(), ConnectionError> {
        self.put(&Packet::Unsubscribe(Unsubscribe { pkid: UNSUBSCRIBE_ID, filters, properties: None }))
    }

    /// Ends the session (session expiry 0 in DISCONNECT: MQTT 5.0, 3.14.2.2.2), and waits until the broker has closed the connection: then
    /// the session has ended.
    ///
    /// # Errors
    /// If the broker does not close the connection in time.
    pub async fn end_session(mut self) -> Result<(), ConnectionError> {
        let mut disconnect = Disconnect::new(DisconnectReasonCode::NormalDisconnection);
        disconnect.properties = Some(DisconnectProperties {
            session_expiry_interval: Some(0),
            reason_string: None,
            user_properties: Vec::new(),
            server_reference: None,
        });
        self.put(&Packet::Disconnect(disconnect))?;
        self.flush_all().await?;
        let closed = async { while self.ready(true).await.is_ok() && self.read().is_ok() {} };
        timeout(CONNECT_TIMEOUT, closed).await.map_err(|_| ConnectionError::Close { seconds: CONNECT_TIMEOUT.as_secs() })
    }

    /// Disconnects and closes the connection. The broker keeps a persistent session.
    pub async fn close(mut self) {
        let disconnect = Packet::Disconnect(Disconnect::new(DisconnectReasonCode::NormalDisconnection));
        if self.put(&disconnect).is_ok() {
            // A broker that does not read keeps the session as well, so failures and timeouts have no consequence.
            let _ = timeout(CONNECT_TIMEOUT, self.flush_all()).await;
            let _ = timeout(CONNECT_TIMEOUT, self.stream.shutdown()).await;
        }
    }

    /// Writes the whole output.
    ///
    /// # Errors
    /// If the socket fails.
    pub async fn flush_all(&mut self) -> Result<(), ConnectionError> {
        self.flush()?;
        while !self.output.is_empty() || self.stream.has_unsent() {
            self.ready(false).await?;
            self.flush()?;
        }
        Ok(())
    }

    /// Buffers a packet.
    ///
    /// # Errors
    /// If the packet cannot be encoded.
    pub fn put(&mut self, packet: &Packet) -> Result<(), ConnectionError> {
        packet.write(&mut self.output, None).map(drop).map_err(ConnectionError::Encode)
    }
}

fn connect_packet(login: &Login, settings: &ConnectSettings) -> Packet {
    let (clean_start, session_expiry_interval) = match settings.session {
        BrokerSession::Clean => (true, None),
        BrokerSession::Persistent { expiry_seconds } => (false, Some(expiry_seconds)),
    };
    let properties = ConnectProperties {
        session_expiry_interval,
        receive_maximum: settings.receive_maximum,
        max_packet_size: settings.max_packet_bytes,
        ..ConnectProperties::new()
    };
    let connect =
        Connect { keep_alive: settings.keep_alive_seconds, client_id: login.client_id.clone(), clean_start, properties: Some(properties) };
    let auth = ConnectAuth::UsernamePassword { username: login.username.clone(), password: login.password.clone() };
    Packet::Connect(connect, None, auth)
}

/// The packets of a block.
pub fn packets(block: &Bytes) -> impl Iterator<Item = Result<Frame, ConnectionError>> + '_ {
    frames(block).map(|frame| frame.map_err(ConnectionError::from))
}
