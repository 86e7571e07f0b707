//! Parses the events of connections from a line of Mosquitto's log (2.1.2; in its file, and as `$SYS/broker/log/N` and `/I`).
//!
//! Clients choose the names in these lines, and may imitate other parts of a line. Only the start and the end of a line come from the
//! broker for certain. An ambiguous line is ignored.

use jiff::civil::DateTime;
use jiff::tz::TimeZone;
use serde::{Deserialize, Serialize};

/// Mosquitto cuts a line at this number of bytes (its buffer of 1,000, less the final NUL): the end of a longer line comes from the
/// client, not from the broker.
pub const MAX_LINE_BYTES: usize = 999;

/// The broker's text when a client closes a connection without sending TLS: SSL_R_UNEXPECTED_EOF_WHILE_READING of OpenSSL 3.
const UNEXPECTED_END: &str = "OpenSSL Error while trying to get the error[0]: error:0A000126:";

/// The event of a line, and its time.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Line<'a> {
    /// Seconds since 1970, if the line has a time.
    pub time: Option<i64>,
    /// The event.
    pub event: Event<'a>,
}

/// The event.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Event<'a> {
    /// The broker starts: no client is connected.
    BrokerStarting,

    /// The broker accepts connections.
    BrokerRunning,

    /// The broker stops gracefully: no client is connected any more.
    BrokerStopping,

    /// A client was accepted.
    Connected {
        /// Its client identifier.
        client: &'a str,
        /// Its address and port.
        address: &'a str,
    },

    /// A connection ended. Only its address shows whether it had been accepted: for a refused client this event has the claimed name.
    Disconnected {
        /// The client identifier; the address without port if the client sent none.
        client: &'a str,
        /// Address and port.
        address: &'a str,
        /// The reason.
        reason: Reason,
    },

    /// The client closed the connection that ends with the next line during the TLS handshake. This distinguishes a probe that only opens
    /// the port from a failed handshake.
    TlsAborted,

    /// A connection was refused at once, because the listener has reached its maximum.
    Denied {
        /// Address without port.
        address: &'a str,
    },

    /// An event of a client whose name is so long that the rest of the line is missing.
    Cut {
        /// The beginning of the name.
        client: &'a str,
    },
}

/// Why a connection ended or was refused.
#[derive(Clone, Copy, Debug, Deserialize, Eq, Hash, Ord, PartialEq, PartialOrd, Serialize)]
pub enum Reason {
    /// The client sent DISCONNECT, or its credential was removed.
    Orderly,
    /// The client closed the connection without DISCONNECT.
    ClosedByClient,
    /// The client sent nothing for one and a half of its keep-alive intervals.
    KeepAliveTimeout,
    /// The same client connected again.
    SessionTakenOver,
    /// User name or password is wrong, or its certificate is not accepted.
    NotAuthorised,
    /// The client identifier breaks the rules of MQTT.
    ClientIdentifierNotValid,
    /// The client sent data that is not MQTT.
    ProtocolError,
    /// The client sent data that is not TLS, or the TLS handshake failed.
    TlsHandshakeFailed,
    /// The listener has reached its maximum of connections.
    ConnectionLimit,
    /// The client published while the broker was full.
    BrokerFull,
    /// Any other.
    Other,
}

impl Reason {
    /// Every reason.
    pub const ALL: [Self; 11] = [
        Self::Orderly,
        Self::ClosedByClient,
        Self::KeepAliveTimeout,
        Self::SessionTakenOver,
        Self::NotAuthorised,
        Self::ClientIdentifierNotValid,
        Self::ProtocolError,
        Self::TlsHandshakeFailed,
        Self::ConnectionLimit,
        Self::BrokerFull,
        Self::Other,
    ];

    /// Its name in metrics and on a Gateway.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Orderly => "Orderly",
            Self::ClosedByClient => "ClosedByClient",
            Self::KeepAliveTimeout => "KeepAliveTimeout",
            Self::SessionTakenOver => "SessionTakenOver",
            Self::NotAuthorised => "NotAuthorised",
            Self::ClientIdentifierNotValid => "ClientIdentifierNotValid",
            Self::ProtocolError => "ProtocolError",
            Self::TlsHandshakeFailed => "TlsHandshakeFailed",
            Self::ConnectionLimit => "ConnectionLimit",
            Self::BrokerFull => "BrokerFull",
            Self::Other => "Other",
        }
    }

    /// Whether a connection that ends for this reason before it was accepted counts as refused: a client that only opens and closes the
    /// port (the probe of a load balancer) does not.
    #[must_use]
    pub fn is_refusal(self) -> bool {
        !matches!(self, Self::Orderly | Self::ClosedByClient | Self::KeepAliveTimeout | Self::SessionTakenOver | Self::BrokerFull)
    }

    fn parse(text: &str) -> Self {
        match text {
            "" => Self::Orderly,
            "connection closed by client" => Self::ClosedByClient,
            "exceeded timeout" => Self::KeepAliveTimeout,
            "session taken over" => Self::SessionTakenOver,
            "not authorised" | "bad username or password" | "client banned" | "bad authentication method" => Self::NotAuthorised,
            "client identifier not valid" => Self::ClientIdentifierNotValid,
            "protocol error" | "malformed packet" => Self::ProtocolError,
            // The capitalized text comes from the TLS layer of 2.1.2, before any MQTT packet.
            "Protocol error" => Self::TlsHandshakeFailed,
            "quota exceeded" | "connection rate exceeded" => Self::ConnectionLimit,
            // The text of our plugin (`images/mosquitto/plugins/bounds.c`).
            "server busy" => Self::BrokerFull,
            _ => Self::Other,
        }
    }
}

/// Parses a line; `None` if it has no event of a connection.
#[must_use]
pub fn parse(line: &str) -> Option<Line<'_>> {
    let (time, message) = split_time(line);
    let event = if line.len() >= MAX_LINE_BYTES { cut(message) } else { whole(message) };
    event.map(|event| Line { time, event })
}

/// `2026-11-23T09:37:52: ` (our configuration), `1790000000: ` (the default), or nothing.
fn split_time(line: &str) -> (Option<i64>, &str) {
    let Some((prefix, message)) = line.split_once(": ") else { return (None, line) };
    let time = match prefix.parse::<DateTime>() {
        Ok(time) => time.to_zoned(TimeZone::UTC).ok().map(|time| time.timestamp().as_second()),
        Err(_) => prefix.parse::<i64>().ok(),
    };
    if time.is_some() { (time, message) } else { (None, line) }
}

fn cut(message: &str) -> Option<Event<'_>> {
    message.strip_prefix("Client ").map(|client| Event::Cut { client })
}

fn whole(message: &str) -> Option<Event<'_>> {
    if let Some(rest) = message.strip_prefix("New client connected from ") {
        return connected(rest);
    }
    if let Some(rest) = message.strip_prefix("Client connection from ") {
        let address = rest.strip_suffix(" denied: max_connections exceeded.")?;
        return Some(Event::Denied { address });
    }
    if let Some(rest) = message.strip_prefix("Client ") {
        return disconnected(rest);
    }
    if message.starts_with(UNEXPECTED_END) {
        return Some(Event::TlsAborted);
    }
    let state = message.strip_prefix("mosquitto version ")?.split_once(' ')?.1;
    match state {
        "starting" => Some(Event::BrokerStarting),
        "running" => Some(Event::BrokerRunning),
        "terminating" => Some(Event::BrokerStopping),
        _ => None,
    }
}

/// `ADDRESS as CLIENT (p5, c1, k60, u'USER').`
fn connected(rest: &str) -> Option<Event<'_>> {
    let (address, rest) = rest.split_once(" as ")?;
    let (client, parameters) = rest.split_once(" (p")?;
    is_parameters(parameters).then_some(Event::Connected { client, address })
}

/// Whether this is `5, c1, k60, u'USER').` or `4, c1, k60).`, and nothing more.
fn is_parameters(text: &str) -> bool {
    let number = |text: &str| text.bytes().all(|byte| byte.is_ascii_digit());
    let Some(text) = text.strip_suffix(").") else { return false };
    let mut parts = text.splitn(4, ", ");
    let version = parts.next().is_some_and(number);
    let clean = parts.next().and_then(|part| part.strip_prefix('c')).is_some_and(number);
    let keep_alive = parts.next().and_then(|part| part.strip_prefix('k')).is_some_and(number);
    let user = parts
        .next()
        .is_none_or(|part| part.strip_prefix("u'").and_then(|part| part.strip_suffix('\'')).is_some_and(|user| !user.contains('\'')));
    version && clean && keep_alive && user
}

/// `CLIENT [ADDRESS] disconnected.` or `CLIENT [ADDRESS] disconnected: REASON.`: the last of these is the broker's.
fn disconnected(rest: &str) -> Option<Event<'_>> {
    let (before, reason) = rest.rsplit_once("] disconnected")?;
    let (client, address) = before.rsplit_once(" [")?;
    let reason = reason.strip_suffix('.')?;
    let reason = if reason.is_empty() { reason } else { reason.strip_prefix(": ")? };
    Some(Event::Disconnected { client, address, reason: Reason::parse(reason) })
}

#[cfg(test)]
#[path = "line_tests.rs"]
mod tests;
