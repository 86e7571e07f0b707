//! The bytes of a connection, encrypted or not, without ever waiting but where that is asked for.

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
    /// Connects and, with TLS, shakes hands.
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

    /// Waits until there is something to read, if `read`, or until something can be written, if `write` or if TLS itself has
    /// something to say. With none of these, for ever. Whether there is something to read.
    pub async fn ready(&self, read: bool, write: bool) -> io::Result<bool> {
        let interest = match (read, write || self.has_unsent()) {
            (true, false) => Interest::READABLE,
            (true, true) => Interest::READABLE | Interest::WRITABLE,
            (false, true) => Interest::WRITABLE,
            (false, false) => return std::future::pending().await,
        };
        Ok(self.socket().ready(interest).await?.is_readable() && read)
    }

    /// Reads what there is, or a part of it; 0 at the end. Nothing that was decrypted is left behind, for nothing would tell of it.
    pub fn try_read(&mut self, input: &mut BytesMut) -> io::Result<usize> {
        match self {
            Self::Plain(socket) => socket.try_read_buf(input),
            Self::Encrypted(encrypted) => encrypted.try_read(input),
        }
    }

    /// Writes what can be written.
    pub fn try_write(&mut self, output: &[u8]) -> io::Result<usize> {
        match self {
            Self::Plain(socket) => socket.try_write(output),
            Self::Encrypted(encrypted) => {
                let taken = encrypted.session.writer().write(output)?;
                encrypted.push()?;
                // Its buffer is bounded, and may be full.
                if taken == 0 && !output.is_empty() { Err(ErrorKind::WouldBlock.into()) } else { Ok(taken) }
            }
        }
    }

    /// Writes what TLS has taken and not written yet, as far as that is possible.
    pub fn push(&mut self) -> io::Result<()> {
        match self {
            Self::Plain(_) => Ok(()),
            Self::Encrypted(encrypted) => encrypted.push(),
        }
    }

    /// Whether TLS has taken something that is not written yet.
    pub fn has_unsent(&self) -> bool {
        match self {
            Self::Plain(_) => false,
            Self::Encrypted(encrypted) => encrypted.session.wants_write(),
        }
    }

    /// Says that nothing more will come.
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
            // Says why it gives up, where that is possible.
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

/// A socket that never waits, as rustls wants it.
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
