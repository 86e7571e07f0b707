//! The delay before a change of a device's connection is written: none for an occasional change, and longer and longer for a device
//! that flaps.
//!
//! The method is that of routers (route flap damping, RFC 2439): each change adds a penalty, which halves with time.

/// The penalty halves in this many seconds.
const HALF_LIFE_SECONDS: f32 = 60.0;

/// Penalty up to which a change is written at once: a device that disconnects and reconnects twice.
const FREE_PENALTY: f32 = 4.0;

/// The delay just above that penalty, in seconds; it doubles with each further change …
const INITIAL_HOLD_SECONDS: f32 = 5.0;

/// … up to this maximum.
const MAX_HOLD_SECONDS: f32 = 600.0;

/// Maximum of the penalty, so that changes of a device are written at once again about two minutes after it has become stable.
const MAX_PENALTY: f32 = 12.0;

/// A penalty below this counts as zero.
const MIN_PENALTY: f32 = 0.5;

/// Delay, in seconds, for a device that disconnected together with many others, because its broker or the network failed. After a
/// restart of a broker or of a link, clients reconnect within this time.
pub const STORM_HOLD_SECONDS: u64 = 30;

/// The penalty of a device's changes.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Penalty {
    value: f32,
    /// Seconds of any clock.
    at: f64,
}

impl Penalty {
    /// Adds a change at `now` (seconds), and returns for how many seconds the device must not change from then on.
    pub fn change(&mut self, now: f64) -> f64 {
        self.value = (self.value(now) + 1.0).min(MAX_PENALTY);
        self.at = now;
        hold(self.value)
    }

    /// Whether the penalty is zero.
    #[must_use]
    pub fn is_over(&self, now: f64) -> bool {
        self.value(now) < MIN_PENALTY
    }

    /// Whether a change now would be delayed.
    #[must_use]
    pub fn is_damped(&self, now: f64) -> bool {
        self.value(now) > FREE_PENALTY
    }

    #[allow(clippy::cast_possible_truncation, reason = "a duration in seconds, of which fractions do not matter")]
    fn value(&self, now: f64) -> f32 {
        self.value * (-((now - self.at).max(0.0) as f32) / HALF_LIFE_SECONDS).exp2()
    }
}

/// Seconds for which a device with this penalty must not change.
fn hold(penalty: f32) -> f64 {
    if penalty <= FREE_PENALTY { 0.0 } else { f64::from((INITIAL_HOLD_SECONDS * (penalty - FREE_PENALTY).exp2()).min(MAX_HOLD_SECONDS)) }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Delay in seconds of each of the changes at these times.
    fn holds(times: &[f64]) -> Vec<f64> {
        let mut penalty = Penalty::default();
        times.iter().map(|time| penalty.change(*time).round()).collect()
    }

    #[test]
    fn a_calm_device_shows_at_once() {
        assert_eq!(holds(&[0.0]), [0.0]);
        assert_eq!(holds(&[0.0, 1.0, 2.0, 3.0]), [0.0; 4], "it leaves and comes back twice");
        let every_quarter: Vec<f64> = (0..100).flat_map(|cycle| [f64::from(cycle) * 900.0, f64::from(cycle) * 900.0 + 20.0]).collect();
        assert_eq!(holds(&every_quarter), [0.0; 200], "one that wakes every quarter of an hour");
    }

    #[test]
    fn a_flapping_one_waits_ever_longer_but_not_for_ever() {
        let times: Vec<f64> = (0..20).map(f64::from).collect();
        let holds = holds(&times);
        assert!(holds.windows(2).all(|pair| pair[0] <= pair[1]), "{holds:?}");
        assert!(holds[3] == 0.0 && holds[4] > 0.0 && holds[19] > 599.0, "{holds:?}");
    }

    #[test]
    fn it_is_forgiven_with_time() {
        let mut penalty = Penalty::default();
        for second in 0..1000 {
            penalty.change(f64::from(second));
        }
        assert!(penalty.is_damped(1000.0) && !penalty.is_damped(1120.0));
        assert!(!penalty.is_over(1120.0) && penalty.is_over(1300.0));
        assert!(penalty.change(1300.0) <= 0.0);
    }
}
