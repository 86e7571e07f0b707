//! When a batch is submitted.

use std::time::Duration;

use super::chunks::MAX_CHUNKS;

/// The most rows of a batch. Measured: a COPY of 10,000 rows reaches the speed of one that never ends.
pub const MAX_ROWS: usize = 10_000;

/// The most memory of a batch, so that large messages make small batches.
pub const MAX_BYTES: usize = 4 * 1024 * 1024 / 3;

/// The shortest time between the beginnings of two transactions. It limits the fixed cost of transactions (0.3 ms of processor time each,
/// measured) to a tenth of a processor.
const MIN_INTERVAL: Duration = Duration::from_millis(4);

/// The longest time between the beginnings of two transactions. It limits the latency of a reading where commits are slow.
const MAX_INTERVAL: Duration = Duration::from_millis(25);

/// When the next batch is due: at once in an idle worker, so that a reading waits for one commit only, and after the duration of a commit
/// in a busy one.
#[derive(Clone, Copy, Debug)]
pub struct BatchPolicy {
    /// Moving average of the duration of commits.
    commit: Duration,
}

impl Default for BatchPolicy {
    fn default() -> Self {
        Self { commit: MIN_INTERVAL }
    }
}

impl BatchPolicy {
    /// A commit took this long.
    pub fn committed(&mut self, took: Duration) {
        self.commit = (self.commit * 7 + took) / 8;
    }

    /// The time between the beginnings of two transactions, unless a batch is full.
    #[must_use]
    pub fn interval(&self) -> Duration {
        self.commit.clamp(MIN_INTERVAL, MAX_INTERVAL)
    }
}

/// Whether a batch is full: no message is added any more.
#[must_use]
pub fn is_full(rows: usize, size: usize, chunks: usize) -> bool {
    rows >= MAX_ROWS || size >= MAX_BYTES || chunks >= MAX_CHUNKS
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_batch_is_full_by_rows_bytes_or_chunks() {
        for (rows, size, chunks, expected) in [
            (MAX_ROWS - 1, MAX_BYTES - 1, MAX_CHUNKS - 1, false),
            (MAX_ROWS, 0, 0, true),
            (0, MAX_BYTES, 0, true),
            (0, 0, MAX_CHUNKS, true),
        ] {
            assert_eq!(is_full(rows, size, chunks), expected, "{rows} {size} {chunks}");
        }
    }

    #[test]
    fn the_interval_follows_the_duration_of_commits() {
        let mut policy = BatchPolicy::default();
        assert_eq!(policy.interval(), MIN_INTERVAL);
        for _ in 0..100 {
            policy.committed(Duration::from_millis(10));
        }
        assert!((Duration::from_millis(9)..Duration::from_millis(11)).contains(&policy.interval()));
        for _ in 0..100 {
            policy.committed(Duration::from_secs(5));
        }
        assert_eq!(policy.interval(), MAX_INTERVAL);
    }
}
