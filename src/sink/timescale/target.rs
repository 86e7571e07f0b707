//! The table that a Pipeline writes to.

use super::statements::Statements;

/// The table that is written to, and the Pipeline that owns it.
#[derive(Debug)]
pub struct Target {
    /// Namespace of the Pipeline.
    pub namespace: String,
    /// Name of the Pipeline.
    pub pipeline: String,
    /// The statements for its table.
    pub statements: Statements,
    /// Quota of dead letters that are kept in an hour, in bytes.
    pub dead_letter_bytes_per_hour: i64,
}
