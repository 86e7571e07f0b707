//! A device's way to its broker: address, encryption, login.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures::{SinkExt, StreamExt};
use rumqttc::mqttbytes::v5::{Codec, Connect, ConnectAuth, ConnectReturnCode, Packet};
use rustls::ClientConfig;
use rustls_pki_types::ServerName;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_rustls::TlsConnector;
use tokio_util::codec::Framed;

/// How long a login may take. A broker that reads its credentials again answers after up to a second.
const LOGIN_TIMEOUT: Duration = Duration::from_secs(10);

/// Seconds after which the broker takes a silent device for gone, at one and a half times that.
pub const KEEP_ALIVE_SECONDS: u16 = 60;

/// The largest packet that a broker may send to a device; it sends acknowledgements.
const LARGEST_INCOMING: u32 = 64 * 1024;

/// Where and how to connect.
#[derive(Clone, Debug)]
pub struct Endpoint {
    /// Host name or address.
    pub host: String,
    /// Port.
    pub port: u16,
    /// Encryption; none for a plain listener.
    pub tls: Option<Arc<ClientConfig>>,
}

/// Why there is no connection.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// No answer in time.
    #[error("failed to log in at {endpoint} within {} s", LOGIN_TIMEOUT.as_secs())]
    Await {
        /// Host and port.
        endpoint: String,
    },

    /// The broker refused the login.
    #[error("failed to log in at {endpoint}: the broker answered {code:?}")]
    Refuse {
        /// Host and port.
        endpoint: String,
        /// The answer.
        code: ConnectReturnCode,
    },

    /// The network.
    #[error("failed to talk to the broker at {endpoint}")]
    Talk {
        /// Host and port.
        endpoint: String,
        /// What failed.
        source: io::Error,
    },

    /// The protocol.
    #[error("failed to understand the broker at {endpoint}")]
    Understand {
        /// Host and port.
        endpoint: String,
        /// What failed.
        source: rumqttc::mqttbytes::Error,
    },
}

/// A stream of bytes, encrypted or not.
pub trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}

impl<T: AsyncRead + AsyncWrite + Send + Unpin> Stream for T {}

/// A connection of packets.
pub type Connection = Framed<Box<dyn Stream>, Codec>;

impl Endpoint {
    /// Connects and logs in with a clean session: a device subscribes to nothing.
    pub async fn connect(&self, username: &str, password: &Bytes) -> Result<Connection, ConnectError> {
        let endpoint = format!("{}:{}", self.host, self.port);
        match timeout(LOGIN_TIMEOUT, self.log_in(&endpoint, username, password)).await {
            Ok(connected) => connected,
            Err(_) => Err(ConnectError::Await { endpoint }),
        }
    }

    async fn log_in(&self, endpoint: &str, username: &str, password: &Bytes) -> Result<Connection, ConnectError> {
        let talk = |source| ConnectError::Talk { endpoint: endpoint.to_owned(), source };
        let understand = |source| ConnectError::Understand { endpoint: endpoint.to_owned(), source };
        let stream = self.open().await.map_err(talk)?;
        let codec = Codec { max_incoming_size: Some(LARGEST_INCOMING), max_outgoing_size: None };
        let mut connection = Framed::new(stream, codec);
        let connect = Connect { keep_alive: KEEP_ALIVE_SECONDS, client_id: username.to_owned(), clean_start: true, properties: None };
        let auth = ConnectAuth::UsernamePassword { username: username.to_owned(), password: password.clone() };
        connection.send(Packet::Connect(connect, None, auth)).await.map_err(understand)?;
        match connection.next().await {
            Some(Ok(Packet::ConnAck(answer))) if answer.code == ConnectReturnCode::Success => Ok(connection),
            Some(Ok(Packet::ConnAck(answer))) => Err(ConnectError::Refuse { endpoint: endpoint.to_owned(), code: answer.code }),
            Some(Err(error)) => Err(understand(error)),
            Some(Ok(_)) => Err(understand(rumqttc::mqttbytes::Error::ProtocolError)),
            None => Err(talk(io::ErrorKind::UnexpectedEof.into())),
        }
    }

    async fn open(&self) -> io::Result<Box<dyn Stream>> {
        let stream = TcpStream::connect((self.host.as_str(), self.port)).await?;
        stream.set_nodelay(true)?;
        let Some(tls) = &self.tls else { return Ok(Box::new(stream)) };
        let name = ServerName::try_from(self.host.clone()).map_err(io::Error::other)?;
        Ok(Box::new(TlsConnector::from(tls.clone()).connect(name, stream).await?))
    }
}
