//! The table that a Pipeline writes to.

use super::statements::Statements;
use crate::state::owner::Owner;

/// The table that is written to, and the Pipeline that owns it.
#[derive(Debug)]
pub struct Target {
    /// The Pipeline.
    pub owner: Owner,
    /// The statements for its table.
    pub statements: Statements,
    /// Quota of dead letters that are kept in an hour, in bytes.
    pub dead_letter_bytes_per_hour: i64,
}
