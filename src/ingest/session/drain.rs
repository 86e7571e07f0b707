//! Drains a session that is no longer configured: unsubscribes, reads until the broker sends nothing more, and then ends the session.
//! A broker need not give the queued messages of a session to another subscriber (MQTT 5.0, section 4.8.2).

use std::time::{Duration, Instant};

/// How long the connection must be quiet before the session ends. A PINGRESP shows that the broker has nothing more to send if it
/// works in order. A broker that loads queued messages from a disk or from another node has this time for it.
const QUIET: Duration = Duration::from_secs(3);

/// The progress of a drain.
#[derive(Debug, Default)]
pub(super) struct Drain {
    unsubscribed: bool,
    quiet: Option<Quiet>,
}

/// No message is in flight, and none has arrived.
#[derive(Debug)]
struct Quiet {
    since: Instant,
    /// The number of PINGRESPs up to the answer to the PINGREQ of the quiet period.
    pings: usize,
}

/// The next action of a drain.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum DrainStep {
    /// Continue to read. Check again at this time at the latest, if there is one.
    Wait(Option<Instant>),
    /// Send a PINGREQ.
    Ping,
    /// The session is empty: end it.
    End,
}

impl Drain {
    /// A connection begins. `subscribed`: an UNSUBSCRIBE is still to be acknowledged.
    pub(super) fn begin(&mut self, subscribed: bool) {
        *self = Self { unsubscribed: !subscribed, quiet: None };
    }

    /// The broker has acknowledged the UNSUBSCRIBE: it adds no more messages to the session.
    pub(super) fn unsubscribed(&mut self) {
        self.unsubscribed = true;
    }

    /// Messages arrived.
    pub(super) fn received(&mut self) {
        self.quiet = None;
    }

    /// A PINGRESP arrived.
    pub(super) fn ping_answered(&mut self) {
        if let Some(quiet) = &mut self.quiet {
            quiet.pings = quiet.pings.saturating_sub(1);
        }
    }

    /// The next action. `idle`: every received message is committed and acknowledged. `pings`: the number of PINGREQs without an answer.
    pub(super) fn next(&mut self, idle: bool, pings: usize, now: Instant) -> DrainStep {
        if !idle || !self.unsubscribed {
            self.quiet = None;
            return DrainStep::Wait(None);
        }
        match &self.quiet {
            None => {
                self.quiet = Some(Quiet { since: now, pings: pings + 1 });
                DrainStep::Ping
            }
            Some(Quiet { since, pings: 0 }) if now.duration_since(*since) >= QUIET => DrainStep::End,
            Some(Quiet { since, .. }) => DrainStep::Wait(Some(*since + QUIET).filter(|until| *until > now)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ends_after_a_quiet_period_with_a_ping_answer() {
        let now = Instant::now();
        let later = now + QUIET;
        let mut drain = Drain::default();
        drain.begin(true);
        assert_eq!(drain.next(true, 1, now), DrainStep::Wait(None), "still subscribed");
        drain.unsubscribed();
        assert_eq!(drain.next(false, 1, now), DrainStep::Wait(None), "a message is not acknowledged");
        assert_eq!(drain.next(true, 1, now), DrainStep::Ping);
        drain.ping_answered();
        assert_eq!(drain.next(true, 1, later), DrainStep::Wait(None), "the answer to an earlier PINGREQ");
        drain.ping_answered();
        assert_eq!(drain.next(true, 0, now), DrainStep::Wait(Some(later)));
        assert_eq!(drain.next(true, 0, later), DrainStep::End);
    }

    #[test]
    fn a_message_or_a_new_connection_restarts_the_quiet_period() {
        let now = Instant::now();
        let mut drain = Drain::default();
        drain.begin(false);
        assert_eq!(drain.next(true, 0, now), DrainStep::Ping);
        drain.ping_answered();
        drain.received();
        assert_eq!(drain.next(true, 0, now + QUIET), DrainStep::Ping);
        drain.begin(true);
        assert_eq!(drain.next(true, 0, now + QUIET * 2), DrainStep::Wait(None));
    }
}
