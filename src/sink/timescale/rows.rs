//! COPY's rows as the rows of a batch.

use fleetwright_copy::{Key, Rows};

use crate::decode::Value;
use crate::sink::row_writer::RowWriter;

impl RowWriter for Rows {
    fn write(&mut self, message: u32, key: Key, tags: &[&str], values: &[Value<'_>]) {
        self.push(message, key, tags, values);
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
