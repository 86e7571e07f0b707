//! Limits on what is read from a database: pure.
//!
//! The client library allocates a buffer as large as the server announces, collects all rows of an answer, and hashes a password as often as
//! the server asks. A tenant names the server, so all three need a limit before the library sees the bytes.

/// The most bytes that a server may send before it is ready for the first query: parameters, notices and the authentication. PostgreSQL sends
/// about 500.
const MAX_STARTUP_BYTES: u64 = 1 << 20;

/// The most bytes of parameter values that a server may send on one connection. The library keeps them all.
const MAX_PARAMETER_BYTES: u64 = 1 << 20;

/// What a message costs in memory beside its bytes: the row of the library with its allocations.
const MESSAGE_OVERHEAD_BYTES: u64 = 256;

/// The most iterations of the password hash that a server may ask for (SCRAM, RFC 5802), a tenth of a second. PostgreSQL asks for 4,096
/// unless `scram_iterations` says otherwise.
const MAX_SCRAM_ITERATIONS: u32 = 100_000;

/// The longest message of the authentication. PostgreSQL sends less than 150 bytes.
const MAX_AUTHENTICATION_BYTES: u64 = 4_096;

/// Type byte and length (<https://www.postgresql.org/docs/current/protocol-message-formats.html>).
const HEADER_BYTES: usize = 5;

/// Type bytes of messages.
const AUTHENTICATION: u8 = b'R';
const NOTIFICATION: u8 = b'A';
const PARAMETER_STATUS: u8 = b'S';
const READY_FOR_QUERY: u8 = b'Z';

/// The second message of SCRAM, with the iterations.
const SASL_CONTINUE: [u8; 4] = 11_u32.to_be_bytes();

/// What is accepted from a server.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct ReadLimits {
    /// The largest message, in bytes.
    message_bytes: u64,
    /// The largest answer to one query, in bytes with [`MESSAGE_OVERHEAD_BYTES`] for each row; `None` without a limit.
    answer_bytes: Option<u64>,
}

impl ReadLimits {
    /// For the operator, which all tenants share and which reads few and short rows: 16 MiB are some 50,000 of them.
    pub const OPERATOR: Self = Self { message_bytes: 4 << 20, answer_bytes: Some(16 << 20) };

    /// For a worker and the command-line tools: the largest message holds the payload of a dead letter, and the answer all devices of a
    /// namespace. A worker reads only the database of its own Pipeline.
    pub const WORKER: Self = Self { message_bytes: 64 << 20, answer_bytes: None };
}

/// A server sent more than is accepted. The connection must end.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
pub enum ReadLimitError {
    /// The length of a message is not one.
    #[error("the server announced a message of {bytes} bytes: expected at least 4; is it a PostgreSQL server?")]
    MeasureMessage {
        /// The announced length.
        bytes: i32,
    },

    /// A message is too large.
    #[error("the server announced a message of {bytes} bytes: expected at most {max}")]
    ReadMessage {
        /// The announced length.
        bytes: u64,
        /// The limit.
        max: u64,
    },

    /// An answer is too large.
    #[error("the answer of the server exceeds {max} bytes: expected fewer rows; delete rows from the tables of the schema fleetwright")]
    ReadAnswer {
        /// The limit.
        max: u64,
    },

    /// The server sends too much before the first query, or too many parameters.
    #[error("the server sent more than {max} bytes that answer no query: expected a few hundred; is it a PostgreSQL server?")]
    ReadUnasked {
        /// The limit.
        max: u64,
    },

    /// The password would be hashed too often.
    #[error(
        "the server asks to hash the password {iterations} times: expected at most {MAX_SCRAM_ITERATIONS}; lower scram_iterations there"
    )]
    HashPassword {
        /// The number of times.
        iterations: u32,
    },
}

/// Follows the messages of a server, and finds the first that exceeds a limit.
#[derive(Debug)]
pub struct MessageMeter {
    limits: ReadLimits,
    header: [u8; HEADER_BYTES],
    /// Bytes of the header that are known.
    header_bytes: usize,
    /// Bytes of the message's body that are to come.
    body_left: u64,
    /// The body of a message of the authentication.
    authentication: Vec<u8>,
    /// Whether the server has been ready for a query.
    started: bool,
    answer: u64,
    parameters: u64,
}

impl MessageMeter {
    /// At the beginning of a connection.
    #[must_use]
    pub fn new(limits: ReadLimits) -> Self {
        Self {
            limits,
            header: [0; HEADER_BYTES],
            header_bytes: 0,
            body_left: 0,
            authentication: Vec::new(),
            started: false,
            answer: 0,
            parameters: 0,
        }
    }

    /// Observes the next bytes of the server.
    ///
    /// # Errors
    /// The limit that they exceed.
    pub fn observe(&mut self, mut bytes: &[u8]) -> Result<(), ReadLimitError> {
        while !bytes.is_empty() {
            if self.body_left > 0 {
                let taken = usize::try_from(self.body_left).unwrap_or(usize::MAX).min(bytes.len());
                self.observe_body(&bytes[..taken])?;
                bytes = &bytes[taken..];
                continue;
            }
            let taken = (HEADER_BYTES - self.header_bytes).min(bytes.len());
            self.header[self.header_bytes..self.header_bytes + taken].copy_from_slice(&bytes[..taken]);
            self.header_bytes += taken;
            bytes = &bytes[taken..];
            if self.header_bytes == HEADER_BYTES {
                self.header_bytes = 0;
                self.observe_header()?;
            }
        }
        Ok(())
    }

    fn observe_header(&mut self) -> Result<(), ReadLimitError> {
        let [kind, length @ ..] = self.header;
        let length = i32::from_be_bytes(length);
        // The length includes itself.
        let body = u64::try_from(length).ok().and_then(|length| length.checked_sub(4));
        let body = body.ok_or(ReadLimitError::MeasureMessage { bytes: length })?;
        let authenticates = kind == AUTHENTICATION && !self.started;
        let max = if authenticates { MAX_AUTHENTICATION_BYTES.min(self.limits.message_bytes) } else { self.limits.message_bytes };
        if body > max {
            return Err(ReadLimitError::ReadMessage { bytes: body, max });
        }
        self.body_left = body;
        self.authentication.clear();
        let cost = body + MESSAGE_OVERHEAD_BYTES;
        match kind {
            PARAMETER_STATUS => {
                self.parameters += cost;
                if self.parameters > MAX_PARAMETER_BYTES {
                    return Err(ReadLimitError::ReadUnasked { max: MAX_PARAMETER_BYTES });
                }
            }
            // A connection that listens receives them for months, and the library keeps none of them. It logs each notice.
            NOTIFICATION if self.started => {}
            READY_FOR_QUERY => (self.started, self.answer) = (true, 0),
            _ => self.answer += cost,
        }
        match (self.started, self.limits.answer_bytes) {
            (false, _) if self.answer > MAX_STARTUP_BYTES => Err(ReadLimitError::ReadUnasked { max: MAX_STARTUP_BYTES }),
            (true, Some(max)) if self.answer > max => Err(ReadLimitError::ReadAnswer { max }),
            _ => Ok(()),
        }
    }

    fn observe_body(&mut self, bytes: &[u8]) -> Result<(), ReadLimitError> {
        self.body_left -= bytes.len() as u64;
        if self.header[0] != AUTHENTICATION || self.started {
            return Ok(());
        }
        self.authentication.extend_from_slice(bytes);
        let iterations = scram_iterations(&self.authentication).filter(|_| self.body_left == 0);
        match iterations {
            Some(iterations) if iterations > MAX_SCRAM_ITERATIONS => Err(ReadLimitError::HashPassword { iterations }),
            _ => Ok(()),
        }
    }
}

/// The iterations in a message of the authentication: `r=<nonce>,s=<salt>,i=<iterations>` (RFC 5802, section 7). A number that is too
/// large counts as the largest.
fn scram_iterations(body: &[u8]) -> Option<u32> {
    let attributes = body.strip_prefix(&SASL_CONTINUE)?.split(|byte| *byte == b',');
    let number = |digits: &[u8]| std::str::from_utf8(digits).ok().and_then(|text| text.parse().ok()).unwrap_or(u32::MAX);
    attributes.filter_map(|attribute| attribute.strip_prefix(b"i=")).map(number).max()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn message(kind: u8, body: &[u8]) -> Vec<u8> {
        let length = i32::try_from(body.len() + 4).unwrap();
        [&[kind][..], &length.to_be_bytes(), body].concat()
    }

    fn observe(limits: ReadLimits, bytes: &[u8]) -> Result<(), ReadLimitError> {
        MessageMeter::new(limits).observe(bytes)
    }

    const SMALL: ReadLimits = ReadLimits { message_bytes: 100, answer_bytes: Some(2_000) };

    #[test]
    fn lengths_are_checked_when_they_are_announced() {
        for (length, expected) in [
            (4, Ok(())),
            (104, Ok(())),
            (105, Err(ReadLimitError::ReadMessage { bytes: 101, max: 100 })),
            (1 << 30, Err(ReadLimitError::ReadMessage { bytes: (1 << 30) - 4, max: 100 })),
            (3, Err(ReadLimitError::MeasureMessage { bytes: 3 })),
            (-1, Err(ReadLimitError::MeasureMessage { bytes: -1 })),
        ] {
            let header = [&b"D"[..], &i32::to_be_bytes(length)].concat();
            assert_eq!(observe(SMALL, &header), expected, "{length}");
        }
    }

    #[test]
    fn the_rows_of_an_answer_are_counted_until_the_next_query() {
        let ready = message(READY_FOR_QUERY, b"I");
        let rows = |count: usize| [ready.clone(), message(b'D', &[0; 10]).repeat(count), ready.clone()].concat();
        assert_eq!(observe(SMALL, &rows(7).repeat(10)), Ok(()), "seven rows of 266 bytes, again and again");
        assert_eq!(observe(SMALL, &rows(8)), Err(ReadLimitError::ReadAnswer { max: 2_000 }));
        assert_eq!(observe(ReadLimits { answer_bytes: None, ..SMALL }, &rows(100_000)), Ok(()));
        let notifications = [ready, message(NOTIFICATION, &[0; 10]).repeat(1_000)].concat();
        assert_eq!(observe(SMALL, &notifications), Ok(()), "a connection that listens receives them for months");
    }

    #[test]
    fn a_server_that_never_becomes_ready_is_bounded() {
        for kind in [b'N', NOTIFICATION, PARAMETER_STATUS, b'D'] {
            let error = observe(ReadLimits::WORKER, &message(kind, &[0; 1_000]).repeat(2_000));
            assert_eq!(error, Err(ReadLimitError::ReadUnasked { max: 1 << 20 }), "{}", char::from(kind));
        }
        let parameters = [message(READY_FOR_QUERY, b"I"), message(PARAMETER_STATUS, &[0; 1_000])].concat();
        assert!(observe(ReadLimits::WORKER, &parameters.repeat(2_000)).is_err());
    }

    #[test]
    fn the_password_is_not_hashed_without_end() {
        let scram = |attributes: &str| message(AUTHENTICATION, &[&SASL_CONTINUE[..], attributes.as_bytes()].concat());
        for (attributes, expected) in [
            ("r=a,s=b,i=4096", Ok(())),
            ("r=a,s=b,i=100000", Ok(())),
            ("r=a,s=b,i=100001", Err(ReadLimitError::HashPassword { iterations: 100_001 })),
            ("r=a,s=b,i=99999999999", Err(ReadLimitError::HashPassword { iterations: u32::MAX })),
            ("r=a,s=b,i=2000000000,i=1", Err(ReadLimitError::HashPassword { iterations: 2_000_000_000 })),
            ("r=a,s=b", Ok(())),
        ] {
            assert_eq!(observe(ReadLimits::OPERATOR, &scram(attributes)), expected, "{attributes}");
        }
        let padded = format!("r={},s=b,i=2000000000", "a".repeat(10_000));
        assert!(matches!(observe(ReadLimits::OPERATOR, &scram(&padded)), Err(ReadLimitError::ReadMessage { max: 4_096, .. })));
    }

    proptest! {
        #[test]
        fn the_pieces_in_which_bytes_arrive_do_not_matter(
            bytes in prop::collection::vec(any::<u8>(), 0..600),
            messages in prop::collection::vec((any::<u8>(), 0_usize..120), 0..20),
            piece in 1_usize..40,
        ) {
            let mut stream: Vec<u8> = messages.iter().flat_map(|(kind, length)| message(*kind, &vec![b'x'; *length])).collect();
            stream.extend(bytes);
            let mut meter = MessageMeter::new(SMALL);
            let in_pieces = stream.chunks(piece).try_for_each(|piece| meter.observe(piece));
            prop_assert_eq!(in_pieces, observe(SMALL, &stream));
        }
    }
}
