//! When a connection reads, when it pings, and when it gives up.

use std::time::{Duration, Instant};

use crate::mqtt::connection::{ConnectionError, KEEP_ALIVE_SECONDS};

/// How often a quiet connection is tried.
const PING_INTERVAL: Duration = Duration::from_secs(KEEP_ALIVE_SECONDS as u64 / 2);

/// How long a broker may be silent, a ping included.
const SILENCE: Duration = Duration::from_secs(KEEP_ALIVE_SECONDS as u64 * 3 / 2);

/// How long to wait between two reads of a busy connection, so that one read takes many messages: a wake-up costs as much
/// processor as five messages.
const READ_PAUSE: Duration = Duration::from_millis(1);

/// A connection is busy when two reads follow one another within this time.
const BUSY_WITHIN: Duration = Duration::from_millis(4);

/// When to read, when to ping, and when to give up.
pub(super) struct Pulse {
    last_ping: Instant,
    last_heard: Instant,
    read_after: Option<Instant>,
}

impl Pulse {
    pub(super) fn new() -> Self {
        let now = Instant::now();
        Self { last_ping: now, last_heard: now, read_after: None }
    }

    /// Something was read.
    pub(super) fn heard(&mut self, bytes: usize) {
        let now = Instant::now();
        // A read that took much left more behind.
        let pause = bytes < 32 * 1024 && now.duration_since(self.last_heard) < BUSY_WITHIN;
        self.read_after = pause.then(|| now + READ_PAUSE);
        self.last_heard = now;
    }

    pub(super) fn may_read(&self, now: Instant) -> bool {
        self.read_after.is_none_or(|after| after <= now)
    }

    /// When to look again, whatever happens. A pause that is over is no reason: what comes next to read tells of itself.
    pub(super) fn next(&self, reads: bool, now: Instant) -> Instant {
        let ping = self.last_ping + PING_INTERVAL;
        if !reads {
            return ping.max(now);
        }
        let look = ping.min(self.last_heard + SILENCE).max(now);
        self.read_after.filter(|after| *after > now).map_or(look, |after| after.min(look))
    }

    pub(super) fn wants_ping(&mut self, now: Instant, reads: bool) -> Result<bool, ConnectionError> {
        if !reads {
            // Who does not listen cannot complain of silence.
            self.last_heard = now;
        }
        if now.duration_since(self.last_heard) >= SILENCE {
            return Err(ConnectionError::Hear { seconds: SILENCE.as_secs() });
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
    fn a_pause_that_is_over_does_not_wake_again() {
        let mut pulse = Pulse::new();
        pulse.heard(10);
        let after = pulse.read_after.expect("two reads close to one another");
        let before = after.checked_sub(READ_PAUSE / 2).unwrap();
        assert!(!pulse.may_read(before));
        assert_eq!(pulse.next(true, before), after);
        assert!(pulse.may_read(after));
        assert!(pulse.next(true, after) > after + READ_PAUSE, "a connection that became quiet would keep a processor busy");
    }
}
