//! When a batch goes to the database.

use std::time::Duration;

/// The most rows of a batch. Measured: a COPY of 10,000 rows reaches the speed of one that never ends.
pub const MOST_ROWS: usize = 10_000;

/// The most memory of a batch, so that large messages make small batches.
pub const MOST_BYTES: usize = 4 * 1024 * 1024 / 3;

/// The shortest and the longest time between the beginnings of two transactions. The shortest bounds what a transaction costs
/// beside its rows, some 0.3 ms of processor, to a tenth of one; the longest keeps a reading's way short where commits are slow.
const SPACING: (Duration, Duration) = (Duration::from_millis(4), Duration::from_millis(25));

/// When the next batch is due: an idle worker's at once, so that it waits for one commit only; a busy one's
/// after as long as a commit takes.
#[derive(Clone, Copy, Debug)]
pub struct Pace {
    /// A mean of how long commits take.
    commit: Duration,
}

impl Default for Pace {
    fn default() -> Self {
        Self { commit: SPACING.0 }
    }
}

impl Pace {
    /// A commit took this long.
    pub fn committed(&mut self, took: Duration) {
        self.commit = (self.commit * 7 + took) / 8;
    }

    /// How long after the beginning of one transaction the next one begins, unless a batch is full.
    #[must_use]
    pub fn spacing(&self) -> Duration {
        self.commit.clamp(SPACING.0, SPACING.1)
    }
}

/// Whether a batch takes no more messages.
#[must_use]
pub fn is_full(rows: usize, size: usize) -> bool {
    rows >= MOST_ROWS || size >= MOST_BYTES
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_pace_follows_the_database() {
        let mut pace = Pace::default();
        assert_eq!(pace.spacing(), SPACING.0);
        for _ in 0..100 {
            pace.committed(Duration::from_millis(10));
        }
        assert!((Duration::from_millis(9)..Duration::from_millis(11)).contains(&pace.spacing()));
        for _ in 0..100 {
            pace.committed(Duration::from_secs(5));
        }
        assert_eq!(pace.spacing(), SPACING.1);
    }
}
