//! A queue of keys with delays, rate limits and retries. Pure: callers pass the time.
//!
//! Each key is queued at most once and is in progress at most once. A key that is queued while it is in progress is ready again
//! when that ends. A key that failed is queued again after a delay that grows with each failure.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::hash::Hash;
use std::time::Duration;

use tokio::time::Instant;

use super::backoff::Backoff;

/// Delay before the first retry.
const INITIAL_RETRY_DELAY: Duration = Duration::from_millis(250);

/// Upper limit of the delay before a retry.
const MAX_RETRY_DELAY: Duration = Duration::from_mins(1);

/// One token, less the rounding error of a refill.
const ONE_TOKEN: f64 = 1.0 - 1e-6;

/// A limit on how many items of all keys together leave the queue (a token bucket).
#[derive(Clone, Copy, Debug)]
pub struct Rate {
    /// Items per second, above 0.
    pub per_second: f64,
    /// Seconds of that rate that may accumulate while the queue is idle. At least one item may always accumulate.
    pub burst_seconds: f64,
}

impl Rate {
    fn burst(self) -> f64 {
        (self.per_second * self.burst_seconds).max(1.0)
    }
}

/// Which of the ready items leaves the queue next.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub enum Order {
    /// The item that has been ready for the longest time.
    #[default]
    OldestFirst,
    /// The newest and the oldest alternate: a new item is not delayed by a backlog, and no item waits without end.
    Alternate,
}

/// The limits of a queue. By default there are none.
#[derive(Clone, Copy, Debug, Default)]
pub struct Limits {
    /// Over all keys.
    pub rate: Option<Rate>,
    /// Between two items of one key.
    pub min_interval: Duration,
    /// How long [`RateLimitedQueue::postpone`] can delay an item in total.
    pub max_delay: Option<Duration>,
    /// Order of the ready items.
    pub order: Order,
}

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Place {
    /// By tag, then by sequence number.
    Ready(u64, u64),
    /// By time, then by sequence number.
    Delayed(Instant, u64),
}

#[derive(Debug)]
struct Entry<V> {
    value: V,
    /// Time at which the key was queued first.
    since: Instant,
    /// Time at which the item became or becomes ready.
    due: Instant,
    place: Place,
}

/// A queue of keys with values. See the module's documentation.
#[derive(Debug)]
pub struct RateLimitedQueue<K, V = ()> {
    limits: Limits,
    entries: HashMap<K, Entry<V>>,
    ready: BTreeMap<(u64, u64), K>,
    delayed: BTreeMap<(Instant, u64), K>,
    sequence: u64,
    /// Keys in progress, with the value that was queued since then and is due, if any.
    in_progress: HashMap<K, Option<V>>,
    failures: HashMap<K, (u32, Backoff)>,
    /// Time at which an item of a key last left the queue, within the last `min_interval`.
    last: HashMap<K, Instant>,
    /// The same in order of time, to forget them.
    last_order: VecDeque<(Instant, K)>,
    tokens: f64,
    refilled: Instant,
    newest_next: bool,
    /// The group of a key, if the groups share the queue fairly.
    group: Option<fn(&K) -> u64>,
    /// Tag of the last ready item of each group, since the queue was last empty.
    tags: HashMap<u64, u64>,
    /// Tag of the last item that left the queue.
    last_tag: u64,
}

impl<K: Clone + Eq + Hash, V> RateLimitedQueue<K, V> {
    /// An empty queue.
    #[must_use]
    pub fn new(limits: Limits, now: Instant) -> Self {
        Self {
            limits,
            entries: HashMap::new(),
            ready: BTreeMap::new(),
            delayed: BTreeMap::new(),
            sequence: 0,
            in_progress: HashMap::new(),
            failures: HashMap::new(),
            last: HashMap::new(),
            last_order: VecDeque::new(),
            tokens: limits.rate.map_or(0.0, Rate::burst),
            refilled: now,
            newest_next: true,
            group: None,
            tags: HashMap::new(),
            last_tag: 0,
        }
    }

    /// An empty queue whose ready items leave in the order of their groups' shares: with n groups, every nth item is of the same group.
    /// Within a group the oldest is first. A group is a number, such as a hash. (Start-time fair queueing: the tag of an item is one more
    /// than that of its group's last item, but at least that of the item that left the queue last.)
    #[must_use]
    pub fn shared_by_groups(limits: Limits, now: Instant, group: fn(&K) -> u64) -> Self {
        Self { group: Some(group), ..Self::new(limits, now) }
    }

    /// Queues a key for `at`, or earlier if it is queued for an earlier time. The value replaces the queued one.
    pub fn insert(&mut self, key: K, value: V, at: Instant, now: Instant) {
        let at = self.earliest(&key, at);
        let Some(entry) = self.entries.get_mut(&key) else { return self.place(key, value, now, at, now) };
        if entry.due <= at {
            entry.value = value;
        } else {
            let since = self.take_entry(&key).map_or(now, |entry| entry.since);
            self.place(key, value, since, at, now);
        }
    }

    /// Queues a key for `at`, also if it is queued for an earlier time. It is delayed by at most [`Limits::max_delay`] in total.
    pub fn postpone(&mut self, key: K, value: V, at: Instant, now: Instant) {
        let at = self.earliest(&key, at);
        let since = self.take_entry(&key).map_or(now, |entry| entry.since);
        let at = self.limits.max_delay.map_or(at, |max| at.min(since + max));
        self.place(key, value, since, at, now);
    }

    /// Takes a key out of the queue.
    pub fn remove(&mut self, key: &K) {
        self.take_entry(key);
        if let Some(next) = self.in_progress.get_mut(key) {
            *next = None;
        }
    }

    /// Whether a key is queued.
    #[must_use]
    pub fn contains(&self, key: &K) -> bool {
        self.entries.contains_key(key)
    }

    /// Makes the delayed items ready whose time has come, and refills the rate limit.
    pub fn advance(&mut self, now: Instant) {
        if let Some(rate) = self.limits.rate {
            let passed = now.saturating_duration_since(self.refilled).as_secs_f64();
            self.tokens = (self.tokens + passed * rate.per_second).min(rate.burst());
        }
        self.refilled = self.refilled.max(now);
        let interval = self.limits.min_interval;
        while let Some((at, key)) = self.last_order.pop_front_if(|(at, _)| *at + interval <= now) {
            if self.last.get(&key) == Some(&at) {
                self.last.remove(&key);
            }
        }
        while let Some(first) = self.delayed.first_entry().filter(|first| first.key().0 <= now) {
            let key = first.remove();
            if let Some(entry) = self.entries.remove(&key) {
                self.place(key, entry.value, entry.since, entry.due, now);
            }
        }
    }

    /// The next ready item, if the rate limit allows one. It is in progress until [`Self::done`], [`Self::failed`] or
    /// [`Self::skip`].
    pub fn pop(&mut self, now: Instant) -> Option<(K, V)> {
        self.advance(now);
        if self.limits.rate.is_some() && self.tokens < ONE_TOKEN {
            return None;
        }
        let newest = self.limits.order == Order::Alternate && self.newest_next;
        let ((tag, _), key) = if newest { self.ready.pop_last() } else { self.ready.pop_first() }?;
        let entry = self.entries.remove(&key)?;
        self.last_tag = tag;
        if self.ready.is_empty() {
            self.tags.clear();
        }
        if self.limits.rate.is_some() {
            self.tokens -= 1.0;
        }
        self.newest_next = !self.newest_next;
        if !self.limits.min_interval.is_zero() {
            self.last.insert(key.clone(), now);
            self.last_order.push_back((now, key.clone()));
        }
        self.in_progress.insert(key.clone(), None);
        Some((key, entry.value))
    }

    /// An item in progress is finished.
    pub fn done(&mut self, key: &K, now: Instant) {
        self.failures.remove(key);
        self.finish(key, now);
    }

    /// An item in progress turned out to be unnecessary: it does not count for the limits.
    pub fn skip(&mut self, key: &K, now: Instant) {
        self.tokens = (self.tokens + 1.0).min(self.limits.rate.map_or(0.0, Rate::burst));
        self.newest_next = !self.newest_next;
        self.last.remove(key);
        self.done(key, now);
    }

    /// An item in progress failed: `value` is queued again after a delay. `jitter` is from 0 to 1. Returns the number of failures
    /// in a row.
    pub fn failed(&mut self, key: &K, value: V, now: Instant, jitter: f64) -> u32 {
        let (count, backoff) = self.failures.entry(key.clone()).or_insert((0, Backoff::new(INITIAL_RETRY_DELAY, MAX_RETRY_DELAY)));
        *count += 1;
        let (count, delay) = (*count, backoff.next_delay_with(jitter));
        let newer = self.in_progress.remove(key).flatten();
        self.requeue(key, newer.unwrap_or(value), now + delay, now);
        count
    }

    /// Number of ready items, as of the last [`Self::advance`].
    #[must_use]
    pub fn ready(&self) -> usize {
        self.ready.len()
    }

    /// Number of delayed items, as of the last [`Self::advance`].
    #[must_use]
    pub fn delayed(&self) -> usize {
        self.delayed.len()
    }

    /// Number of items in progress.
    #[must_use]
    pub fn in_progress(&self) -> usize {
        self.in_progress.len()
    }

    /// How long the oldest ready item has been ready.
    #[must_use]
    pub fn oldest(&self, now: Instant) -> Duration {
        let oldest = self.ready.first_key_value().and_then(|(_, key)| self.entries.get(key));
        oldest.map_or(Duration::ZERO, |entry| now.saturating_duration_since(entry.due))
    }

    /// Number of items that may leave the queue at once after an idle time.
    #[must_use]
    pub fn burst(&self) -> usize {
        #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "at least 1, and fractions do not matter")]
        let burst = |rate: Rate| rate.burst() as usize;
        self.limits.rate.map_or(usize::MAX, burst)
    }

    /// Time at which [`Self::pop`] may return another item.
    #[must_use]
    pub fn next_due(&self) -> Option<Instant> {
        let token = self.limits.rate.filter(|_| self.tokens < ONE_TOKEN).map(|rate| {
            let missing = (1.0 - self.tokens) / rate.per_second;
            self.refilled + Duration::from_secs_f64(missing)
        });
        let ready = token.filter(|_| !self.ready.is_empty());
        let delayed = self.delayed.first_key_value().map(|((due, _), _)| token.map_or(*due, |token| token.max(*due)));
        [ready, delayed].into_iter().flatten().min()
    }

    /// The earliest time from `at` on that the interval between two items of a key allows.
    fn earliest(&self, key: &K, at: Instant) -> Instant {
        self.last.get(key).map_or(at, |last| at.max(*last + self.limits.min_interval))
    }

    fn take_entry(&mut self, key: &K) -> Option<Entry<V>> {
        let entry = self.entries.remove(key)?;
        match entry.place {
            Place::Ready(tag, sequence) => self.ready.remove(&(tag, sequence)),
            Place::Delayed(due, sequence) => self.delayed.remove(&(due, sequence)),
        };
        Some(entry)
    }

    fn place(&mut self, key: K, value: V, since: Instant, due: Instant, now: Instant) {
        self.sequence += 1;
        let place = if due > now {
            self.delayed.insert((due, self.sequence), key.clone());
            Place::Delayed(due, self.sequence)
        } else {
            if let Some(next) = self.in_progress.get_mut(&key) {
                *next = Some(value);
                return;
            }
            let tag = self.next_tag(&key);
            self.ready.insert((tag, self.sequence), key.clone());
            Place::Ready(tag, self.sequence)
        };
        self.entries.insert(key, Entry { value, since, due, place });
    }

    /// The tag of the next ready item of a key's group.
    fn next_tag(&mut self, key: &K) -> u64 {
        let Some(group) = self.group else { return 0 };
        let tag = self.tags.entry(group(key)).or_insert(self.last_tag);
        *tag = (*tag).max(self.last_tag) + 1;
        *tag
    }

    fn finish(&mut self, key: &K, now: Instant) {
        if let Some(value) = self.in_progress.remove(key).flatten() {
            self.requeue(key, value, now, now);
        }
    }

    /// Queues a key again. A value that is queued for it is newer.
    fn requeue(&mut self, key: &K, value: V, at: Instant, now: Instant) {
        let at = self.earliest(key, at);
        match self.take_entry(key) {
            Some(entry) => self.place(key.clone(), entry.value, entry.since, at.min(entry.due), now),
            None => self.place(key.clone(), value, now, at, now),
        }
    }
}

#[cfg(test)]
#[path = "rate_limited_queue_tests.rs"]
mod tests;
