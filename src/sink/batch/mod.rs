//! Messages that one transaction stores.

pub mod chunks;
pub mod policy;

use std::collections::BTreeMap;
use std::ops::Range;

use anyhow::Context as _;
use bytes::Bytes;
use fleetwright_copy::{Arranged, Key, Rows};

use self::chunks::Chunks;
use self::policy::is_full;
use super::row_writer::RowWriter;
use crate::api::duration::{EXPECTED, microseconds};
use crate::api::pipeline::{Decode, OnConflict};
use crate::decode::dead_letter::{DeadLetterCause, Reason};
use crate::decode::time::Time;
use crate::mqtt::frame::Publish;
use crate::mqtt::window::Place;
use crate::state::redelivery::RedeliveryEntry;

/// What one transaction stores: the rows of some messages, the dead letters of others, and the position of each message. `W` encodes the
/// rows for the output.
#[derive(Debug, Default)]
pub struct Batch<W = Rows> {
    /// The rows, each with the number of its message.
    pub rows: W,
    /// Why a message is a dead letter, by its number.
    pub dead_letters: BTreeMap<u32, DeadLetterCause>,
    /// The chunks of the rows.
    pub chunks: Chunks,
    /// For a part of a batch that the database refused: the number of batches that the sink had stored at the first refusal.
    pub stored_at_refusal: Option<u64>,
    messages: Vec<Message>,
    blocks: Vec<(Bytes, Time)>,
    message_bytes: usize,
    cause_bytes: usize,
    oldest: Option<Time>,
}

/// What the rows of a Pipeline depend on besides the values of the readings.
#[derive(Clone, Copy, Debug)]
pub struct RowOptions {
    /// How much time a chunk of the table covers, in microseconds.
    pub chunk_interval: i64,
    /// The number of fields of the key, which are the first.
    pub key_fields: usize,
    /// What is done with rows that have the same key and other values.
    pub on_conflict: OnConflict,
}

impl RowOptions {
    /// The options for `decode`, which has the fields of the key first. `chunk_interval` is a duration.
    ///
    /// # Errors
    /// If the chunk interval is not a duration.
    pub fn new(decode: &Decode, chunk_interval: &str, on_conflict: OnConflict) -> anyhow::Result<Self> {
        let chunk_interval = microseconds(chunk_interval)
            .with_context(|| format!("failed to read chunkInterval: expected {EXPECTED}, found {chunk_interval:?}"))?;
        Ok(Self { chunk_interval, key_fields: decode.key_fields(), on_conflict })
    }
}

/// The position of a message in its block, and its place in the order of acknowledgements.
#[derive(Clone, Debug)]
struct Message {
    place: Place,
    arrival: Time,
    packet_id: u16,
    block: u32,
    topic: (u32, u32),
    payload: (u32, u32),
}

/// The parts of a message.
#[derive(Clone, Copy, Debug)]
pub struct MessageView<'a> {
    /// Its time of arrival.
    pub arrival: Time,
    /// Its topic, as the broker sent it.
    pub topic: &'a [u8],
    /// Its payload.
    pub payload: &'a [u8],
}

impl Batch {
    /// An empty batch that reuses the memory of the rows of a written batch.
    #[must_use]
    pub fn reusing(written: Rows) -> Self {
        Self { rows: written.emptied(), ..Self::default() }
    }

    /// Sorts the rows and makes one row of those with the same key.
    pub fn arrange(&mut self, on_conflict: OnConflict) -> Arranged {
        self.rows.arrange(on_conflict)
    }

    /// Two batches with the first half of the messages and the rest.
    #[must_use]
    pub fn halves(&self) -> [Self; 2] {
        let middle = self.messages.len() / 2;
        [self.part(0..middle), self.part(middle..self.messages.len())]
    }

    /// A batch with these messages only. It shares their blocks with this one.
    fn part(&self, range: Range<usize>) -> Self {
        let numbers = count(range.start)..count(range.end);
        let mut part = Self { rows: self.rows.part(numbers.clone()), stored_at_refusal: self.stored_at_refusal, ..Self::default() };
        let messages = self.messages.get(range).unwrap_or_default();
        let first = messages.first().map_or(0, |message| message.block);
        let last = messages.last().map_or(0, |message| message.block + 1);
        for (block, arrival) in self.blocks.get(first as usize..last as usize).unwrap_or_default() {
            part.add_block(block.clone(), *arrival);
        }
        let length = |(start, end): (u32, u32)| (end - start) as usize;
        part.message_bytes = messages.iter().map(|message| length(message.topic) + length(message.payload)).sum();
        part.messages = messages.iter().map(|message| Message { block: message.block - first, ..message.clone() }).collect();
        for (number, cause) in self.dead_letters.range(numbers.clone()) {
            part.refuse(number - numbers.start, cause.clone());
        }
        part
    }

    /// Makes its only message a dead letter without rows.
    pub fn reject(&mut self, cause: DeadLetterCause) {
        self.rows = std::mem::take(&mut self.rows).emptied();
        self.refuse(0, cause);
    }
}

impl<W: RowWriter> Batch<W> {
    /// Adds the block that contains the next messages, and its time of arrival.
    pub fn add_block(&mut self, block: Bytes, arrival: Time) {
        self.blocks.push((block, arrival));
        self.oldest = Some(self.oldest.map_or(arrival, |oldest| oldest.min(arrival)));
    }

    /// Whether the last block is this one.
    #[must_use]
    pub fn ends_with(&self, block: &Bytes) -> bool {
        self.blocks.last().is_some_and(|(last, _)| last.as_ptr() == block.as_ptr() && last.len() == block.len())
    }

    /// Removes the last block if it has no message of the batch.
    pub fn drop_unused_block(&mut self) {
        if self.messages.last().is_none_or(|message| message.block as usize + 1 < self.blocks.len()) {
            self.blocks.pop();
        }
    }

    /// Adds a message of the last block. Returns its number.
    pub fn add_message(&mut self, place: Place, publish: &Publish, arrival: Time) -> u32 {
        let number = count(self.messages.len());
        // A block exceeds 64 KiB by a few packets at most, and a packet has at most 256 MiB.
        self.message_bytes += publish.topic.len() + publish.payload.len();
        let span = |range: &std::ops::Range<usize>| (count(range.start), count(range.end));
        self.messages.push(Message {
            place,
            arrival,
            packet_id: publish.packet_id,
            block: count(self.blocks.len().saturating_sub(1)),
            topic: span(&publish.topic),
            payload: span(&publish.payload),
        });
        number
    }

    /// Makes a message a dead letter, or adds a cause to one.
    pub fn refuse(&mut self, message: u32, cause: DeadLetterCause) {
        self.cause_bytes += CAUSE_BYTES + cause.detail.len();
        self.dead_letters.entry(message).and_modify(|first| first.join(&cause)).or_insert(cause);
    }

    /// A message.
    #[must_use]
    pub fn message(&self, number: u32) -> Option<MessageView<'_>> {
        let message = self.messages.get(number as usize)?;
        let (block, _) = self.blocks.get(message.block as usize)?;
        let part = |(start, end): (u32, u32)| block.get(start as usize..end as usize);
        Some(MessageView { arrival: message.arrival, topic: part(message.topic)?, payload: part(message.payload)? })
    }

    /// The redelivery entry of a message; `None` for a message without acknowledgement.
    #[must_use]
    pub fn entry(&self, number: u32) -> Option<RedeliveryEntry> {
        let packet_id = self.messages.get(number as usize)?.packet_id;
        let view = self.message(number)?;
        (packet_id > 0).then(|| RedeliveryEntry::new(packet_id, view.topic, view.payload))
    }

    /// The redelivery entries to commit with it: of all messages, or of its dead letters, because the key of the table identifies the others.
    #[must_use]
    pub fn entries(&self, all: bool) -> Vec<RedeliveryEntry> {
        if all {
            (0..count(self.messages.len())).filter_map(|number| self.entry(number)).collect()
        } else {
            self.dead_letters.keys().filter_map(|number| self.entry(*number)).collect()
        }
    }

    /// The places of the messages, to be settled once the batch is committed.
    pub fn places(&self) -> impl Iterator<Item = Place> + '_ {
        self.messages.iter().map(|message| message.place)
    }

    /// The number of messages.
    #[must_use]
    pub fn len(&self) -> usize {
        self.messages.len()
    }

    /// Whether there are no messages.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.messages.is_empty()
    }

    /// The memory that the batch uses, in bytes.
    #[must_use]
    pub fn size(&self) -> usize {
        // A block is counted by its messages, because batches share it.
        let blocks = self.message_bytes + self.blocks.len() * size_of::<(Bytes, Time)>();
        blocks + self.cause_bytes + self.rows.bytes() + self.messages.len() * size_of::<Message>()
    }

    /// Whether no message is added any more.
    #[must_use]
    pub fn is_full(&self) -> bool {
        is_full(self.rows.rows(), self.size(), self.chunks.len())
    }

    /// Time of arrival of the first message; `None` for an empty batch.
    #[must_use]
    pub fn arrival(&self) -> Option<Time> {
        self.oldest.filter(|_| !self.is_empty())
    }

    /// Time of arrival of each message.
    pub fn arrivals(&self) -> impl Iterator<Item = Time> + '_ {
        self.messages.iter().filter_map(|message| Some(self.blocks.get(message.block as usize)?.1))
    }
}

/// Memory of a dead letter beside its detail, in bytes: its share of a node of the map.
const CAUSE_BYTES: usize = 64;

/// The cause of a row whose key another row has.
#[must_use]
pub fn conflict(key: Key) -> DeadLetterCause {
    let detail = format!(
        "the device has a row of {} with other values: set `key: true` for the field that distinguishes the readings, or set \
         `sink.timescale.onConflict`",
        key.time
    );
    DeadLetterCause::new(Reason::Conflict, &detail)
}

fn count(number: usize) -> u32 {
    u32::try_from(number).unwrap_or(u32::MAX)
}
