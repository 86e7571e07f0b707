//! The chunks of the table that a batch writes to: pure. A transaction locks each chunk that it writes to, and creates those that do not
//! exist; the locks of all transactions share one table in the memory of the server.

use std::ops::Range;

use crate::decode::bounds::too_large;
use crate::decode::dead_letter::DeadLetterCause;
use crate::decode::time::Time;

/// The most chunks of a message, and the number at which a batch is full. A transaction therefore writes to fewer than twice as many. A new
/// chunk takes 9 locks, an existing one 1 (measured with TimescaleDB 2.31), and PostgreSQL has 6,400 by default
/// (`max_locks_per_transaction` times `max_connections`): the two transactions of a worker take 3,600 at most. 100 chunks are four days of
/// an hour each, or three months of a day each.
pub const MAX_CHUNKS: usize = 100;

/// The cause of a message with readings of too many chunks.
#[must_use]
pub fn too_many_chunks() -> DeadLetterCause {
    too_large(&format!("readings of at most {MAX_CHUNKS} chunks of the table (chunkInterval)"))
}

/// The chunks of the rows of a batch.
#[derive(Debug, Default)]
pub struct Chunks {
    /// The chunk of the last row, in microseconds. Most rows are in the same chunk as the row before.
    last: Range<i64>,
    /// The beginnings of the chunks of the last message.
    message: Vec<i64>,
    /// The beginnings of the chunks of the messages before.
    batch: Vec<i64>,
}

impl Chunks {
    /// Adds a row of the current message. `interval` is the duration of a chunk, in microseconds. `false` if the message has too many chunks.
    pub fn add(&mut self, time: Time, interval: i64) -> bool {
        if self.last.contains(&time.0) {
            return true;
        }
        let start = time.0.saturating_sub(time.0.rem_euclid(interval.max(1)));
        if !self.message.contains(&start) {
            if self.message.len() == MAX_CHUNKS {
                return false;
            }
            self.message.push(start);
        }
        self.last = start..start.saturating_add(interval.max(1));
        true
    }

    /// Ends the current message. `kept`: its rows are in the batch.
    pub fn end_message(&mut self, kept: bool) {
        for start in self.message.drain(..).filter(|_| kept) {
            if !self.batch.contains(&start) {
                self.batch.push(start);
            }
        }
        self.last = 0..0;
    }

    /// The number of chunks of the batch.
    #[must_use]
    pub fn len(&self) -> usize {
        self.batch.len()
    }

    /// Whether there are no rows.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.batch.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_message_has_a_bounded_number_of_chunks() {
        let mut chunks = Chunks::default();
        let bound = i64::try_from(MAX_CHUNKS).unwrap();
        for day in 0..bound {
            assert!(chunks.add(Time(day * 10), 10));
            assert!(chunks.add(Time(day * 10 + 9), 10));
        }
        assert!(!chunks.add(Time(bound * 10), 10));
        assert!(!chunks.add(Time(bound * 10), 10), "as before");
        assert!(chunks.add(Time(5), 10), "a chunk that is counted");
        chunks.end_message(false);
        assert!(chunks.is_empty());
        assert!(chunks.add(Time(bound * 10), 10));
        chunks.end_message(true);
        assert_eq!(chunks.len(), 1);
    }

    #[test]
    fn times_and_intervals_at_the_ends_of_their_ranges() {
        for (time, interval) in [(i64::MIN, i64::MAX), (i64::MAX, i64::MAX), (i64::MIN, 1), (i64::MAX, 1), (0, 0), (-1, -1)] {
            let mut chunks = Chunks::default();
            assert!(chunks.add(Time(time), interval) && chunks.add(Time(time), interval));
            chunks.end_message(true);
            assert_eq!(chunks.len(), 1, "{time} {interval}");
        }
    }

    proptest! {
        #[test]
        fn each_chunk_is_counted_once(messages in prop::collection::vec((prop::collection::vec(-50_i64..50, 0..20), any::<bool>()), 0..20)) {
            let (mut chunks, mut expected) = (Chunks::default(), BTreeSet::new());
            for (times, kept) in messages {
                for time in &times {
                    prop_assert!(chunks.add(Time(*time), 7));
                }
                chunks.end_message(kept);
                expected.extend(times.iter().filter(|_| kept).map(|time| time.div_euclid(7)));
            }
            prop_assert_eq!(chunks.len(), expected.len());
        }
    }
}
