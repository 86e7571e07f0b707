//! The result of a replay.

use std::collections::BTreeMap;

/// The result of the replay of some dead letters.
#[derive(Debug, Default)]
pub struct ReplayOutcome {
    /// The number of processed dead letters.
    pub letters: u64,
    /// The number of dead letters that were stored as rows and deleted.
    pub stored: u64,
    /// The number of new rows.
    pub rows: u64,
    /// The number of dead letters that were refused again.
    pub refused: u64,
    /// The number of unchanged dead letters: some of their readings are rows with the time of arrival, which does not identify them.
    pub partial: u64,
    /// The number of refused dead letters by reason, with the detail of one of them.
    pub reasons: BTreeMap<&'static str, (u64, String)>,
}

impl ReplayOutcome {
    /// Adds the result of more dead letters.
    pub fn add(&mut self, more: Self) {
        self.letters += more.letters;
        self.stored += more.stored;
        self.rows += more.rows;
        self.refused += more.refused;
        self.partial += more.partial;
        for (reason, (count, example)) in more.reasons {
            self.reasons.entry(reason).or_insert((0, example)).0 += count;
        }
    }
}
