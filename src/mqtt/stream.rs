//! A TCP stream with or without TLS, with reads and writes that do not wait.

use std::io::{self, ErrorKind, Read, Write};
use std::sync::Arc;

use bytes::BytesMut;
use rustls::{ClientConfig, ClientConnection};
use rustls_pki_types::ServerName;
use tokio::io::{AsyncWriteExt, Interest};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;

/// A stream of bytes.
#[derive(Debug)]
pub enum Stream {
    /// Plain TCP.
    Plain(TcpStream),
    /// TLS.
    Encrypted(Box<Encrypted>),
}

/// TLS over TCP.
#[derive(Debug)]
pub struct Encrypted {
    socket: TcpStream,
    session: ClientConnection,
}

impl Stream {
    /// Connects, and performs the TLS handshake if `tls` is given.
    pub async fn open(host: &str, port: u16, tls: Option<&Arc<ClientConfig>>) -> io::Result<Self> {
        let socket = TcpStream::connect((host, port)).await?;
        socket.set_nodelay(true)?;
        let Some(tls) = tls else { return Ok(Self::Plain(socket)) };
        let name = ServerName::try_from(host.to_owned()).map_err(io::Error::other)?;
        let (socket, session) = TlsConnector::from(Arc::clone(tls)).connect(name, socket).await?.into_inner();
        Ok(Self::Encrypted(Box::new(Encrypted { socket, session })))
    }

    fn socket(&self) -> &TcpStream {
        match self {
            Self::Plain(socket) => socket,
            Self::Encrypted(encrypted) => &encrypted.socket,
        }
    }

    /// Waits until the socket is readable, if `read`, or writable, if `write` or if TLS has unsent records. Waits forever if none
    /// applies. Returns whether the socket is readable. Cancel safe.
    pub async fn ready(&self, read: bool, write: bool) -> io::Result<bool> {
        let interest = match (read, write || self.has_unsent()) {
            (true, false) => Interest::READABLE,
            (true, true) => Interest::READABLE | Interest::WRITABLE,
            (false, true) => Interest::WRITABLE,
            (false, false) => return std::future::pending().await,
        };
        Ok(self.socket().ready(interest).await?.is_readable() && read)
    }

    /// Reads available bytes; 0 at the end of the stream. With TLS it returns all decrypted bytes, because the socket does not report them.
    pub fn try_read(&mut self, input: &mut BytesMut) -> io::Result<usize> {
        match self {
            Self::Plain(socket) => socket.try_read_buf(input),
            Self::Encrypted(encrypted) => encrypted.try_read(input),
        }
    }

    /// Writes without waiting.
    pub fn try_write(&mut self, output: &[u8]) -> io::Result<usize> {
        match self {
            Self::Plain(socket) => socket.try_write(output),
            Self::Encrypted(encrypted) => {
                let taken = encrypted.session.writer().write(output)?;
                encrypted.push()?;
                // The buffer of TLS is bounded.
                if taken == 0 && !output.is_empty() { Err(ErrorKind::WouldBlock.into()) } else { Ok(taken) }
            }
        }
    }

    /// Writes buffered TLS records without waiting.
    pub fn push(&mut self) -> io::Result<()> {
        match self {
            Self::Plain(_) => Ok(()),
            Self::Encrypted(encrypted) => encrypted.push(),
        }
    }

    /// Whether TLS has buffered records.
    pub fn has_unsent(&self) -> bool {
        match self {
            Self::Plain(_) => false,
            Self::Encrypted(encrypted) => encrypted.session.wants_write(),
        }
    }

    /// Closes the sending direction.
    pub async fn shutdown(&mut self) -> io::Result<()> {
        match self {
            Self::Plain(socket) => socket.shutdown().await,
            Self::Encrypted(encrypted) => {
                encrypted.session.send_close_notify();
                encrypted.push()?;
                encrypted.socket.shutdown().await
            }
        }
    }
}

impl Encrypted {
    fn try_read(&mut self, input: &mut BytesMut) -> io::Result<usize> {
        if self.session.read_tls(&mut Socket(&self.socket))? == 0 {
            return Ok(0);
        }
        let found = self.session.process_new_packets().map_err(|error| {
            // Sends the TLS alert if possible. The connection fails in any case.
            let _ = self.session.write_tls(&mut Socket(&self.socket));
            io::Error::other(error)
        })?;
        let (start, length) = (input.len(), found.plaintext_bytes_to_read());
        if length == 0 {
            return if found.peer_has_closed() { Ok(0) } else { Err(ErrorKind::WouldBlock.into()) };
        }
        input.resize(start + length, 0);
        self.session.reader().read_exact(&mut input[start..])?;
        Ok(length)
    }

    fn push(&mut self) -> io::Result<()> {
        while self.session.wants_write() {
            match self.session.write_tls(&mut Socket(&self.socket)) {
                Ok(_) => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(()),
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}

/// The blocking I/O traits of rustls on a socket that does not wait.
struct Socket<'a>(&'a TcpStream);

impl Read for Socket<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.0.try_read(buffer)
    }
}

impl Write for Socket<'_> {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        self.0.try_write(buffer)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
