//! When a connection reads, when it sends a PINGREQ, and when it is considered dead.

use std::time::{Duration, Instant};

use crate::mqtt::error::ConnectionError;

/// The keep alive interval of CONNECT, in seconds (MQTT 5.0, 3.1.2.10). The broker closes a silent connection after one and a half
/// times that.
pub(super) const KEEP_ALIVE_SECONDS: u16 = 20;

/// How often a PINGREQ is sent.
const PING_INTERVAL: Duration = Duration::from_secs(KEEP_ALIVE_SECONDS as u64 / 2);

/// How long a broker may be silent although PINGREQs are sent.
const MAX_SILENCE: Duration = Duration::from_secs(KEEP_ALIVE_SECONDS as u64 * 3 / 2);

/// The pause between two reads of a busy connection, so that one read returns many messages: a wake-up costs as much CPU time as
/// five messages (measured).
const READ_PAUSE: Duration = Duration::from_millis(1);

/// A connection is busy if two reads follow each other within this time.
const BUSY_WITHIN: Duration = Duration::from_millis(4);

/// After a read of this many bytes there is no pause: the socket holds more.
const LARGE_READ_BYTES: usize = 32 * 1024;

/// The timers of a connection.
pub(super) struct KeepAlive {
    last_ping: Instant,
    last_read: Instant,
    read_after: Option<Instant>,
}

impl KeepAlive {
    pub(super) fn new() -> Self {
        let now = Instant::now();
        Self { last_ping: now, last_read: now, read_after: None }
    }

    /// Bytes were read.
    pub(super) fn received(&mut self, bytes: usize) {
        let now = Instant::now();
        let pause = bytes < LARGE_READ_BYTES && now.duration_since(self.last_read) < BUSY_WITHIN;
        self.read_after = pause.then(|| now + READ_PAUSE);
        self.last_read = now;
    }

    pub(super) fn may_read(&self, now: Instant) -> bool {
        self.read_after.is_none_or(|after| after <= now)
    }

    /// The next time at which a timer expires. A pause that is over does not count: the socket reports the next bytes.
    pub(super) fn next(&self, reads: bool, now: Instant) -> Instant {
        let ping = self.last_ping + PING_INTERVAL;
        if !reads {
            return ping.max(now);
        }
        let timer = ping.min(self.last_read + MAX_SILENCE).max(now);
        self.read_after.filter(|after| *after > now).map_or(timer, |after| after.min(timer))
    }

    /// Whether a PINGREQ is due.
    ///
    /// # Errors
    /// If the broker has been silent for too long.
    pub(super) fn wants_ping(&mut self, now: Instant, reads: bool) -> Result<bool, ConnectionError> {
        if !reads {
            // The session does not read, so the broker cannot be called silent.
            self.last_read = now;
        }
        if now.duration_since(self.last_read) >= MAX_SILENCE {
            return Err(ConnectionError::Silent { seconds: MAX_SILENCE.as_secs() });
        }
        let wants = now.duration_since(self.last_ping) >= PING_INTERVAL;
        if wants {
            self.last_ping = now;
        }
        Ok(wants)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_expired_read_pause_does_not_wake_again() {
        let mut keep_alive = KeepAlive::new();
        keep_alive.received(10);
        let after = keep_alive.read_after.expect("the second read within the busy interval");
        let before = after.checked_sub(READ_PAUSE / 2).unwrap();
        assert!(!keep_alive.may_read(before));
        assert_eq!(keep_alive.next(true, before), after);
        assert!(keep_alive.may_read(after));
        assert!(keep_alive.next(true, after) > after + READ_PAUSE, "an idle connection would keep a CPU busy");
    }
}
