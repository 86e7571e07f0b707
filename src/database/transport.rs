//! The bytes between a client and a database: TLS as the URI requires, and limits on what the server sends.
//!
//! The limits apply to the decrypted messages, with and without TLS, so this module requests TLS instead of the client library
//! (<https://www.postgresql.org/docs/current/protocol-flow.html#PROTOCOL-FLOW-SSL>). The library believes that it connects with TLS directly.

use std::error::Error;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadBuf};
use tokio_postgres::Socket;
use tokio_postgres::tls::{ChannelBinding, MakeTlsConnect, TlsConnect, TlsStream};
use tokio_postgres_rustls::MakeRustlsConnect;

use super::read_limits::{MessageMeter, ReadLimits};
use super::uri::TlsMode;

/// The request for TLS: its length and its code.
const SSL_REQUEST: [u8; 8] = [0, 0, 0, 8, 0x04, 0xd2, 0x16, 0x2f];

type Rustls = <MakeRustlsConnect as MakeTlsConnect<Socket>>::TlsConnect;
type RustlsStream = <MakeRustlsConnect as MakeTlsConnect<Socket>>::Stream;
type BoxError = Box<dyn Error + Send + Sync>;

/// Why there is no encrypted connection.
#[derive(Debug, thiserror::Error)]
pub enum EncryptError {
    /// The server has no TLS.
    #[error("the server does not offer TLS, which sslmode in the URI requires: turn it on there, or change sslmode")]
    OfferTls,

    /// Another answer than `S` or `N`.
    #[error("the server answered the request for TLS with byte {byte:#04x}: expected S or N; is it a PostgreSQL server?")]
    Answer {
        /// The answer.
        byte: u8,
    },
}

/// Opens connections with these settings.
#[derive(Clone)]
pub struct Transport {
    /// The TLS library.
    pub tls: MakeRustlsConnect,
    /// What the URI requires.
    pub mode: TlsMode,
    /// Whether the server expects TLS without a request (`sslnegotiation=direct`).
    pub direct: bool,
    /// What is accepted from the server.
    pub limits: ReadLimits,
}

impl MakeTlsConnect<Socket> for Transport {
    type Stream = DatabaseStream;
    type TlsConnect = Handshake;
    type Error = BoxError;

    fn make_tls_connect(&mut self, host: &str) -> Result<Handshake, BoxError> {
        let tls = match self.mode {
            TlsMode::Disable => None,
            TlsMode::Prefer | TlsMode::Require | TlsMode::VerifyFull => {
                Some(MakeTlsConnect::<Socket>::make_tls_connect(&mut self.tls, host)?)
            }
        };
        Ok(Handshake { tls, required: self.mode != TlsMode::Prefer, direct: self.direct, limits: self.limits })
    }
}

/// The beginning of a connection.
pub struct Handshake {
    tls: Option<Rustls>,
    required: bool,
    direct: bool,
    limits: ReadLimits,
}

impl TlsConnect<Socket> for Handshake {
    type Stream = DatabaseStream;
    type Error = BoxError;
    type Future = Pin<Box<dyn Future<Output = Result<DatabaseStream, BoxError>> + Send>>;

    fn connect(self, socket: Socket) -> Self::Future {
        Box::pin(async move {
            let limits = self.limits;
            Ok(DatabaseStream { bytes: self.encrypt(socket).await?, meter: MessageMeter::new(limits) })
        })
    }
}

impl Handshake {
    async fn encrypt(self, mut socket: Socket) -> Result<Bytes, BoxError> {
        let Some(tls) = self.tls else { return Ok(Bytes::Plain(socket)) };
        if !self.direct {
            socket.write_all(&SSL_REQUEST).await?;
            // Exactly one byte: anything after it has to be encrypted.
            match socket.read_u8().await? {
                b'S' => {}
                b'N' if self.required => return Err(EncryptError::OfferTls.into()),
                b'N' => return Ok(Bytes::Plain(socket)),
                byte => return Err(EncryptError::Answer { byte }.into()),
            }
        }
        Ok(Bytes::Encrypted(Box::new(tls.connect(socket).await?)))
    }
}

enum Bytes {
    Plain(Socket),
    Encrypted(Box<RustlsStream>),
}

/// A connection whose incoming messages are limited.
pub struct DatabaseStream {
    bytes: Bytes,
    meter: MessageMeter,
}

impl TlsStream for DatabaseStream {
    fn channel_binding(&self) -> ChannelBinding {
        match &self.bytes {
            Bytes::Plain(_) => ChannelBinding::none(),
            Bytes::Encrypted(stream) => stream.channel_binding(),
        }
    }
}

impl AsyncRead for DatabaseStream {
    fn poll_read(mut self: Pin<&mut Self>, context: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        let this = &mut *self;
        ready!(match &mut this.bytes {
            Bytes::Plain(socket) => Pin::new(socket).poll_read(context, buffer),
            Bytes::Encrypted(stream) => Pin::new(&mut **stream).poll_read(context, buffer),
        })?;
        let observed = this.meter.observe(&buffer.filled()[before..]);
        Poll::Ready(observed.map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error)))
    }
}

impl AsyncWrite for DatabaseStream {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        match &mut self.bytes {
            Bytes::Plain(socket) => Pin::new(socket).poll_write(context, bytes),
            Bytes::Encrypted(stream) => Pin::new(&mut **stream).poll_write(context, bytes),
        }
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut self.bytes {
            Bytes::Plain(socket) => Pin::new(socket).poll_flush(context),
            Bytes::Encrypted(stream) => Pin::new(&mut **stream).poll_flush(context),
        }
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut self.bytes {
            Bytes::Plain(socket) => Pin::new(socket).poll_shutdown(context),
            Bytes::Encrypted(stream) => Pin::new(&mut **stream).poll_shutdown(context),
        }
    }
}
