//! What of the broker is full, as its plugin tells (`images/mosquitto/plugins/bounds.c`); and what of that is worth a report.

use std::time::Duration;

use tokio::sync::watch;
use tokio::time::{Instant, sleep_until};

use crate::configuration::agent::Fullness;

/// Topic at which the plugin tells it.
pub const FULL: &str = "$SYS/broker/fleetwright/full";

/// Begin of the topics at which it tells how many messages were refused, one for each of [`BOUNDS`].
pub const REFUSED: &str = "$SYS/broker/fleetwright/refused/";

/// Prefix of the topics with how often devices exceeded a limit of their own, one for each of [`CLIENT_LIMITS`].
pub const EXCEEDED: &str = "$SYS/broker/fleetwright/exceeded/";

/// The limits of each device, by the broker's names.
pub const CLIENT_LIMITS: [&str; 8] = ["queue", "retained", "subscriptions", "topic", "will", "rate", "backlog", "inflight"];

/// What can be full, by the plugin's names.
pub const BOUNDS: [&str; 3] = ["queue", "memory", "disk"];

/// A broker at its bound is full and has room in turns, as fast as it is drained. That it has become full is told at once, and
/// anything else once it has lasted so long: a report is a write.
const SETTLED_AFTER: Duration = Duration::from_secs(30);

/// What the plugin says.
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

/// What can be full, by the plugin's name of it; `None` where nothing is.
#[must_use]
pub fn bound(fullness: &Fullness) -> Option<&'static str> {
    match fullness {
        Fullness::Nothing | Fullness::Clients { .. } => None,
        Fullness::Queue { .. } => Some("queue"),
        Fullness::Memory => Some("memory"),
        Fullness::Disk => Some("disk"),
    }
}

/// What is told, and what will be if it lasts.
#[derive(Debug, Default)]
struct Settling {
    told: Fullness,
    next: Option<(Fullness, Instant)>,
}

impl Settling {
    /// Takes over what the broker is at `now`.
    fn observe(&mut self, seen: Fullness, now: Instant) {
        if seen == self.told {
            self.next = None;
        } else if self.told.is_nothing() {
            (self.told, self.next) = (seen, None);
        } else if self.next.as_ref().is_none_or(|(next, _)| *next != seen) {
            self.next = Some((seen, now + SETTLED_AFTER));
        }
    }

    /// When what will be told has lasted long enough.
    fn due(&self) -> Option<Instant> {
        self.next.as_ref().map(|(_, due)| *due)
    }

    /// That time has come.
    fn settle(&mut self) {
        if let Some((next, _)) = self.next.take() {
            self.told = next;
        }
    }
}

/// Tells in `told` what is worth a report, until `seen` is no more. What nobody has said yet is `None`.
pub async fn settle(mut seen: watch::Receiver<Option<Fullness>>, told: watch::Sender<Option<Fullness>>) {
    let mut settling = Settling::default();
    loop {
        let now = seen.borrow_and_update().clone();
        if let Some(now) = now {
            settling.observe(now, Instant::now());
            let next = Some(settling.told.clone());
            told.send_if_modified(|known| std::mem::replace(known, next.clone()) != next);
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
    fn what_the_plugin_says() {
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
    fn full_at_once_and_over_when_it_has_lasted() {
        let start = Instant::now();
        let mut settling = Settling::default();
        // Second, what the broker is, what is told then.
        for (second, seen, told) in [
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
        ] {
            let now = start + Duration::from_secs(second);
            settling.observe(seen, now);
            if settling.due().is_some_and(|due| due <= now) {
                settling.settle();
            }
            assert_eq!(settling.told, told, "at {second} s");
        }
    }
}
