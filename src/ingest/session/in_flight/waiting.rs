//! Messages that are not in a batch yet.

use std::collections::VecDeque;

use crate::decode::time::Time;
use crate::ingest::processor::InboundMessage;

/// The maximum number of messages that wait until the registry has looked up their device. While the registry answers, a further message is
/// refused (`UnknownDevice`); otherwise the session does not read beyond it.
pub const MAX_PARKED: usize = 1_000;

/// The maximum memory of these messages, in bytes: a quarter of the minimum share of a session.
const MAX_PARKED_BYTES: usize = 256 * 1024;

/// How many stored messages may wait for the acknowledgement of a message whose device is looked up: half of the receive maximum. Beyond it
/// the broker would soon send no more messages.
pub const MAX_BLOCKED: usize = 32_767;

/// Messages in the order of their arrival.
#[derive(Debug, Default)]
pub struct Waiting {
    messages: VecDeque<InboundMessage>,
    bytes: usize,
}

impl Waiting {
    /// Adds a message.
    pub fn push(&mut self, message: InboundMessage) {
        self.bytes += message.size();
        self.messages.push_back(message);
    }

    /// Takes the first message.
    pub fn pop(&mut self) -> Option<InboundMessage> {
        let message = self.messages.pop_front()?;
        self.bytes -= message.size();
        Some(message)
    }

    /// Whether the limit of messages that wait for the registry is reached.
    pub fn is_full(&self) -> bool {
        self.messages.len() >= MAX_PARKED || self.bytes >= MAX_PARKED_BYTES
    }

    /// The number of messages.
    pub fn len(&self) -> usize {
        self.messages.len()
    }

    /// Whether there are no messages.
    pub fn is_empty(&self) -> bool {
        self.messages.is_empty()
    }

    /// Their memory, in bytes.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// The arrival of the first message.
    pub fn oldest(&self) -> Option<Time> {
        self.messages.front().map(|message| message.arrival)
    }
}
