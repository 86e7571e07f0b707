//! The contract between a reading whose values are known and the format of an output.

use fleetwright_copy::{Columns, Key};

/// Encodes readings as the rows of an output, at the moment when their values are known: what a value borrows from the payload is
/// not kept. Callers are generic over it, so that no call is dynamic.
pub trait RowWriter {
    /// Adds a row of the message with this number.
    fn write(&mut self, message: u32, key: Key, columns: Columns<'_>);

    /// The number of rows.
    fn rows(&self) -> usize;

    /// The memory that the rows use, in bytes.
    fn bytes(&self) -> usize;

    /// Removes all rows after the first `rows`, in the order in which they were written.
    fn truncate(&mut self, rows: usize);
}
