//! How often reports may become writes: each key some seconds apart, all together within a budget; what comes in between is
//! coalesced to the latest. Pure.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::hash::Hash;
use std::time::Duration;

use tokio::time::Instant;

/// Values that wait for their turn.
#[derive(Debug)]
pub struct Pace<K, V> {
    interval: Duration,
    /// Turns a second.
    rate: f64,
    /// Turns that may be taken at once after a quiet time.
    burst: f64,
    turns: f64,
    counted: Instant,
    waiting: HashMap<K, V>,
    /// By the time at which they are due, then in order of arrival.
    due: BTreeMap<(Instant, u64), K>,
    arrivals: u64,
    /// When a key had its last turn, for as long as that matters.
    last: HashMap<K, Instant>,
    order: VecDeque<(Instant, K)>,
}

impl<K: Clone + Eq + Hash, V> Pace<K, V> {
    /// Each key at most once per `interval`, all together at most `rate` (above 0) times a second.
    #[must_use]
    pub fn new(interval: Duration, rate: f64, now: Instant) -> Self {
        // Of less than one turn nothing could come.
        let burst = rate.max(1.0);
        Self {
            interval,
            rate,
            burst,
            turns: burst,
            counted: now,
            waiting: HashMap::new(),
            due: BTreeMap::new(),
            arrivals: 0,
            last: HashMap::new(),
            order: VecDeque::new(),
        }
    }

    /// Puts a value in, in place of the one of that key that still waits.
    pub fn offer(&mut self, key: K, value: V, now: Instant) {
        if self.waiting.insert(key.clone(), value).is_none() {
            let due = self.last.get(&key).map_or(now, |last| (*last + self.interval).max(now));
            self.arrivals += 1;
            self.due.insert((due, self.arrivals), key);
        }
    }

    /// How many values wait.
    #[must_use]
    pub fn len(&self) -> usize {
        self.waiting.len()
    }

    /// Whether none waits.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.waiting.is_empty()
    }

    /// Whether a value of this key waits.
    #[must_use]
    pub fn is_waiting(&self, key: &K) -> bool {
        self.waiting.contains_key(key)
    }

    /// When the next value can be taken.
    #[must_use]
    pub fn next_due(&self) -> Option<Instant> {
        let ((due, _), _) = self.due.first_key_value()?;
        let missing = (1.0 - self.turns).max(0.0) / self.rate;
        Some((*due).max(self.counted + Duration::from_secs_f64(missing)))
    }

    /// The next value, if its time has come. A turn is used up only by [`Self::used`].
    pub fn take(&mut self, now: Instant) -> Option<(K, V)> {
        self.turns = (self.turns + now.duration_since(self.counted).as_secs_f64() * self.rate).min(self.burst);
        self.counted = self.counted.max(now);
        while let Some((_, key)) = self.order.pop_front_if(|(last, _)| *last + self.interval <= now) {
            if self.last.get(&key).is_some_and(|last| *last + self.interval <= now) {
                self.last.remove(&key);
            }
        }
        let entry = self.due.first_entry().filter(|entry| entry.key().0 <= now && self.turns >= 1.0)?;
        let key = entry.remove();
        let value = self.waiting.remove(&key)?;
        Some((key, value))
    }

    /// What was taken of this key uses up a turn.
    pub fn used(&mut self, key: K, now: Instant) {
        self.turns -= 1.0;
        self.last.insert(key.clone(), now);
        self.order.push_back((now, key));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const INTERVAL: Duration = Duration::from_secs(5);

    fn drain(pace: &mut Pace<&'static str, u32>, now: Instant) -> Vec<(&'static str, u32)> {
        let mut taken = Vec::new();
        while let Some((key, value)) = pace.take(now) {
            pace.used(key, now);
            taken.push((key, value));
        }
        taken
    }

    #[test]
    fn the_first_comes_at_once_and_the_latest_after_the_interval() {
        let start = Instant::now();
        let mut pace = Pace::new(INTERVAL, 100.0, start);
        pace.offer("a", 1, start);
        assert_eq!(drain(&mut pace, start), [("a", 1)]);
        for value in 2..10 {
            pace.offer("a", value, start + Duration::from_secs(1));
        }
        assert!(pace.is_waiting(&"a"));
        assert_eq!(pace.next_due(), Some(start + INTERVAL));
        assert!(drain(&mut pace, start + Duration::from_secs(4)).is_empty());
        assert_eq!(drain(&mut pace, start + INTERVAL), [("a", 9)]);
        assert_eq!(pace.next_due(), None);
    }

    #[test]
    fn all_together_keep_to_the_budget_and_to_the_order_of_arrival() {
        let start = Instant::now();
        let mut pace = Pace::new(INTERVAL, 2.0, start);
        for (value, key) in ["a", "b", "c", "d", "e"].into_iter().enumerate() {
            pace.offer(key, u32::try_from(value).unwrap(), start);
        }
        assert_eq!(drain(&mut pace, start), [("a", 0), ("b", 1)]);
        assert_eq!(pace.next_due(), Some(start + Duration::from_millis(500)));
        assert_eq!(drain(&mut pace, start + Duration::from_millis(500)), [("c", 2)]);
        assert_eq!(drain(&mut pace, start + Duration::from_mins(1)), [("d", 3), ("e", 4)], "a quiet time saves up no more than a burst");
    }

    #[test]
    fn what_was_not_used_costs_nothing() {
        let start = Instant::now();
        let mut pace = Pace::new(INTERVAL, 1.0, start);
        for key in ["a", "b"] {
            pace.offer(key, 0, start);
        }
        assert_eq!(pace.take(start), Some(("a", 0)));
        assert_eq!(pace.take(start), Some(("b", 0)));
        pace.offer("a", 1, start);
        assert_eq!(drain(&mut pace, start), [("a", 1)]);
    }

    #[test]
    fn what_is_remembered_of_a_key_is_forgotten() {
        let start = Instant::now();
        let mut pace = Pace::new(INTERVAL, 100.0, start);
        pace.offer("a", 1, start);
        drain(&mut pace, start);
        drain(&mut pace, start + INTERVAL);
        assert!(pace.last.is_empty() && pace.order.is_empty());
    }
}
