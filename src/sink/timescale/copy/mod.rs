//! Rows in the format of PostgreSQL's `COPY … (FORMAT binary)`, encoded as soon as their values are decoded.
//!
//! <https://www.postgresql.org/docs/current/sql-copy.html#SQL-COPY-FILE-FORMATS-BINARY-FORMAT>
//!
//! A crate because every reading passes through it: it is compiled for speed, the rest of the program for size. So nothing here is
//! generic over types of a caller: such code would be compiled with the caller.

mod columns;
mod timestamptz;

use std::cmp::Ordering;
use std::collections::{BTreeMap, BTreeSet};

use bytes::Bytes;

use fleetwright_api::pipeline::OnConflict;
use fleetwright_decode::Value;
use fleetwright_decode::time::Time;

use self::columns::{Combined, columns, combine};

pub use timestamptz::{Timestamptz, encode as encode_time};

/// Signature, flags and an empty extension.
pub const HEADER: &[u8] = b"PGCOPY\n\xff\r\n\0\0\0\0\0\0\0\0\0";

/// The end of the data: a row of -1 columns.
pub const TRAILER: &[u8] = b"\xff\xff";

/// Size of the pieces in which the data of a COPY is passed to the connection, in bytes. Large enough that the cost of a call is
/// negligible, small enough that the connection's buffer stays small.
pub const PIECE_BYTES: usize = 64 * 1024;

/// Encoded rows, in the order of their arrival until [`Rows::arrange`] sorts them.
#[derive(Debug, Default)]
pub struct Rows {
    bytes: Vec<u8>,
    index: Vec<Row>,
    /// The number of columns of the key after time and device.
    more_key_columns: usize,
    /// The rows with the same key as the row at a position, as they were added; none if there is only one.
    origins: BTreeMap<usize, Vec<Row>>,
    /// The positions of rows whose origins contradict one another.
    contested: BTreeSet<usize>,
}

/// The position of an encoded row, and its key.
#[derive(Clone, Copy, Debug)]
struct Row {
    time: Time,
    device: i32,
    message: u32,
    start: usize,
    end: usize,
}

/// The rows that [`Rows::arrange`] removed.
#[derive(Debug, Default, Eq, PartialEq)]
pub struct Arranged {
    /// Number of rows that have no value which an earlier row of the same key does not have.
    pub repeated: u64,
    /// Number of rows whose values were added to an earlier row of the same key.
    pub merged: u64,
    /// Number of rows that contradicted an earlier row of the same key, which was kept or replaced.
    pub resolved: u64,
}

/// The first two columns of the key of a reading. The key is unique in a table.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub struct Key {
    /// Time of the reading.
    pub time: Time,
    /// Number of the device in the registry.
    pub device: i32,
}

/// The columns of a row after time and device. All rows of a batch have the same numbers of them.
#[derive(Clone, Copy, Debug, Default)]
pub struct Columns<'a> {
    /// The captures of the topic other than the device; a part of the key.
    pub captures: &'a [&'a str],
    /// The fields of the key.
    pub key: &'a [Value<'a>],
    /// The other fields.
    pub values: &'a [Value<'a>],
}

impl Rows {
    /// The number of rows.
    #[must_use]
    pub fn len(&self) -> usize {
        self.index.len()
    }

    /// Whether there are no rows.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.index.is_empty()
    }

    /// The memory that the rows use, in bytes.
    #[must_use]
    pub fn size(&self) -> usize {
        self.bytes.len() + self.index.len() * size_of::<Row>()
    }

    /// Adds a row of the message with this number.
    pub fn push(&mut self, message: u32, key: Key, columns: Columns<'_>) {
        let start = self.bytes.len();
        self.more_key_columns = columns.captures.len() + columns.key.len();
        let count = u16::try_from(2 + self.more_key_columns + columns.values.len()).unwrap_or(u16::MAX);
        self.bytes.extend_from_slice(&count.to_be_bytes());
        self.put(&timestamptz::encode(key.time));
        self.put(&key.device.to_be_bytes());
        for capture in columns.captures {
            self.put(capture.as_bytes());
        }
        for value in columns.key.iter().chain(columns.values) {
            match value {
                Value::Null => self.bytes.extend_from_slice(&(-1_i32).to_be_bytes()),
                Value::Float64(number) => self.put(&number.to_be_bytes()),
                Value::Int64(number) => self.put(&number.to_be_bytes()),
                Value::Boolean(truth) => self.put(&[u8::from(*truth)]),
                Value::Text(text) => self.put(text.as_bytes()),
                Value::Timestamp(time) => self.put(&timestamptz::encode(*time)),
                Value::Json(text) => self.put_json(text),
            }
        }
        self.index.push(Row { time: key.time, device: key.device, message, start, end: self.bytes.len() });
    }

    fn put(&mut self, column: &[u8]) {
        // A column is part of an MQTT packet, which is at most 256 MiB long.
        let length = u32::try_from(column.len()).unwrap_or(u32::MAX);
        self.bytes.extend_from_slice(&length.to_be_bytes());
        self.bytes.extend_from_slice(column);
    }

    /// `jsonb` is sent as a version byte and its text.
    fn put_json(&mut self, text: &str) {
        const VERSION: u8 = 1;
        let length = u32::try_from(text.len() + 1).unwrap_or(u32::MAX);
        self.bytes.extend_from_slice(&length.to_be_bytes());
        self.bytes.push(VERSION);
        self.bytes.extend_from_slice(text.as_bytes());
    }

    /// The rows of these messages as they were added. The messages are numbered from 0. The order is kept.
    #[must_use]
    pub fn part(&self, messages: std::ops::Range<u32>) -> Self {
        let mut part = Self { more_key_columns: self.more_key_columns, ..Self::default() };
        for row in self.added().filter(|row| messages.contains(&row.message)) {
            part.copy(self, &Row { message: row.message - messages.start, ..*row });
        }
        part
    }

    /// The rows as they were added.
    fn added(&self) -> impl Iterator<Item = &Row> {
        let origins = |(position, row)| self.origins.get(&position).map_or(std::slice::from_ref(row), Vec::as_slice);
        self.index.iter().enumerate().flat_map(origins)
    }

    fn copy(&mut self, from: &Self, row: &Row) {
        let start = self.bytes.len();
        self.bytes.extend_from_slice(&from.bytes[row.start..row.end]);
        self.index.push(Row { start, end: self.bytes.len(), ..*row });
    }

    /// Removes all rows and keeps their memory for the next ones.
    #[must_use]
    pub fn emptied(mut self) -> Self {
        self.bytes.clear();
        self.index.clear();
        self.origins.clear();
        self.contested.clear();
        self
    }

    /// Removes all rows after the first `length`, in the order in which they were added.
    pub fn truncate(&mut self, length: usize) {
        self.index.truncate(length);
        self.bytes.truncate(self.index.last().map_or(0, |row| row.end));
    }

    /// Sorts the rows by key, so that concurrent writers cannot deadlock, and makes one row of those with the same key. With
    /// [`OnConflict::DeadLetter`], rows that contradict an earlier row are left out; see [`Rows::contested`].
    pub fn arrange(&mut self, on_conflict: OnConflict) -> Arranged {
        let mut arranged = Arranged::default();
        if self.index.is_sorted_by(|one, other| self.order(one, other) == Ordering::Less) {
            return arranged;
        }
        let mut rows = std::mem::take(&mut self.index);
        rows.sort_by(|one, other| self.order(one, other));
        for row in rows {
            match self.index.last() {
                Some(last) if self.order(last, &row) == Ordering::Equal => self.join(row, on_conflict, &mut arranged),
                _ => self.index.push(row),
            }
        }
        arranged
    }

    fn order(&self, one: &Row, other: &Row) -> Ordering {
        (one.time, one.device).cmp(&(other.time, other.device)).then_with(|| self.more_key(one).cmp(self.more_key(other)))
    }

    /// The encoded columns of the key after time and device.
    fn more_key(&self, row: &Row) -> &[u8] {
        let row = &self.bytes[row.start..row.end];
        columns::key(row, self.more_key_columns)
    }

    /// Joins a row with the last one, which has the same key.
    fn join(&mut self, row: Row, on_conflict: OnConflict, arranged: &mut Arranged) {
        let Some(position) = self.index.len().checked_sub(1) else { return };
        let last = self.index[position];
        let combined = combine(columns(&self.bytes[last.start..last.end]), columns(&self.bytes[row.start..row.end]), on_conflict);
        let Combined { has_conflict, changed } = combined;
        self.origins.entry(position).or_insert_with(|| vec![last]).push(row);
        if has_conflict && on_conflict == OnConflict::DeadLetter {
            self.contested.insert(position);
            return;
        }
        arranged.resolved += u64::from(has_conflict);
        match changed {
            None => arranged.repeated += 1,
            Some(bytes) => {
                arranged.merged += 1;
                let start = self.bytes.len();
                self.bytes.extend_from_slice(&bytes);
                self.index[position] = Row { start, end: self.bytes.len(), ..last };
            }
        }
    }

    /// The message of a row.
    #[must_use]
    pub fn message(&self, row: usize) -> Option<u32> {
        self.index.get(row).map(|row| row.message)
    }

    /// Time and device of a row.
    #[must_use]
    pub fn key(&self, row: usize) -> Option<Key> {
        self.index.get(row).map(|row| Key { time: row.time, device: row.device })
    }

    /// The positions of the rows of this range whose origins contradict one another. The stored row decides which of them are conflicts, so that
    /// they must be written one after the other.
    pub fn contested(&self, range: std::ops::Range<usize>) -> impl Iterator<Item = usize> + '_ {
        self.contested.range(range).copied()
    }

    /// The rows with the same key as this row, one by one, in the order in which they were added; none if there is only one.
    #[must_use]
    pub fn origins(&self, row: usize) -> Vec<Self> {
        let one = |row: &Row| {
            let mut one = Self { more_key_columns: self.more_key_columns, ..Self::default() };
            one.copy(self, row);
            one
        };
        self.origins.get(&row).map(|rows| rows.iter().map(one).collect()).unwrap_or_default()
    }

    /// The number of rows of each of these messages; messages without rows are absent.
    #[must_use]
    pub fn count_by_message<T>(&self, messages: &BTreeMap<u32, T>) -> BTreeMap<u32, u32> {
        let mut counts = BTreeMap::new();
        if !messages.is_empty() {
            for row in self.added().filter(|row| messages.contains_key(&row.message)) {
                *counts.entry(row.message).or_default() += 1;
            }
        }
        counts
    }

    /// The first and the last time of a range, after [`Rows::arrange`].
    #[must_use]
    pub fn span(&self, range: std::ops::Range<usize>) -> Option<(Time, Time)> {
        let rows = self.index.get(range)?;
        Some((rows.first()?.time, rows.last()?.time))
    }

    /// The rows of a range as the data of a binary COPY, in pieces.
    pub fn copy_data(&self, range: std::ops::Range<usize>) -> impl Iterator<Item = Bytes> + '_ {
        self.pieces(range.clone().zip(&self.index[range]), |piece, _, row| piece.extend_from_slice(row))
    }

    /// The same without contested rows, and with the position of each row as its last column (`integer`).
    pub fn numbered_copy_data(&self, range: std::ops::Range<usize>) -> impl Iterator<Item = Bytes> + '_ {
        let rows = range.clone().zip(&self.index[range]).filter(|(position, _)| !self.contested.contains(position));
        self.pieces(rows, |piece, position, row| columns::append_integer(piece, row, i32::try_from(position).unwrap_or(i32::MAX)))
    }

    fn pieces<'r>(
        &'r self,
        rows: impl Iterator<Item = (usize, &'r Row)> + 'r,
        put: impl Fn(&mut Vec<u8>, usize, &[u8]) + 'r,
    ) -> impl Iterator<Item = Bytes> + 'r {
        let mut rows = rows.peekable();
        let mut state = Some(HEADER);
        std::iter::from_fn(move || {
            let header = state?;
            let mut piece = Vec::with_capacity(PIECE_BYTES + PIECE_BYTES / 8);
            piece.extend_from_slice(header);
            state = Some(&[]);
            while let Some((position, row)) = rows.next() {
                put(&mut piece, position, &self.bytes[row.start..row.end]);
                if piece.len() >= PIECE_BYTES && rows.peek().is_some() {
                    return Some(Bytes::from(piece));
                }
            }
            piece.extend_from_slice(TRAILER);
            state = None;
            Some(Bytes::from(piece))
        })
    }
}

#[cfg(test)]
mod tests;
