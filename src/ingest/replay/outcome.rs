//! The result of a replay.

use std::collections::BTreeMap;

use crate::state::replay_progress::ReplayCounts;

/// The result of the replay of some dead letters.
#[derive(Debug, Default)]
pub struct ReplayOutcome {
    /// The counts of dead letters.
    pub counts: ReplayCounts,
    /// The number of new rows.
    pub rows: u64,
    /// The number of refused dead letters by reason, with the detail of one of them.
    pub reasons: BTreeMap<&'static str, (u64, String)>,
}

impl ReplayOutcome {
    /// Adds the result of more dead letters.
    pub fn add(&mut self, more: Self) {
        self.counts.letters += more.counts.letters;
        self.counts.stored += more.counts.stored;
        self.counts.refused += more.counts.refused;
        self.counts.partial += more.counts.partial;
        self.rows += more.rows;
        for (reason, (count, example)) in more.reasons {
            self.reasons.entry(reason).or_insert((0, example)).0 += count;
        }
    }
}
