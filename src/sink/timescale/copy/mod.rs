//! Rows in the format of PostgreSQL's `COPY … (FORMAT binary)`, encoded as soon as their values are decoded.
//!
//! <https://www.postgresql.org/docs/current/sql-copy.html#SQL-COPY-FILE-FORMATS-BINARY-FORMAT>
//!
//! A crate because every reading passes through it: it is compiled for speed, the rest of the program for size. So nothing here is
//! generic over types of a caller: such code would be compiled with the caller.

mod timestamptz;

use std::cmp::Ordering;
use std::collections::BTreeMap;

use bytes::Bytes;

use fleetwright_decode::Value;
use fleetwright_decode::time::Time;

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
    /// Number of rows that repeated another row: same key, same values.
    pub repeated: u64,
    /// Rows whose key an earlier row has with other values: message and key.
    pub conflicts: Vec<(u32, Key)>,
}

/// The key of a reading, which is unique in a table.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub struct Key {
    /// Time of the reading.
    pub time: Time,
    /// Number of the device in the registry.
    pub device: i32,
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
    pub fn push(&mut self, message: u32, key: Key, tags: &[&str], values: &[Value<'_>]) {
        let start = self.bytes.len();
        let columns = u16::try_from(2 + tags.len() + values.len()).unwrap_or(u16::MAX);
        self.bytes.extend_from_slice(&columns.to_be_bytes());
        self.put(&timestamptz::encode(key.time));
        self.put(&key.device.to_be_bytes());
        for tag in tags {
            self.put(tag.as_bytes());
        }
        for value in values {
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

    /// The rows of these messages, which are numbered from 0. The order is kept.
    #[must_use]
    pub fn part(&self, messages: std::ops::Range<u32>) -> Self {
        let mut part = Self::default();
        for row in self.index.iter().filter(|row| messages.contains(&row.message)) {
            let start = part.bytes.len();
            part.bytes.extend_from_slice(&self.bytes[row.start..row.end]);
            part.index.push(Row { message: row.message - messages.start, start, end: part.bytes.len(), ..*row });
        }
        part
    }

    /// Removes all rows and keeps their memory for the next ones.
    #[must_use]
    pub fn emptied(mut self) -> Self {
        self.bytes.clear();
        self.index.clear();
        self
    }

    /// Removes all rows after the first `length`, in the order in which they were added.
    pub fn truncate(&mut self, length: usize) {
        self.index.truncate(length);
        self.bytes.truncate(self.index.last().map_or(0, |row| row.end));
    }

    /// Sorts the rows by key, so that concurrent writers cannot deadlock, and keeps one row per key: the first that was added.
    pub fn arrange(&mut self) -> Arranged {
        let mut arranged = Arranged::default();
        let order = |one: &Row, other: &Row| (one.time, one.device).cmp(&(other.time, other.device));
        if self.index.is_sorted_by(|one, other| order(one, other) == Ordering::Less) {
            return arranged;
        }
        self.index.sort_by(order);
        let bytes = &self.bytes;
        self.index.dedup_by(|row, first| {
            let same_key = order(row, first) == Ordering::Equal;
            if same_key && bytes[row.start..row.end] == bytes[first.start..first.end] {
                arranged.repeated += 1;
            } else if same_key {
                arranged.conflicts.push((row.message, Key { time: row.time, device: row.device }));
            }
            same_key
        });
        arranged
    }

    /// The message of a row.
    #[must_use]
    pub fn message(&self, row: usize) -> Option<u32> {
        self.index.get(row).map(|row| row.message)
    }

    /// The number of rows of each of these messages; messages without rows are absent.
    #[must_use]
    pub fn count_by_message<T>(&self, messages: &BTreeMap<u32, T>) -> BTreeMap<u32, u32> {
        let mut counts = BTreeMap::new();
        if !messages.is_empty() {
            for row in self.index.iter().filter(|row| messages.contains_key(&row.message)) {
                *counts.entry(row.message).or_default() += 1;
            }
        }
        counts
    }

    /// The message of the row with this key, after [`Rows::arrange`].
    #[must_use]
    pub fn message_of(&self, key: Key) -> Option<u32> {
        let position = self.index.binary_search_by(|row| (row.time, row.device).cmp(&(key.time, key.device))).ok()?;
        self.message(position)
    }

    /// The first and the last time of a range, after [`Rows::arrange`].
    #[must_use]
    pub fn span(&self, range: std::ops::Range<usize>) -> Option<(Time, Time)> {
        let rows = self.index.get(range)?;
        Some((rows.first()?.time, rows.last()?.time))
    }

    /// The rows of a range as the data of a binary COPY, in pieces.
    pub fn copy_data(&self, range: std::ops::Range<usize>) -> impl Iterator<Item = Bytes> + '_ {
        let mut rows = self.index[range].iter().peekable();
        let mut state = Some(HEADER);
        std::iter::from_fn(move || {
            let header = state?;
            let mut piece = Vec::with_capacity(PIECE_BYTES + PIECE_BYTES / 8);
            piece.extend_from_slice(header);
            state = Some(&[]);
            while let Some(row) = rows.next() {
                piece.extend_from_slice(&self.bytes[row.start..row.end]);
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
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn key(time: i64, device: i32) -> Key {
        Key { time: Time(time), device }
    }

    /// Parses the data of a COPY: time, device, and the rest of each row.
    fn parse(data: &[u8]) -> Vec<(i64, i32, Vec<u8>)> {
        let mut rest = data.strip_prefix(HEADER).unwrap();
        let mut rows = Vec::new();
        while rest != TRAILER {
            let columns = usize::from(u16::from_be_bytes(rest[..2].try_into().unwrap()));
            let mut position = 2;
            for _ in 0..columns {
                let length = i32::from_be_bytes(rest[position..position + 4].try_into().unwrap());
                position += 4 + usize::try_from(length).unwrap_or(0);
            }
            rows.push((
                i64::from_be_bytes(rest[6..14].try_into().unwrap()) + timestamptz::EPOCH.0,
                i32::from_be_bytes(rest[18..22].try_into().unwrap()),
                rest[22..position].to_vec(),
            ));
            rest = &rest[position..];
        }
        rows
    }

    fn data(rows: &Rows) -> Vec<u8> {
        rows.copy_data(0..rows.len()).flat_map(|piece| piece.to_vec()).collect()
    }

    #[test]
    fn emptied_rows_contain_nothing() {
        let mut used = Rows::default();
        used.push(0, key(1, 2), &[], &[Value::Int64(1)]);
        let mut rows = used.emptied();
        assert!(rows.is_empty());
        rows.push(0, key(3, 4), &[], &[Value::Null]);
        assert_eq!(parse(&data(&rows)), [(3, 4, b"\xff\xff\xff\xff".to_vec())]);
    }

    #[test]
    fn every_type_is_encoded() {
        let mut rows = Rows::default();
        let values = [
            Value::Null,
            Value::Float64(1.5),
            Value::Int64(-1),
            Value::Boolean(true),
            Value::Text("é".into()),
            Value::Timestamp(timestamptz::EPOCH.after(3)),
            Value::Json("[1]".into()),
        ];
        rows.push(0, Key { time: timestamptz::EPOCH.after(1), device: 2 }, &["berlin"], &values);
        let expected: &[&[u8]] = &[
            b"PGCOPY\n\xff\r\n\0\0\0\0\0\0\0\0\0",
            b"\0\x0a",
            b"\0\0\0\x08\0\0\0\0\0\0\0\x01",
            b"\0\0\0\x04\0\0\0\x02",
            b"\0\0\0\x06berlin",
            b"\xff\xff\xff\xff",
            b"\0\0\0\x08\x3f\xf8\0\0\0\0\0\0",
            b"\0\0\0\x08\xff\xff\xff\xff\xff\xff\xff\xff",
            b"\0\0\0\x01\x01",
            b"\0\0\0\x02\xc3\xa9",
            b"\0\0\0\x08\0\0\0\0\0\0\0\x03",
            b"\0\0\0\x04\x01[1]",
            b"\xff\xff",
        ];
        assert_eq!(data(&rows), expected.concat());
    }

    #[test]
    fn the_first_row_of_a_key_is_kept() {
        let mut rows = Rows::default();
        for (message, time, value) in [(0, 2, 1.0), (1, 1, 1.0), (2, 2, 1.0), (3, 2, 2.0), (4, 1, 1.0)] {
            rows.push(message, key(time, 7), &[], &[Value::Float64(value)]);
        }
        let arranged = rows.arrange();
        assert_eq!(arranged, Arranged { repeated: 2, conflicts: vec![(3, key(2, 7))] });
        assert_eq!((rows.message(0), rows.message(1), rows.len()), (Some(1), Some(0), 2));
        assert_eq!((rows.message_of(key(2, 7)), rows.message_of(key(3, 7))), (Some(0), None));
    }

    #[test]
    fn a_part_has_the_rows_of_its_messages() {
        let mut rows = Rows::default();
        for (message, time) in [(0, 3), (1, 2), (2, 4), (1, 1)] {
            rows.push(message, key(time, 7), &["tag"], &[Value::Int64(time)]);
        }
        rows.arrange();
        let part = rows.part(1..3);
        let mut expected = Rows::default();
        for (message, time) in [(0, 1), (0, 2), (1, 4)] {
            expected.push(message, key(time, 7), &["tag"], &[Value::Int64(time)]);
        }
        assert_eq!(data(&part), data(&expected));
        assert_eq!((0..3).map(|row| part.message(row)).collect::<Vec<_>>(), [Some(0), Some(0), Some(1)]);
        assert!(rows.part(3..9).is_empty());
    }

    #[test]
    fn truncated_rows_leave_no_bytes() {
        let mut rows = Rows::default();
        rows.push(0, key(1, 1), &[], &[Value::Int64(1)]);
        let before = data(&rows);
        rows.push(1, key(2, 1), &[], &[Value::Text("x".repeat(100).into())]);
        rows.truncate(1);
        assert_eq!(data(&rows), before);
        rows.truncate(0);
        assert_eq!((rows.size(), rows.is_empty()), (0, true));
    }

    proptest! {
        /// Whatever comes in goes out once, sorted, whole, in pieces of any number.
        #[test]
        fn nothing_is_lost_doubled_or_reordered(
            arrivals in prop::collection::vec((0_i64..20, 0_i32..3, 0_i64..3, 0_usize..20_000), 0..40),
        ) {
            let mut rows = Rows::default();
            let mut first = std::collections::BTreeMap::new();
            let (mut repeated, mut conflicts) = (0, 0);
            for (message, (time, device, value, padding)) in arrivals.iter().enumerate() {
                let padding = "x".repeat(*padding);
                let values = [Value::Int64(*value), Value::Text(padding.as_str().into())];
                rows.push(u32::try_from(message).unwrap(), key(*time, *device), &[], &values);
                match first.entry((*time, *device)) {
                    std::collections::btree_map::Entry::Vacant(entry) => drop(entry.insert((*value, padding))),
                    std::collections::btree_map::Entry::Occupied(entry) if *entry.get() == (*value, padding) => repeated += 1,
                    std::collections::btree_map::Entry::Occupied(_) => conflicts += 1,
                }
            }
            let arranged = rows.arrange();
            prop_assert_eq!((arranged.repeated, arranged.conflicts.len()), (repeated, conflicts));
            let parsed = parse(&data(&rows));
            let expected: Vec<_> = first.into_iter().map(|((time, device), (value, padding))| {
                let mut rest = Vec::new();
                for column in [&value.to_be_bytes()[..], padding.as_bytes()] {
                    rest.extend_from_slice(&u32::try_from(column.len()).unwrap().to_be_bytes());
                    rest.extend_from_slice(column);
                }
                (time, device, rest)
            }).collect();
            prop_assert_eq!(parsed, expected);
        }
    }
}
