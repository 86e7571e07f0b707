//! Messages that one transaction stores.

pub mod policy;

use std::collections::BTreeMap;

use bytes::Bytes;
use fleetwright_copy::{Key, Rows};

use super::row_writer::RowWriter;
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
    messages: Vec<Message>,
    blocks: Vec<(Bytes, Time)>,
    block_bytes: usize,
    oldest: Option<Time>,
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

    /// Sorts the rows and keeps one per key; rows that contradict another become dead letters. Returns the number of repeated rows.
    pub fn arrange(&mut self) -> u64 {
        let arranged = self.rows.arrange();
        for (message, key) in arranged.conflicts {
            self.refuse(message, conflict(key));
        }
        arranged.repeated
    }
}

impl<W: RowWriter> Batch<W> {
    /// Adds the block that contains the next messages, and its time of arrival.
    pub fn add_block(&mut self, block: Bytes, arrival: Time) {
        self.block_bytes += block.len();
        self.blocks.push((block, arrival));
        self.oldest = Some(self.oldest.map_or(arrival, |oldest| oldest.min(arrival)));
    }

    /// Adds a message of the last block. Returns its number.
    pub fn add_message(&mut self, place: Place, publish: &Publish, arrival: Time) -> u32 {
        let number = count(self.messages.len());
        // A block exceeds 64 KiB by a few packets at most, and a packet has at most 256 MiB.
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
        self.block_bytes + self.rows.bytes() + self.messages.len() * size_of::<Message>()
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

/// The cause of a row whose key another row has.
#[must_use]
pub fn conflict(key: Key) -> DeadLetterCause {
    DeadLetterCause::new(Reason::Conflict, &format!("there is a reading of {} of this device with other values", key.time))
}

fn count(number: usize) -> u32 {
    u32::try_from(number).unwrap_or(u32::MAX)
}
