//! The limit that the broker has reached, as its plugin publishes it (`images/mosquitto/plugins/bounds.c`), and when to report it.

use std::time::Duration;

use tokio::sync::watch;
use tokio::time::{Instant, sleep_until};

use crate::configuration::agent::Fullness;

/// Topic to which the plugin publishes the limit.
pub const FULL: &str = "$SYS/broker/fleetwright/full";

/// Prefix of the topics with the counts of refused messages, one for each of [`BOUNDS`].
pub const REFUSED: &str = "$SYS/broker/fleetwright/refused/";

/// Prefix of the topics with how often devices exceeded a limit of their own, one for each of [`CLIENT_LIMITS`].
pub const EXCEEDED: &str = "$SYS/broker/fleetwright/exceeded/";

/// The limits of each device, by the broker's names.
pub const CLIENT_LIMITS: [&str; 8] = ["queue", "retained", "subscriptions", "topic", "will", "rate", "backlog", "inflight"];

/// The plugin's names of the limits.
pub const BOUNDS: [&str; 3] = ["queue", "memory", "disk"];

/// A broker at its limit alternates between full and not full, as fast as its queues drain. The agent reports a full broker at once,
/// and every other change only after it has lasted this long: each report is a write.
const SETTLED_AFTER: Duration = Duration::from_secs(30);

/// Parses the plugin's value.
#[must_use]
pub fn parse(text: &str) -> Option<Fullness> {
    match text.split_once(' ') {
        None if text == "none" => Some(Fullness::Nothing),
        None if text == "memory" => Some(Fullness::Memory),
        None if text == "disk" => Some(Fullness::Disk),
        Some(("clients", clients)) => Some(Fullness::Clients { clients: clients.to_owned() }),
        Some(("queue", session)) => Some(Fullness::Queue { session: session.to_owned() }),
        _ => None,
    }
}

/// The reached limit, by the plugin's name; `None` if no limit is reached.
#[must_use]
pub fn bound(fullness: &Fullness) -> Option<&'static str> {
    match fullness {
        Fullness::Nothing | Fullness::Clients { .. } => None,
        Fullness::Queue { .. } => Some("queue"),
        Fullness::Memory => Some("memory"),
        Fullness::Disk => Some("disk"),
    }
}

/// The reported value, and the next value if it lasts.
#[derive(Debug, Default)]
struct Settling {
    reported: Fullness,
    next: Option<(Fullness, Instant)>,
}

impl Settling {
    /// Applies the broker's value at `now`.
    fn observe(&mut self, seen: Fullness, now: Instant) {
        if seen == self.reported {
            self.next = None;
        } else if self.reported.is_nothing() || (bound(&seen).is_some() && bound(&self.reported).is_none()) {
            (self.reported, self.next) = (seen, None);
        } else if self.next.as_ref().is_none_or(|(next, _)| *next != seen) {
            self.next = Some((seen, now + SETTLED_AFTER));
        }
    }

    /// The time at which the next value has lasted long enough.
    fn due(&self) -> Option<Instant> {
        self.next.as_ref().map(|(_, due)| *due)
    }

    /// Reports the next value after it has lasted long enough.
    fn settle(&mut self) {
        if let Some((next, _)) = self.next.take() {
            self.reported = next;
        }
    }
}

/// Publishes the values to report in `reported`, until the sender of `seen` is dropped. `None` until the first value.
pub async fn settle(mut seen: watch::Receiver<Option<Fullness>>, reported: watch::Sender<Option<Fullness>>) {
    let mut settling = Settling::default();
    loop {
        let now = seen.borrow_and_update().clone();
        if let Some(now) = now {
            settling.observe(now, Instant::now());
            let next = Some(settling.reported.clone());
            reported.send_if_modified(|known| std::mem::replace(known, next.clone()) != next);
        }
        let due = settling.due();
        let wait = async {
            match due {
                Some(due) => sleep_until(due).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            changed = seen.changed() => if changed.is_err() { return },
            () = wait => settling.settle(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_of_the_plugin_are_parsed() {
        let queue = Fullness::Queue { session: "_ingest_a".to_owned() };
        for (text, expected) in [
            ("none", Some(Fullness::Nothing)),
            ("queue _ingest_a", Some(queue)),
            ("memory", Some(Fullness::Memory)),
            ("disk", Some(Fullness::Disk)),
            (
                "clients press-1: retained, press-2: rate",
                Some(Fullness::Clients { clients: "press-1: retained, press-2: rate".to_owned() }),
            ),
            ("", None),
            ("queue", None),
            ("disk x", None),
        ] {
            let found = parse(text);
            assert_eq!(found, expected, "{text:?}");
            assert_eq!(found.as_ref().and_then(bound), text.split(' ').next().filter(|name| expected.is_some() && BOUNDS.contains(name)));
        }
    }

    #[test]
    fn a_full_broker_is_reported_at_once_and_other_changes_after_a_delay() {
        let start = Instant::now();
        let mut settling = Settling::default();
        let clients = || Fullness::Clients { clients: "press-1: rate".to_owned() };
        // Second, value of the broker, value reported then.
        for (second, seen, reported) in [
            (0, Fullness::Nothing, Fullness::Nothing),
            (1, Fullness::Disk, Fullness::Disk),
            (2, Fullness::Nothing, Fullness::Disk),
            (3, Fullness::Disk, Fullness::Disk),
            (20, Fullness::Nothing, Fullness::Disk),
            (40, Fullness::Memory, Fullness::Disk),
            (41, Fullness::Nothing, Fullness::Disk),
            (70, Fullness::Nothing, Fullness::Disk),
            (71, Fullness::Nothing, Fullness::Nothing),
            (72, Fullness::Memory, Fullness::Memory),
            (80, Fullness::Disk, Fullness::Memory),
            (110, Fullness::Disk, Fullness::Disk),
            (120, clients(), Fullness::Disk),
            (150, clients(), clients()),
            (151, Fullness::Memory, Fullness::Memory),
        ] {
            let now = start + Duration::from_secs(second);
            settling.observe(seen, now);
            if settling.due().is_some_and(|due| due <= now) {
                settling.settle();
            }
            assert_eq!(settling.reported, reported, "at {second} s");
        }
    }
}
