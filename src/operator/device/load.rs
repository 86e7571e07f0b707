//! The load that a Gateway's Devices cause, and how long the writes of its shards are gathered.

use std::hash::{DefaultHasher, Hash, Hasher};
use std::time::Duration;

use tokio::time::Instant;

use super::key::GatewayKey;

/// The shards of a Gateway are written once no change has come for this long.
pub const SHARD_DEBOUNCE: Duration = Duration::from_millis(50);

/// Upper limit of the delay of a shard write. Each write reloads the broker, which blocks a broker of 15,000 clients for some 60
/// ms: under steady changes that is a quarter of its time. A longer delay would take most of the second within which a revocation
/// must be effective.
pub const MAX_SHARD_DELAY: Duration = Duration::from_millis(250);

/// Upper limit of the delay for Devices that no broker holds yet, under high load: their delay takes access away from no device.
/// Many new Devices are spread over all shards, and a shard write with its reload costs many times a write for one Device.
pub const MAX_NEW_DEVICE_DELAY: Duration = Duration::from_secs(10);

/// With more changes of a Gateway's Devices than this within [`HIGH_LOAD_PERIOD`], its load is high. A single new Device causes
/// about four: its creation, its Secret, and the proof and status once the broker has loaded it.
const HIGH_LOAD_CHANGES: usize = 32;

/// The load stays high for this long after the last change: a user who declares thousands of Devices leaves gaps.
const HIGH_LOAD_PERIOD: Duration = Duration::from_millis(500);

/// Groups the queue by Gateway, so that the Devices of one Gateway do not delay those of another.
#[must_use]
pub fn hash_of(gateway: &GatewayKey) -> u64 {
    let mut hasher = DefaultHasher::new();
    gateway.hash(&mut hasher);
    hasher.finish()
}

/// Measures the load of one Gateway: how many changes of its Devices come within [`HIGH_LOAD_PERIOD`].
#[derive(Debug, Default)]
pub struct Load {
    /// Changes since the begin of the current period.
    changes: usize,
    period: Option<Instant>,
    /// End of the high load, if no further changes come.
    until: Option<Instant>,
}

impl Load {
    /// Counts a change.
    pub fn add(&mut self, now: Instant) {
        if self.is_over(now) {
            (self.changes, self.period) = (0, Some(now));
        }
        self.changes += 1;
        if self.changes > HIGH_LOAD_CHANGES {
            self.until = Some(now + HIGH_LOAD_PERIOD);
        }
    }

    /// Whether the load is high.
    #[must_use]
    pub fn is_high(&self, now: Instant) -> bool {
        self.until.is_some_and(|until| now < until)
    }

    /// End of the high load, if no further changes come.
    #[must_use]
    pub const fn until(&self) -> Option<Instant> {
        self.until
    }

    /// Whether this can be forgotten: the next change starts a new period, and the load is not high.
    #[must_use]
    pub fn is_idle(&self, now: Instant) -> bool {
        self.is_over(now) && !self.is_high(now)
    }

    fn is_over(&self, now: Instant) -> bool {
        self.period.is_none_or(|begin| now >= begin + HIGH_LOAD_PERIOD)
    }
}

/// The quiet time and the upper limit of the delay for Devices that no broker holds yet.
#[must_use]
pub fn gathering_of_arrivals(high_load: bool) -> (Duration, Duration) {
    if high_load { (MAX_NEW_DEVICE_DELAY, MAX_NEW_DEVICE_DELAY) } else { (SHARD_DEBOUNCE, MAX_SHARD_DELAY) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn new_devices_are_batched_only_under_high_load() {
        let at_once = (SHARD_DEBOUNCE, MAX_SHARD_DELAY);
        let together = (MAX_NEW_DEVICE_DELAY, MAX_NEW_DEVICE_DELAY);
        let start = Instant::now();
        let mut load = Load::default();
        // Milliseconds, changes -> delay of new Devices.
        for (millis, changes, expected) in [
            (0, 1, at_once),
            (10, HIGH_LOAD_CHANGES - 1, at_once),
            (20, 1, together),
            (519, 0, together),
            (520, 0, at_once),
            (530, 1, at_once),
            (540, 1000, together),
            (900, 1, together),
            (1399, 0, together),
            (1400, 0, at_once),
        ] {
            let now = start + Duration::from_millis(millis);
            (0..changes).for_each(|_| load.add(now));
            assert_eq!(gathering_of_arrivals(load.is_high(now)), expected, "{millis} ms");
        }
    }
}
