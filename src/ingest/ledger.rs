//! What was committed and not yet surely acknowledged, so that a redelivery of what no key identifies is not stored twice.
//!
//! A reading timed by its arrival gets another time when the broker sends it again, and a dead letter has no key at all. So the
//! transaction that stores one also stores the packet identifier and a hash of its message. When a session is resumed, the
//! broker first sends again what it holds for unacknowledged, under the same packet identifiers (MQTT 5.0, 4.4): of these, what
//! stands here is acknowledged, and not stored again. The mark DUP is not asked for at first: Mosquitto 2.1 forgets it when it is
//! killed (measured). A broker that does all in order has sent all of it again before it answers a PINGREQ that was sent right after the
//! login. One whose connections fetch what is queued from elsewhere may answer first (RMQTT 0.24 does, measured): after the answer, what
//! is marked is still looked for, until the first regular PINGREQ is answered. What was not sent again by then was acknowledged.
//! Otherwise an entry goes when a PINGREQ behind its acknowledgement is answered.

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

/// An entry in memory.
#[derive(Debug)]
struct Held {
    hash: u64,
    batch: i64,
    /// Whether its message came by this connection.
    current: bool,
}

/// The entries of a session.
#[derive(Debug, Default)]
pub struct Ledger {
    entries: HashMap<u16, Held>,
    /// Whether what comes may have been sent before, though it is not marked so.
    resending: bool,
    /// How many entries each batch has left.
    left: HashMap<i64, usize>,
    expired: Vec<i64>,
}

impl Ledger {
    /// A batch with these entries is committed.
    pub fn commit(&mut self, batch: i64, entries: impl IntoIterator<Item = Entry>) {
        for entry in entries {
            self.forget(entry.packet_id);
            self.entries.insert(entry.packet_id, Held { hash: entry.hash, batch, current: true });
            *self.left.entry(batch).or_default() += 1;
        }
    }

    /// A session is resumed: the broker sends again what it holds for unacknowledged.
    pub fn resume(&mut self) {
        self.resending = true;
        for held in self.entries.values_mut() {
            held.current = false;
        }
    }

    /// A broker that does all in order has sent again all that it will.
    pub fn expect_marked(&mut self) {
        self.resending = false;
    }

    /// Every broker has sent again all that it will: what was not among it is acknowledged.
    pub fn end_resending(&mut self) {
        self.resending = false;
        let acknowledged: Vec<u16> = self.entries.iter().filter(|(_, held)| !held.current).map(|(packet_id, _)| *packet_id).collect();
        for packet_id in acknowledged {
            self.forget(packet_id);
        }
    }

    /// A message has come under a packet identifier: whether it is committed already. If it is not, the broker has used the
    /// identifier again, and the entry of the message before goes. `duplicate`: it is marked as sent before. `hash` is asked for only
    /// where there is an entry.
    pub fn holds(&mut self, packet_id: u16, duplicate: bool, hash: impl FnOnce() -> u64) -> bool {
        let Some(held) = self.entries.get_mut(&packet_id) else { return false };
        if (duplicate || self.resending) && !held.current && held.hash == hash() {
            held.current = true;
            return true;
        }
        self.forget(packet_id);
        false
    }

    fn forget(&mut self, packet_id: u16) {
        if let Some(held) = self.entries.remove(&packet_id) {
            self.release(held.batch);
        }
    }

    /// The message is being acknowledged; what to [`Ledger::confirm`] if it has an entry.
    #[must_use]
    pub fn acknowledge(&self, packet_id: u16) -> Option<Acknowledged> {
        self.entries.get(&packet_id).map(|held| Acknowledged { packet_id, batch: held.batch })
    }

    /// The broker has processed the acknowledgement.
    pub fn confirm(&mut self, acknowledged: Acknowledged) {
        if self.entries.get(&acknowledged.packet_id).is_some_and(|held| held.batch == acknowledged.batch) {
            self.forget(acknowledged.packet_id);
        }
    }

    /// The broker has forgotten the session: its packet identifiers mean nothing any more.
    pub fn clear(&mut self) {
        self.entries.clear();
        self.expired.extend(self.left.drain().map(|(batch, _)| batch));
    }

    /// Whether there is no entry.
    #[cfg(test)]
    fn is_empty(&self) -> bool {
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

    fn holds(ledger: &mut Ledger, entry: Entry) -> bool {
        ledger.holds(entry.packet_id, false, || entry.hash)
    }

    fn holds_marked(ledger: &mut Ledger, entry: Entry) -> bool {
        ledger.holds(entry.packet_id, true, || entry.hash)
    }

    #[test]
    fn a_redelivery_is_known_once_a_connection_until_it_is_confirmed() {
        let mut ledger = Ledger::default();
        ledger.commit(1, [entry(1, "a"), entry(2, "b")]);
        for _ in 0..2 {
            ledger.resume();
            assert!(holds(&mut ledger, entry(1, "a")));
        }
        let acknowledged = ledger.acknowledge(1).unwrap();
        ledger.confirm(acknowledged);
        assert!(!holds(&mut ledger, entry(1, "a")));
        assert!(ledger.take_expired().is_empty());
        ledger.end_resending();
        assert_eq!((ledger.take_expired(), ledger.is_empty()), (vec![1], true));
    }

    #[test]
    fn what_was_not_sent_again_was_acknowledged() {
        let mut ledger = Ledger::default();
        ledger.commit(1, [entry(1, "a"), entry(2, "b")]);
        ledger.resume();
        assert!(holds(&mut ledger, entry(2, "b")));
        ledger.end_resending();
        assert!(!holds(&mut ledger, entry(1, "a")), "the same payload under the same identifier, much later");
        assert!(ledger.acknowledge(2).is_some());
    }

    /// As RMQTT does it.
    #[test]
    fn what_is_sent_again_late_is_known_by_its_mark() {
        let mut ledger = Ledger::default();
        ledger.commit(1, [entry(1, "a"), entry(2, "b"), entry(3, "c"), entry(4, "d")]);
        ledger.resume();
        ledger.expect_marked();
        assert!(holds_marked(&mut ledger, entry(1, "a")));
        assert!(!holds_marked(&mut ledger, entry(2, "x")), "another message, sent before and never received");
        assert!(!holds(&mut ledger, entry(3, "c")), "the same payload under the same identifier, for the first time");
        ledger.end_resending();
        assert!(!holds_marked(&mut ledger, entry(4, "d")));
        assert!(ledger.acknowledge(1).is_some());
    }

    #[test]
    fn another_message_of_the_same_identifier_is_new() {
        let mut ledger = Ledger::default();
        ledger.commit(1, [entry(1, "a"), entry(2, "b")]);
        assert!(!holds(&mut ledger, entry(2, "b")), "nothing is sent again without a new connection");
        ledger.resume();
        assert!(!holds(&mut ledger, entry(1, "c")));
        assert_eq!(ledger.take_expired(), [1]);
    }

    /// The broker uses an identifier again as soon as it has the acknowledgement, before it answers the PINGREQ.
    #[test]
    fn a_late_confirmation_spares_the_next_message() {
        let mut ledger = Ledger::default();
        ledger.commit(1, [entry(1, "a")]);
        let late = ledger.acknowledge(1).unwrap();
        assert!(!holds(&mut ledger, entry(1, "b")));
        ledger.commit(2, [entry(1, "b")]);
        ledger.confirm(late);
        ledger.resume();
        assert!(holds(&mut ledger, entry(1, "b")));
    }

    #[test]
    fn a_session_that_is_gone_leaves_nothing() {
        let mut ledger = Ledger::default();
        ledger.commit(1, [entry(1, "a")]);
        ledger.clear();
        ledger.resume();
        assert!(!holds(&mut ledger, entry(1, "a")));
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
