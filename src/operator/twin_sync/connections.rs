//! The connection states of an external broker's devices, from the messages that they publish. Pure.
//!
//! Such a broker has no agent, and its log is usually not accessible. The common convention works with all: a birth message and a
//! last will, both retained, at `devices/<device>/connection`.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;

use crate::api::device::ConnectionState;
use crate::broker::log::can_be_device;
use crate::operator::device::connection::CompactConnection;
use crate::operator::device::key::GatewayKey;
use crate::operator::presence::follow::PresenceUpdate;

/// Upper limit of known devices. A broker of the operator has the same limit.
const MAX_DEVICES: usize = 150_000;

/// Upper limit of names that are not declared, because any client of that broker may invent them. A device that connects before it is
/// declared is below the limit, or appears with the next session.
const MAX_UNDECLARED: usize = 1_000;

/// After this long without a connection to the broker, the number of connected devices is unknown. A broker that restarts is back
/// sooner.
const UNREACHABLE_AFTER: Duration = Duration::from_mins(1);

/// After this long the status of each device is unknown.
const UNKNOWN_AFTER: Duration = Duration::from_mins(5);

/// The reported connection states of one broker's devices.
#[derive(Debug)]
pub struct ReportedConnections {
    gateway: GatewayKey,
    known: HashMap<Arc<str>, CompactConnection>,
    /// Number of names that were not declared when they were first heard of.
    undeclared: usize,
    /// Since when there is no connection to the broker, as an instant and in seconds since 1970.
    away: Option<(Instant, i64)>,
    silent: bool,
    unknown: bool,
}

impl ReportedConnections {
    /// Without any state.
    #[must_use]
    pub fn new(gateway: GatewayKey, now: Instant, time: i64) -> Self {
        Self { gateway, known: HashMap::new(), undeclared: 0, away: Some((now, time)), silent: false, unknown: false }
    }

    /// A connection begins: the broker sends its retained messages.
    pub fn begin(&mut self) {
        self.known.clear();
        self.undeclared = 0;
    }

    /// Processes a message of a device, which may be `declared`, at `time` (seconds since 1970). `None` if it changes nothing or is
    /// malformed.
    pub fn observe(&mut self, device: &str, payload: &[u8], declared: bool, time: i64) -> Option<PresenceUpdate> {
        let state = state_of(payload).filter(|_| can_be_device(device))?;
        match self.known.get(device) {
            Some(known) if known.state == state => return None,
            Some(_) => {}
            None if self.known.len() >= MAX_DEVICES || (!declared && self.undeclared >= MAX_UNDECLARED) => return None,
            None => self.undeclared += usize::from(!declared),
        }
        let (device, connection) = (Arc::<str>::from(device), CompactConnection::new(state, time));
        self.known.insert(Arc::clone(&device), connection);
        Some(PresenceUpdate::Heard { gateway: self.gateway.clone(), all: false, devices: vec![(device, connection)] })
    }

    /// All retained messages have come.
    pub fn all(&mut self) -> PresenceUpdate {
        (self.away, self.silent, self.unknown) = (None, false, false);
        let devices = self.known.iter().map(|(device, connection)| (Arc::clone(device), *connection)).collect();
        PresenceUpdate::Heard { gateway: self.gateway.clone(), all: true, devices }
    }

    /// There is no connection to the broker.
    pub fn away(&mut self, now: Instant, time: i64) -> Option<PresenceUpdate> {
        let (since, at) = *self.away.get_or_insert((now, time));
        let passed = now.duration_since(since);
        if passed >= UNKNOWN_AFTER && !self.unknown {
            self.unknown = true;
            return Some(PresenceUpdate::Unknown(self.gateway.clone(), at));
        }
        if passed >= UNREACHABLE_AFTER && !self.silent {
            self.silent = true;
            return Some(PresenceUpdate::Silent(self.gateway.clone()));
        }
        None
    }
}

/// The state in a message. An empty one clears the retained message: the state is unknown.
fn state_of(payload: &[u8]) -> Option<ConnectionState> {
    match payload {
        b"" => Some(ConnectionState::Unknown),
        text if text.eq_ignore_ascii_case(b"online") => Some(ConnectionState::Online),
        text if text.eq_ignore_ascii_case(b"offline") => Some(ConnectionState::Offline),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn connections() -> (ReportedConnections, Instant) {
        let now = Instant::now();
        (ReportedConnections::new(GatewayKey::new("n", "g"), now, 100), now)
    }

    fn heard(update: Option<PresenceUpdate>) -> Vec<(String, ConnectionState)> {
        match update {
            Some(PresenceUpdate::Heard { devices, .. }) => {
                devices.iter().map(|(device, connection)| (device.to_string(), connection.state)).collect()
            }
            None => Vec::new(),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn messages_determine_the_connection_state() {
        let (mut connections, _) = connections();
        for (device, payload, expected) in [
            ("d", "online", Some(ConnectionState::Online)),
            ("d", "Online", None),
            ("d", "OFFLINE", Some(ConnectionState::Offline)),
            ("d", "gone fishing", None),
            ("d", "\u{fffd}", None),
            ("d", "", Some(ConnectionState::Unknown)),
            ("_operator", "online", None),
        ] {
            let expected: Vec<_> = expected.into_iter().map(|state| (device.to_owned(), state)).collect();
            assert_eq!(heard(connections.observe(device, payload.as_bytes(), true, 1)), expected, "{device} {payload:?}");
        }
    }

    #[test]
    fn a_connection_starts_from_the_retained_messages() {
        let (mut connections, _) = connections();
        connections.observe("gone", b"online", true, 1);
        connections.begin();
        connections.observe("d", b"online", true, 2);
        assert_eq!(heard(Some(connections.all())), [("d".to_owned(), ConnectionState::Online)]);
        assert_eq!(heard(Some(connections.all())).len(), 1, "and again, when it is asked for");
    }

    #[test]
    fn states_become_unknown_without_a_connection() {
        let (mut connections, start) = connections();
        connections.all();
        let mut updates = Vec::new();
        for second in (0..700).step_by(10) {
            match connections.away(start + Duration::from_secs(second), 1000) {
                Some(PresenceUpdate::Silent(_)) => updates.push((second, "silent")),
                Some(PresenceUpdate::Unknown(_, 1000)) => updates.push((second, "unknown")),
                None => {}
                other => panic!("{other:?}"),
            }
        }
        assert_eq!(updates, [(60, "silent"), (300, "unknown")]);
    }
}
