//! COPY's rows as the rows of a batch.

use fleetwright_copy::{Columns, Key, Rows};

use crate::sink::row_writer::RowWriter;

impl RowWriter for Rows {
    fn write(&mut self, message: u32, key: Key, columns: Columns<'_>) {
        self.push(message, key, columns);
    }

    fn rows(&self) -> usize {
        self.len()
    }

    fn bytes(&self) -> usize {
        self.size()
    }

    fn truncate(&mut self, rows: usize) {
        Rows::truncate(self, rows);
    }
}
