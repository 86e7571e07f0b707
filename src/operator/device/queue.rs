//! Keys that wait for their turn: each at most once, never two of a kind at work at once, with pauses that grow while it
//! fails.

use std::collections::{BTreeSet, HashMap, HashSet, VecDeque};
use std::hash::Hash;
use std::time::Duration;

use tokio::time::Instant;

/// First pause after a failure.
const FIRST_PAUSE: Duration = Duration::from_millis(250);

/// The longest pause after failures.
const LONGEST_PAUSE: Duration = Duration::from_mins(1);

/// Keys that wait for their turn.
#[derive(Debug)]
pub struct Queue<K> {
    ready: VecDeque<K>,
    waiting: HashSet<K>,
    busy: HashSet<K>,
    again: HashSet<K>,
    /// One set: a node of its own for every time would be half a KiB for each key.
    later: BTreeSet<(Instant, K)>,
    due: HashMap<K, Instant>,
    failures: HashMap<K, u32>,
}

impl<K> Default for Queue<K> {
    fn default() -> Self {
        Self {
            ready: VecDeque::new(),
            waiting: HashSet::new(),
            busy: HashSet::new(),
            again: HashSet::new(),
            later: BTreeSet::new(),
            due: HashMap::new(),
            failures: HashMap::new(),
        }
    }
}

impl<K: Clone + Eq + Hash + Ord> Queue<K> {
    /// Puts a key in, at the end, unless it waits already.
    pub fn push(&mut self, key: K) {
        if self.busy.contains(&key) {
            self.again.insert(key);
        } else if self.waiting.insert(key.clone()) {
            self.ready.push_back(key);
        }
    }

    /// Puts a key in at a time, or at the time it has already if that is sooner.
    pub fn push_at(&mut self, key: K, at: Instant) {
        if self.due.get(&key).is_some_and(|due| *due <= at) {
            return;
        }
        self.cancel(&key);
        self.due.insert(key.clone(), at);
        self.later.insert((at, key));
    }

    /// Moves the time of a key, whether it becomes sooner or later.
    pub fn postpone(&mut self, key: &K, at: Instant) {
        self.cancel(key);
        self.push_at(key.clone(), at);
    }

    fn cancel(&mut self, key: &K) {
        if let Some(due) = self.due.remove(key) {
            self.later.remove(&(due, key.clone()));
        }
    }

    /// When the next key is due, if one waits for a time.
    #[must_use]
    pub fn next_due(&self) -> Option<Instant> {
        self.later.first().map(|(due, _)| *due)
    }

    /// Whether a key waits for a time.
    #[must_use]
    pub fn is_due_later(&self, key: &K) -> bool {
        self.due.contains_key(key)
    }

    /// Puts in the keys whose time has come.
    pub fn advance(&mut self, now: Instant) {
        while self.next_due().is_some_and(|due| due <= now)
            && let Some((_, key)) = self.later.pop_first()
        {
            self.due.remove(&key);
            self.push(key);
        }
    }

    /// The next key, which is at work until [`Queue::done`].
    pub fn pop(&mut self) -> Option<K> {
        let key = self.ready.pop_front()?;
        self.waiting.remove(&key);
        self.busy.insert(key.clone());
        Some(key)
    }

    /// How many keys are at work.
    #[must_use]
    pub fn at_work(&self) -> usize {
        self.busy.len()
    }

    /// How many keys wait for their turn.
    #[must_use]
    pub fn len(&self) -> usize {
        self.ready.len()
    }

    /// Whether no key waits for its turn.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.ready.is_empty()
    }

    /// A key is no longer at work.
    pub fn done(&mut self, key: &K) {
        self.failures.remove(key);
        self.rest(key);
    }

    /// A key is no longer at work, and failed: it comes again after a pause. `jitter` is from 0 to 1. Returns how often it has failed.
    pub fn failed(&mut self, key: &K, now: Instant, jitter: f64) -> u32 {
        let failures = self.failures.entry(key.clone()).or_default();
        *failures += 1;
        let count = *failures;
        let pause = FIRST_PAUSE.saturating_mul(1 << count.min(12).saturating_sub(1)).min(LONGEST_PAUSE);
        self.again.remove(key);
        self.busy.remove(key);
        self.push_at(key.clone(), now + pause.mul_f64(0.5 + jitter / 2.0));
        count
    }

    fn rest(&mut self, key: &K) {
        self.busy.remove(key);
        if self.again.remove(key) {
            self.push(key.clone());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_waits_once_and_is_never_at_work_twice() {
        let mut queue = Queue::default();
        queue.push("a");
        queue.push("a");
        assert_eq!(queue.pop(), Some("a"));
        assert_eq!(queue.pop(), None);
        queue.push("a");
        assert_eq!(queue.pop(), None, "it is at work");
        queue.done(&"a");
        assert_eq!(queue.pop(), Some("a"), "it changed while it was at work");
        queue.done(&"a");
        assert_eq!(queue.pop(), None);
    }

    #[test]
    fn pauses_grow_and_end_with_success() {
        let now = Instant::now();
        let mut queue = Queue::default();
        let mut last = Duration::ZERO;
        for _ in 0..20 {
            queue.push("a");
            queue.pop();
            queue.failed(&"a", now, 1.0);
            let pause = queue.next_due().unwrap() - now;
            assert!(pause >= last && pause <= LONGEST_PAUSE);
            last = pause;
            queue.advance(now + pause);
        }
        assert_eq!(last, LONGEST_PAUSE);
        queue.pop();
        queue.done(&"a");
        queue.push("a");
        queue.pop();
        queue.failed(&"a", now, 1.0);
        assert_eq!(queue.next_due(), Some(now + FIRST_PAUSE));
    }

    #[test]
    fn times_may_come_sooner_and_be_postponed() {
        let now = Instant::now();
        let at = |seconds| now + Duration::from_secs(seconds);
        let mut queue = Queue::default();
        queue.push_at("a", at(5));
        queue.push_at("a", at(9));
        assert_eq!(queue.next_due(), Some(at(5)));
        queue.push_at("a", at(2));
        assert_eq!(queue.next_due(), Some(at(2)));
        queue.postpone(&"a", at(7));
        assert_eq!(queue.next_due(), Some(at(7)));
        queue.advance(at(7));
        assert_eq!(queue.pop(), Some("a"));
        assert_eq!(queue.next_due(), None);
    }
}
