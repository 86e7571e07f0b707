//! Messages on their way into the database, gathered into transactions.

pub mod due;

use std::collections::BTreeMap;

use bytes::Bytes;

use super::dead_letter::Refusal;
use super::decode::rows::{Key, Rows};
use super::decode::time::Time;
use super::ledger::Entry;
use crate::mqtt::frame::Publish;
use crate::mqtt::window::Place;

/// What one transaction stores: the rows of some messages, the dead letters of others, and how to find back to each message.
#[derive(Debug, Default)]
pub struct Batch {
    /// The rows; each knows its message.
    pub rows: Rows,
    /// What is wrong with a message, by its number.
    pub dead_letters: BTreeMap<u32, Refusal>,
    messages: Vec<Message>,
    blocks: Vec<(Bytes, Time)>,
    block_bytes: usize,
    oldest: Option<Time>,
}

/// A message: where it stands, and how to acknowledge it.
#[derive(Clone, Debug)]
struct Message {
    place: Place,
    arrival: Time,
    packet_id: u16,
    block: u32,
    topic: (u32, u32),
    payload: (u32, u32),
}

/// A message's parts.
#[derive(Clone, Copy, Debug)]
pub struct MessageView<'a> {
    /// When it arrived.
    pub arrival: Time,
    /// Its topic, as the broker sent it.
    pub topic: &'a [u8],
    /// Its payload.
    pub payload: &'a [u8],
}

impl Batch {
    /// An empty batch that takes its memory from the rows of one that is written.
    #[must_use]
    pub fn reusing(written: Rows) -> Self {
        Self { rows: written.emptied(), ..Self::default() }
    }

    /// Adds the block that the messages to come stand in, and when it arrived.
    pub fn add_block(&mut self, block: Bytes, arrival: Time) {
        self.block_bytes += block.len();
        self.blocks.push((block, arrival));
        self.oldest = Some(self.oldest.map_or(arrival, |oldest| oldest.min(arrival)));
    }

    /// Adds a message of the last block; its number. Its time of arrival is that of the block, or one that is its own.
    pub fn add_message(&mut self, place: Place, publish: &Publish, arrival: Time) -> u32 {
        let number = count(self.messages.len());
        // A block is a few packets at most beyond 64 KiB, and a packet at most 256 MiB.
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

    /// Refuses a message, or more of one that is refused already.
    pub fn refuse(&mut self, message: u32, refusal: Refusal) {
        self.dead_letters.entry(message).and_modify(|first| first.join(&refusal)).or_insert(refusal);
    }

    /// Sorts the rows and leaves one a key; rows that contradict another become dead letters. Returns how many stood there twice.
    pub fn arrange(&mut self) -> u64 {
        let arranged = self.rows.arrange();
        for (message, key) in arranged.conflicts {
            self.refuse(message, conflict(key));
        }
        arranged.repeated
    }

    /// A message.
    #[must_use]
    pub fn message(&self, number: u32) -> Option<MessageView<'_>> {
        let message = self.messages.get(number as usize)?;
        let (block, _) = self.blocks.get(message.block as usize)?;
        let part = |(start, end): (u32, u32)| block.get(start as usize..end as usize);
        Some(MessageView { arrival: message.arrival, topic: part(message.topic)?, payload: part(message.payload)? })
    }

    /// The ledger's entry of a message; none for one that is not acknowledged.
    #[must_use]
    pub fn entry(&self, number: u32) -> Option<Entry> {
        let packet_id = self.messages.get(number as usize)?.packet_id;
        let view = self.message(number)?;
        (packet_id > 0).then(|| Entry::new(packet_id, view.topic, view.payload))
    }

    /// The places of the messages, to be settled once the batch is committed.
    pub fn places(&self) -> impl Iterator<Item = Place> + '_ {
        self.messages.iter().map(|message| message.place)
    }

    /// How many messages there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.messages.len()
    }

    /// Whether there is no message.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.messages.is_empty()
    }

    /// The memory that the batch holds, in bytes.
    #[must_use]
    pub fn size(&self) -> usize {
        self.block_bytes + self.rows.size() + self.messages.len() * size_of::<Message>()
    }

    /// When the first message arrived; `None` while there is none.
    #[must_use]
    pub fn arrival(&self) -> Option<Time> {
        self.oldest.filter(|_| !self.is_empty())
    }

    /// When each of the messages arrived.
    pub fn arrivals(&self) -> impl Iterator<Item = Time> + '_ {
        self.messages.iter().filter_map(|message| Some(self.blocks.get(message.block as usize)?.1))
    }
}

/// The refusal of a row whose key another row has.
#[must_use]
pub fn conflict(key: Key) -> Refusal {
    Refusal::new(super::dead_letter::Reason::Conflict, &format!("there is a reading of {} of this device with other values", key.time))
}

fn count(number: usize) -> u32 {
    u32::try_from(number).unwrap_or(u32::MAX)
}
