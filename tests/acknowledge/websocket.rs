//! MQTT over WebSockets (RFC 6455), from the client's side: as little of it as a test needs.

use std::io::{Error, ErrorKind, Read, Write};

use bytes::{Buf, BytesMut};

/// Opcodes (section 5.2).
const BINARY: u8 = 0x2;
const CLOSE: u8 = 0x8;

/// Marks the last frame of a message, and a payload that is masked.
const FINAL: u8 = 0x80;
const MASKED: u8 = 0x80;

/// The masking key, which clients have to use. Any value is valid.
const KEY: [u8; 4] = [0x17, 0x2a, 0x3d, 0x4c];

/// A stream of bytes inside binary frames.
pub struct WebSocket<S> {
    stream: S,
    /// Bytes from the broker that are not parsed yet, and payloads that are not read yet.
    frames: BytesMut,
    payloads: BytesMut,
}

impl<S: Read + Write> WebSocket<S> {
    /// Opens it (section 4.1).
    pub fn open(mut stream: S) -> std::io::Result<Self> {
        let request = "GET /mqtt HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\
                       Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Protocol: mqtt\r\n\r\n";
        stream.write_all(request.as_bytes())?;
        let mut answer = Vec::new();
        // Byte by byte: what follows the header is the first frame.
        while !answer.ends_with(b"\r\n\r\n") {
            let mut byte = [0];
            stream.read_exact(&mut byte)?;
            answer.push(byte[0]);
        }
        if !answer.starts_with(b"HTTP/1.1 101 ") {
            return Err(Error::new(ErrorKind::InvalidData, String::from_utf8_lossy(&answer)));
        }
        Ok(Self { stream, frames: BytesMut::new(), payloads: BytesMut::new() })
    }

    /// Takes a frame that has arrived in whole; `None` where there is none yet.
    fn next_frame(&mut self) -> Option<u8> {
        let [first, short, rest @ ..] = &self.frames[..] else { return None };
        let (header, length) = match (short, rest) {
            (126, [high, low, ..]) => (4, usize::from(u16::from_be_bytes([*high, *low]))),
            (126 | 127, _) => return None,
            (short, _) => (2, usize::from(*short)),
        };
        let opcode = first & 0x0f;
        if self.frames.len() < header + length {
            return None;
        }
        self.frames.advance(header);
        let payload = self.frames.split_to(length);
        if opcode == BINARY {
            self.payloads.extend_from_slice(&payload);
        }
        Some(opcode)
    }
}

impl<S: Read + Write> Read for WebSocket<S> {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let mut chunk = [0; 8192];
        while self.payloads.is_empty() {
            match self.next_frame() {
                Some(CLOSE) => return Ok(0),
                Some(_) => {}
                None => match self.stream.read(&mut chunk)? {
                    0 => return Ok(0),
                    read => self.frames.extend_from_slice(&chunk[..read]),
                },
            }
        }
        let length = buffer.len().min(self.payloads.len());
        self.payloads.copy_to_slice(&mut buffer[..length]);
        Ok(length)
    }
}

impl<S: Read + Write> Write for WebSocket<S> {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        let length = bytes.len().min(usize::from(u16::MAX));
        let mut frame = vec![FINAL | BINARY];
        match u8::try_from(length) {
            Ok(short) if short < 126 => frame.push(MASKED | short),
            _ => {
                frame.push(MASKED | 0x7e);
                frame.extend_from_slice(&u16::try_from(length).unwrap().to_be_bytes());
            }
        }
        frame.extend_from_slice(&KEY);
        frame.extend(bytes[..length].iter().zip(KEY.iter().cycle()).map(|(byte, key)| byte ^ key));
        self.stream.write_all(&frame)?;
        Ok(length)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        self.stream.flush()
    }
}
