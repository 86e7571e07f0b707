//! What a transaction stored.

use std::collections::{BTreeMap, BTreeSet};

use super::batch::Batch;
use crate::decode::dead_letter::DeadLetterCause;
use crate::state::redelivery::RedeliveryEntry;

/// What a transaction stored of a batch.
#[derive(Debug, Default)]
pub struct Written {
    /// Number of rows that are new.
    pub rows: u64,
    /// Number of rows that existed and got values.
    pub merged: u64,
    /// Number of rows that existed with other values, which were kept or replaced as the Pipeline says.
    pub resolved: u64,
    /// Number of rows that were stored before and did not change.
    pub redelivered: u64,
    /// The dead letters, by the number of their message.
    pub dead_letters: BTreeMap<u32, DeadLetterCause>,
    /// The dead letters that exceed the quota: they are counted, not kept.
    pub discarded: BTreeSet<u32>,
    /// Number of rows of each message that the output refused.
    pub refused_rows: BTreeMap<u32, u32>,
    /// The redelivery entries of the batch.
    pub entries: Vec<RedeliveryEntry>,
}

impl Written {
    /// The messages that are dead letters although other readings of them are rows.
    #[must_use]
    pub fn partial(&self, batch: &Batch) -> BTreeSet<u32> {
        let rows = batch.rows.count_by_message(&self.dead_letters);
        rows.into_iter()
            .filter(|(message, rows)| *rows > self.refused_rows.get(message).copied().unwrap_or(0))
            .map(|(message, _)| message)
            .collect()
    }

    /// Adds a row that the output refused.
    pub fn refuse(&mut self, message: Option<u32>, cause: DeadLetterCause) {
        let Some(message) = message else { return };
        self.dead_letters.entry(message).and_modify(|first| first.join(&cause)).or_insert(cause);
        *self.refused_rows.entry(message).or_default() += 1;
    }
}
