//! Who is connected to a broker that runs elsewhere, from what the devices themselves say there. Pure.
//!
//! Such a broker has no agent, and few let anybody read their log. What works with each is what devices have long done: a birth
//! message and a last will, both retained, at `devices/<device>/connection`.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;

use crate::api::device::ConnectionState;
use crate::broker::log::can_be_device;
use crate::operator::device::connection::CompactConnection;
use crate::operator::device::key::GatewayKey;
use crate::operator::presence::follow::PresenceUpdate;

/// Devices that are remembered. Any client of that broker may invent names; a broker of our own has at most as many
/// (`presence::tracker`).
const MAX_DEVICES: usize = 150_000;

/// Without a login for this long it is not known any more how many devices are connected: a broker that starts anew is back
/// before.
const UNREACHABLE_AFTER: Duration = Duration::from_mins(1);

/// And after this long the devices' status says so too.
const UNKNOWN_AFTER: Duration = Duration::from_mins(5);

/// What the devices of a broker say of themselves.
#[derive(Debug)]
pub struct ReportedConnections {
    gateway: GatewayKey,
    known: HashMap<Arc<str>, CompactConnection>,
    /// Since when there is no login, as an instant and in seconds since 1970.
    away: Option<(Instant, i64)>,
    silent: bool,
    unknown: bool,
}

impl ReportedConnections {
    /// Nothing is known yet, from now on.
    #[must_use]
    pub fn new(gateway: GatewayKey, now: Instant, time: i64) -> Self {
        Self { gateway, known: HashMap::new(), away: Some((now, time)), silent: false, unknown: false }
    }

    /// A login begins: what the broker keeps is about to come.
    pub fn begin(&mut self) {
        self.known.clear();
    }

    /// A device says something at `time` (seconds since 1970). `None` where it is no news, or cannot be understood.
    pub fn observe(&mut self, device: &str, payload: &[u8], time: i64) -> Option<PresenceUpdate> {
        let state = state_of(payload).filter(|_| can_be_device(device))?;
        if self.known.get(device).is_some_and(|known| known.state == state)
            || (self.known.len() >= MAX_DEVICES && !self.known.contains_key(device))
        {
            return None;
        }
        let (device, connection) = (Arc::<str>::from(device), CompactConnection::new(state, time));
        self.known.insert(Arc::clone(&device), connection);
        Some(PresenceUpdate::Heard { gateway: self.gateway.clone(), all: false, devices: vec![(device, connection)] })
    }

    /// All that the broker keeps has come.
    pub fn all(&mut self) -> PresenceUpdate {
        (self.away, self.silent, self.unknown) = (None, false, false);
        let devices = self.known.iter().map(|(device, connection)| (Arc::clone(device), *connection)).collect();
        PresenceUpdate::Heard { gateway: self.gateway.clone(), all: true, devices }
    }

    /// There is no login, still or since now.
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

/// What a message says. An empty one clears what is retained: then nobody knows.
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

    fn heard(news: Option<PresenceUpdate>) -> Vec<(String, ConnectionState)> {
        match news {
            Some(PresenceUpdate::Heard { devices, .. }) => {
                devices.iter().map(|(device, connection)| (device.to_string(), connection.state)).collect()
            }
            None => Vec::new(),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn what_devices_say() {
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
            assert_eq!(heard(connections.observe(device, payload.as_bytes(), 1)), expected, "{device} {payload:?}");
        }
    }

    #[test]
    fn a_login_starts_anew_with_what_the_broker_keeps() {
        let (mut connections, _) = connections();
        connections.observe("gone", b"online", 1);
        connections.begin();
        connections.observe("d", b"online", 2);
        assert_eq!(heard(Some(connections.all())), [("d".to_owned(), ConnectionState::Online)]);
        assert_eq!(heard(Some(connections.all())).len(), 1, "and again, when it is asked for");
    }

    #[test]
    fn who_is_away_for_long_knows_nothing() {
        let (mut connections, start) = connections();
        connections.all();
        let mut told = Vec::new();
        for second in (0..700).step_by(10) {
            match connections.away(start + Duration::from_secs(second), 1000) {
                Some(PresenceUpdate::Silent(_)) => told.push((second, "silent")),
                Some(PresenceUpdate::Unknown(_, 1000)) => told.push((second, "unknown")),
                None => {}
                other => panic!("{other:?}"),
            }
        }
        assert_eq!(told, [(60, "silent"), (300, "unknown")]);
    }
}
