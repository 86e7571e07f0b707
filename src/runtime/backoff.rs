//! Exponential backoff with jitter, for every retry of the program.

use std::time::Duration;

use rand::RngExt;

/// The smallest part of a delay that jitter leaves. Half: clients that failed together spread over half of the delay, and none
/// retries at once.
const MIN_JITTER: f64 = 0.5;

/// The delays between the attempts of one operation: doubled at each failure up to a maximum.
#[derive(Clone, Copy, Debug)]
pub struct Backoff {
    initial: Duration,
    max: Duration,
    next: Duration,
}

impl Backoff {
    /// Delays that start at `initial` and never exceed `max`.
    #[must_use]
    pub const fn new(initial: Duration, max: Duration) -> Self {
        Self { initial, max, next: initial }
    }

    /// Starts at the initial delay again, after a success.
    pub const fn reset(&mut self) {
        self.next = self.initial;
    }

    /// The delay before the next attempt: between half of the current delay and all of it. Doubles the current delay.
    pub fn next_delay(&mut self) -> Duration {
        self.next_delay_with(rand::rng().random_range(0.0..1.0))
    }

    /// The same with a given jitter from 0 to 1, for code that must be deterministic.
    pub fn next_delay_with(&mut self, jitter: f64) -> Duration {
        let delay = self.next.min(self.max);
        self.next = delay.saturating_mul(2).min(self.max);
        delay.mul_f64(MIN_JITTER + jitter.clamp(0.0, 1.0) * (1.0 - MIN_JITTER))
    }

    /// Sleeps for the next delay. Cancel safe.
    pub async fn wait(&mut self) {
        tokio::time::sleep(self.next_delay()).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn delays_double_up_to_the_maximum_and_start_again_after_a_reset() {
        let mut backoff = Backoff::new(Duration::from_secs(1), Duration::from_secs(5));
        let delays: Vec<u64> = (0..5).map(|_| backoff.next_delay_with(1.0).as_secs()).collect();
        assert_eq!(delays, [1, 2, 4, 5, 5]);
        backoff.reset();
        assert_eq!(backoff.next_delay_with(1.0), Duration::from_secs(1));
    }

    #[test]
    fn jitter_takes_away_up_to_half_of_a_delay() {
        let mut backoff = Backoff::new(Duration::from_secs(2), Duration::from_secs(2));
        assert_eq!(backoff.next_delay_with(0.0), Duration::from_secs(1));
        let delay = backoff.next_delay();
        assert!(delay >= Duration::from_secs(1) && delay <= Duration::from_secs(2), "{delay:?}");
    }
}
