//! How a session ends that is no longer wanted: unsubscribed, read until nothing comes any more, and only then given up. What a broker still
//! holds for a session it need not give to anybody else (MQTT 5.0, section 4.8.2).

use std::time::{Duration, Instant};

/// How long nothing may have come. The answer to a PINGREQ shows that the broker has nothing more to send, where it does all in order; one
/// that fetches what is queued from elsewhere, or from another node, has this time for it.
const QUIET: Duration = Duration::from_secs(3);

/// How far a session is on its way out.
#[derive(Debug, Default)]
pub(super) struct Leaving {
    unsubscribed: bool,
    quiet: Option<Quiet>,
}

/// Nothing is under way, and nothing has come.
#[derive(Debug)]
struct Quiet {
    since: Instant,
    /// How many PINGREQs are to be answered until the answer is to one that was sent in the quiet.
    pings: usize,
}

/// What to do next.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Next {
    /// Go on as ever; look again then, if at any time.
    Wait(Option<Instant>),
    /// Send a PINGREQ.
    Ping,
    /// The session is empty.
    End,
}

impl Leaving {
    /// A connection begins; `subscribed` if there is anything to end.
    pub(super) fn begin(&mut self, subscribed: bool) {
        *self = Self { unsubscribed: !subscribed, quiet: None };
    }

    /// The broker adds no more to what it holds.
    pub(super) fn unsubscribed(&mut self) {
        self.unsubscribed = true;
    }

    /// Messages have come.
    pub(super) fn heard(&mut self) {
        self.quiet = None;
    }

    /// A PINGREQ is answered.
    pub(super) fn answered(&mut self) {
        if let Some(quiet) = &mut self.quiet {
            quiet.pings = quiet.pings.saturating_sub(1);
        }
    }

    /// What to do next. `idle`: everything that came is committed and acknowledged. `pings`: so many PINGREQs are not answered yet.
    pub(super) fn next(&mut self, idle: bool, pings: usize, now: Instant) -> Next {
        if !idle || !self.unsubscribed {
            self.quiet = None;
            return Next::Wait(None);
        }
        match &self.quiet {
            None => {
                self.quiet = Some(Quiet { since: now, pings: pings + 1 });
                Next::Ping
            }
            Some(Quiet { since, pings: 0 }) if now.duration_since(*since) >= QUIET => Next::End,
            Some(Quiet { since, .. }) => Next::Wait(Some(*since + QUIET).filter(|until| *until > now)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_ends_after_a_quiet_in_which_the_broker_answered() {
        let now = Instant::now();
        let later = now + QUIET;
        let mut leaving = Leaving::default();
        leaving.begin(true);
        assert_eq!(leaving.next(true, 1, now), Next::Wait(None), "subscribed still");
        leaving.unsubscribed();
        assert_eq!(leaving.next(false, 1, now), Next::Wait(None), "something is not acknowledged");
        assert_eq!(leaving.next(true, 1, now), Next::Ping);
        leaving.answered();
        assert_eq!(leaving.next(true, 1, later), Next::Wait(None), "that was the answer to an earlier one");
        leaving.answered();
        assert_eq!(leaving.next(true, 0, now), Next::Wait(Some(later)));
        assert_eq!(leaving.next(true, 0, later), Next::End);
    }

    #[test]
    fn a_message_and_a_new_connection_start_it_anew() {
        let now = Instant::now();
        let mut leaving = Leaving::default();
        leaving.begin(false);
        assert_eq!(leaving.next(true, 0, now), Next::Ping);
        leaving.answered();
        leaving.heard();
        assert_eq!(leaving.next(true, 0, now + QUIET), Next::Ping);
        leaving.begin(true);
        assert_eq!(leaving.next(true, 0, now + QUIET * 2), Next::Wait(None));
    }
}
