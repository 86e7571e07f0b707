//! How long a session waits between two attempts.

use std::time::Duration;

use rand::RngExt;
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;

/// The shortest and the longest wait before the next attempt to connect; doubled at each failure.
const BACKOFF: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(5));

/// Exponential backoff with jitter, so that workers that lost one broker do not come back as one.
pub(super) struct Backoff(Duration);

impl Default for Backoff {
    fn default() -> Self {
        Self(BACKOFF.0)
    }
}

impl Backoff {
    /// Waits; `false` when the worker is to stop.
    pub(super) async fn wait(&mut self, shutdown: &CancellationToken) -> bool {
        let wait = self.0.mul_f64(rand::rng().random_range(0.5..1.0));
        self.0 = (self.0 * 2).min(BACKOFF.1);
        tokio::select! {
            () = shutdown.cancelled() => false,
            () = sleep(wait) => true,
        }
    }
}
