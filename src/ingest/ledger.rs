//! What was committed and not yet surely acknowledged, so that a redelivery of what no key identifies is not stored twice.
//!
//! A reading timed by its arrival gets another time when the broker sends it again, and a dead letter has no key at all. So the
//! transaction that stores one also stores the packet identifier and a hash of its message. A message that the broker marks as
//! sent before (DUP) and that stands here is acknowledged, and not stored again. An entry goes when the broker has
//! answered a PINGREQ that was sent behind the acknowledgement, or when it uses the packet identifier for a new message.

use std::collections::HashMap;

use sha2::{Digest, Sha256};

/// A message that no key identifies.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Entry {
    /// Its packet identifier.
    pub packet_id: u16,
    /// Of its topic and payload.
    pub hash: u64,
}

/// Length of an encoded entry.
const ENTRY_LENGTH: usize = 10;

impl Entry {
    /// The entry of a message.
    #[must_use]
    pub fn new(packet_id: u16, topic: &[u8], payload: &[u8]) -> Self {
        let mut hasher = Sha256::new();
        hasher.update((topic.len() as u64).to_be_bytes());
        hasher.update(topic);
        hasher.update(payload);
        let digest: [u8; 32] = hasher.finalize().into();
        let first: [u8; 8] = std::array::from_fn(|index| digest[index]);
        Self { packet_id, hash: u64::from_be_bytes(first) }
    }

    /// Entries as the database keeps them.
    #[must_use]
    pub fn encode(entries: &[Self]) -> Vec<u8> {
        entries.iter().flat_map(|entry| entry.packet_id.to_be_bytes().into_iter().chain(entry.hash.to_be_bytes())).collect()
    }

    /// Entries as the database keeps them. An odd end is left out.
    pub fn decode(bytes: &[u8]) -> impl Iterator<Item = Self> + '_ {
        bytes.chunks_exact(ENTRY_LENGTH).map(|chunk| Self {
            packet_id: u16::from_be_bytes([chunk[0], chunk[1]]),
            hash: chunk[2..].iter().fold(0, |hash, byte| (hash << 8) | u64::from(*byte)),
        })
    }
}

/// An entry that waits for the broker to have processed its acknowledgement.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Acknowledged {
    packet_id: u16,
    batch: i64,
}

/// The entries of a session.
#[derive(Debug, Default)]
pub struct Ledger {
    entries: HashMap<u16, (u64, i64)>,
    /// How many entries each batch has left.
    left: HashMap<i64, usize>,
    expired: Vec<i64>,
}

impl Ledger {
    /// A batch with these entries is committed.
    pub fn commit(&mut self, batch: i64, entries: impl IntoIterator<Item = Entry>) {
        for entry in entries {
            self.forget(entry.packet_id);
            self.entries.insert(entry.packet_id, (entry.hash, batch));
            *self.left.entry(batch).or_default() += 1;
        }
    }

    /// Whether a message that the broker may have sent before is committed already. If it is not, the broker has used the packet
    /// identifier for another message, and its entry goes.
    pub fn holds(&mut self, entry: Entry) -> bool {
        let held = self.entries.get(&entry.packet_id).is_some_and(|(hash, _)| *hash == entry.hash);
        if !held {
            self.forget(entry.packet_id);
        }
        held
    }

    /// The broker has used the packet identifier for a new message, and so has processed the acknowledgement of the last.
    pub fn forget(&mut self, packet_id: u16) {
        if let Some((_, batch)) = self.entries.remove(&packet_id) {
            self.release(batch);
        }
    }

    /// The message is being acknowledged; what to [`Ledger::confirm`] if it has an entry.
    #[must_use]
    pub fn acknowledge(&self, packet_id: u16) -> Option<Acknowledged> {
        self.entries.get(&packet_id).map(|(_, batch)| Acknowledged { packet_id, batch: *batch })
    }

    /// The broker has processed the acknowledgement.
    pub fn confirm(&mut self, acknowledged: Acknowledged) {
        if self.entries.get(&acknowledged.packet_id).is_some_and(|(_, batch)| *batch == acknowledged.batch) {
            self.forget(acknowledged.packet_id);
        }
    }

    /// The broker has forgotten the session: its packet identifiers mean nothing any more.
    pub fn clear(&mut self) {
        self.entries.clear();
        self.expired.extend(self.left.drain().map(|(batch, _)| batch));
    }

    /// Whether there is no entry.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// The batches that have no entries left: what the database may forget.
    pub fn take_expired(&mut self) -> Vec<i64> {
        std::mem::take(&mut self.expired)
    }

    fn release(&mut self, batch: i64) {
        if let Some(left) = self.left.get_mut(&batch) {
            *left -= 1;
            if *left == 0 {
                self.left.remove(&batch);
                self.expired.push(batch);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn entry(packet_id: u16, payload: &str) -> Entry {
        Entry::new(packet_id, b"devices/press-1/telemetry", payload.as_bytes())
    }

    #[test]
    fn a_redelivery_is_known_until_it_is_confirmed() {
        let mut ledger = Ledger::default();
        ledger.commit(1, [entry(1, "a"), entry(2, "b")]);
        assert!(ledger.holds(entry(1, "a")));
        let acknowledged = ledger.acknowledge(1).unwrap();
        ledger.confirm(acknowledged);
        assert!(!ledger.holds(entry(1, "a")));
        assert!(ledger.take_expired().is_empty());
        ledger.forget(2);
        assert_eq!((ledger.take_expired(), ledger.is_empty()), (vec![1], true));
    }

    #[test]
    fn another_message_of_the_same_identifier_is_new() {
        let mut ledger = Ledger::default();
        ledger.commit(1, [entry(1, "a")]);
        assert!(!ledger.holds(entry(1, "b")));
        assert_eq!(ledger.take_expired(), [1]);
    }

    /// The broker uses an identifier again as soon as it has the acknowledgement, before it answers the PINGREQ.
    #[test]
    fn a_late_confirmation_spares_the_next_message() {
        let mut ledger = Ledger::default();
        ledger.commit(1, [entry(1, "a")]);
        let late = ledger.acknowledge(1).unwrap();
        ledger.forget(1);
        ledger.commit(2, [entry(1, "b")]);
        ledger.confirm(late);
        assert!(ledger.holds(entry(1, "b")));
    }

    #[test]
    fn a_session_that_is_gone_leaves_nothing() {
        let mut ledger = Ledger::default();
        ledger.commit(1, [entry(1, "a")]);
        ledger.clear();
        assert!(!ledger.holds(entry(1, "a")));
        assert_eq!(ledger.take_expired(), [1]);
    }

    proptest! {
        #[test]
        fn entries_survive_the_database(ids in prop::collection::vec((any::<u16>(), any::<u64>()), 0..50)) {
            let entries: Vec<Entry> = ids.into_iter().map(|(packet_id, hash)| Entry { packet_id, hash }).collect();
            prop_assert_eq!(Entry::decode(&Entry::encode(&entries)).collect::<Vec<_>>(), entries);
        }
    }
}
