//! Devices whose connection waits to be written, within a budget. Pure.
//!
//! Turns go in turn to the change that came last and to the one that waits longest: whoever watches one device sees it at once
//! even while thousands wait, and none waits for ever.

use std::collections::{BTreeMap, HashMap};
use std::time::Duration;

use tokio::time::Instant;

use crate::operator::device::key::DeviceKey;

/// The longest that a device which does not come to rest waits for its turn to come.
const LONGEST_HOLD: Duration = Duration::from_mins(10);

/// What may be written at once after a quiet time, in seconds of the budget.
const BURST_SECONDS: f64 = 2.0;

#[derive(Clone, Copy, Debug)]
struct Place {
    /// When it began to wait.
    since: Instant,
    /// When it may be written, and what tells it from others of that time.
    due: (Instant, u64),
}

/// The devices that wait.
#[derive(Debug)]
pub struct Waiting {
    places: HashMap<DeviceKey, Place>,
    due: BTreeMap<(Instant, u64), DeviceKey>,
    arrivals: u64,
    newest_next: bool,
    rate: f64,
    turns: f64,
    counted: Instant,
}

impl Waiting {
    /// Nobody waits; `rate` writes a second.
    #[must_use]
    pub fn new(rate: f64, now: Instant) -> Self {
        Self {
            places: HashMap::new(),
            due: BTreeMap::new(),
            arrivals: 0,
            newest_next: true,
            rate,
            turns: (rate * BURST_SECONDS).max(1.0),
            counted: now,
        }
    }

    /// A device is to be written once it has stayed as it is for `hold`.
    pub fn put(&mut self, key: DeviceKey, hold: Duration, now: Instant) {
        let since = self.take_out(&key).map_or(now, |place| place.since);
        self.arrivals += 1;
        let due = ((now + hold).min(since + LONGEST_HOLD).max(now), self.arrivals);
        self.due.insert(due, key.clone());
        self.places.insert(key, Place { since, due });
    }

    /// Whether a device waits.
    #[must_use]
    pub fn contains(&self, key: &DeviceKey) -> bool {
        self.places.contains_key(key)
    }

    /// A device need not be written any more.
    pub fn remove(&mut self, key: &DeviceKey) {
        self.take_out(key);
    }

    fn take_out(&mut self, key: &DeviceKey) -> Option<Place> {
        let place = self.places.remove(key)?;
        self.due.remove(&place.due);
        Some(place)
    }

    /// The next device whose time and turn have come. The turn is used up by [`Self::used`].
    pub fn take(&mut self, now: Instant) -> Option<DeviceKey> {
        self.refill(now);
        if self.turns < 1.0 {
            return None;
        }
        let mut ready = self.due.range(..=(now, u64::MAX));
        let (_, key) = if self.newest_next { ready.next_back() } else { ready.next() }?;
        let key = key.clone();
        self.take_out(&key);
        Some(key)
    }

    /// A device that was taken is being written.
    pub fn used(&mut self) {
        self.turns -= 1.0;
        self.newest_next = !self.newest_next;
    }

    fn refill(&mut self, now: Instant) {
        let passed = now.saturating_duration_since(self.counted).as_secs_f64();
        self.turns = (self.turns + passed * self.rate).min((self.rate * BURST_SECONDS).max(1.0));
        self.counted = self.counted.max(now);
    }

    /// When [`Self::take`] may have something.
    #[must_use]
    pub fn next_due(&self) -> Option<Instant> {
        let ((due, _), _) = self.due.first_key_value()?;
        let missing = (1.0 - self.turns).max(0.0) / self.rate;
        Some((*due).max(self.counted + Duration::from_secs_f64(missing)))
    }

    /// How many writes are possible at once: where more than that wait, it is a storm.
    #[must_use]
    pub fn burst(&self) -> usize {
        #[allow(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "a small positive number, of which fractions do not matter"
        )]
        let burst = (self.rate * BURST_SECONDS) as usize;
        burst.max(1)
    }

    /// How many wait for their turn, and how many to come to rest.
    #[must_use]
    pub fn counts(&self, now: Instant) -> (usize, usize) {
        let held = self.due.range((now, u64::MAX)..).count();
        (self.due.len() - held, held)
    }

    /// How long the one has waited for its turn that waits longest.
    #[must_use]
    pub fn oldest(&self, now: Instant) -> Duration {
        self.due.first_key_value().map_or(Duration::ZERO, |((due, _), _)| now.saturating_duration_since(*due))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::operator::device::key::GatewayKey;

    fn key(name: &str) -> DeviceKey {
        DeviceKey { gateway: GatewayKey::new("n", "g"), name: name.into() }
    }

    fn drain(waiting: &mut Waiting, now: Instant) -> Vec<String> {
        let mut names = Vec::new();
        while let Some(key) = waiting.take(now) {
            waiting.used();
            names.push(key.name.to_string());
        }
        names
    }

    fn seconds(seconds: f64) -> Duration {
        Duration::from_secs_f64(seconds)
    }

    #[test]
    fn the_budget_holds_and_the_newest_and_the_oldest_take_turns() {
        let start = Instant::now();
        let mut waiting = Waiting::new(2.0, start);
        for (index, name) in ["a", "b", "c", "d", "e", "f", "g"].into_iter().enumerate() {
            waiting.put(key(name), Duration::ZERO, start + Duration::from_millis(index as u64));
        }
        let now = start + Duration::from_millis(10);
        assert_eq!(drain(&mut waiting, now), ["g", "a", "f", "b"], "the burst");
        assert_eq!(waiting.counts(now), (3, 0));
        assert!(drain(&mut waiting, now + seconds(0.4)).is_empty());
        let due = waiting.next_due().unwrap();
        assert_eq!(drain(&mut waiting, due), ["e"]);
        assert_eq!(drain(&mut waiting, now + seconds(60.0)), ["c", "d"]);
        assert_eq!(waiting.next_due(), None);
    }

    #[test]
    fn a_device_waits_until_it_rests_but_not_for_ever() {
        let start = Instant::now();
        let mut waiting = Waiting::new(10.0, start);
        for second in 0..590 {
            waiting.put(key("a"), seconds(30.0), start + seconds(f64::from(second)));
            assert!(drain(&mut waiting, start + seconds(f64::from(second))).is_empty());
        }
        assert_eq!(waiting.counts(start + seconds(590.0)), (0, 1));
        assert_eq!(drain(&mut waiting, start + LONGEST_HOLD), ["a"]);
        waiting.put(key("b"), seconds(30.0), start);
        waiting.remove(&key("b"));
        assert_eq!(waiting.next_due(), None);
    }

    #[test]
    fn what_is_not_used_costs_no_turn() {
        let start = Instant::now();
        let mut waiting = Waiting::new(0.5, start);
        for name in ["a", "b", "c"] {
            waiting.put(key(name), Duration::ZERO, start);
        }
        assert!(waiting.take(start).is_some() && waiting.take(start).is_some());
        waiting.used();
        assert!(waiting.take(start).is_none());
        assert!(waiting.take(start + seconds(2.0)).is_some());
    }
}
