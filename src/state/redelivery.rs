//! Messages that are committed and whose acknowledgement the broker may not have processed: a redelivery of them is not stored twice.
//!
//! A reading with a time of arrival gets another time when the broker sends it again, and a dead letter has no key. So the transaction that
//! stores one also stores the packet identifier and a hash of its message (an entry). When a session is resumed, the broker first
//! sends again what is not acknowledged, under the same packet identifiers (MQTT 5.0, 4.4): messages that have an entry are
//! acknowledged and not stored again. The DUP flag is not required at first: Mosquitto 2.1 loses it when it is killed (measured).
//! A broker that processes everything in order has redelivered everything before it answers a PINGREQ that was sent right after the
//! login. A broker that fetches queued messages from another node may answer earlier (RMQTT 0.24, measured): after that answer, only messages
//! with the DUP flag are compared, until the first regular PINGREQ is answered. Entries of messages that were not redelivered by then
//! were acknowledged, and are removed. Otherwise an entry is removed when a PINGREQ behind its acknowledgement is answered.

use std::collections::HashMap;

use sha2::{Digest, Sha256};

/// The identity of a message under a packet identifier.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct RedeliveryEntry {
    /// Its packet identifier.
    pub packet_id: u16,
    /// Of its topic and payload.
    pub hash: u64,
}

/// Length of an encoded entry.
const ENTRY_LENGTH: usize = 10;

impl RedeliveryEntry {
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

    /// The entries in the encoding of the database.
    #[must_use]
    pub fn encode(entries: &[Self]) -> Vec<u8> {
        entries.iter().flat_map(|entry| entry.packet_id.to_be_bytes().into_iter().chain(entry.hash.to_be_bytes())).collect()
    }

    /// The entries from their encoding in the database. An incomplete last entry is ignored.
    pub fn decode(bytes: &[u8]) -> impl Iterator<Item = Self> + '_ {
        bytes.chunks_exact(ENTRY_LENGTH).map(|chunk| Self {
            packet_id: u16::from_be_bytes([chunk[0], chunk[1]]),
            hash: chunk[2..].iter().fold(0, |hash, byte| (hash << 8) | u64::from(*byte)),
        })
    }
}

/// An entry whose acknowledgement is sent, and which the broker may not have processed.
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

/// The redelivery entries of a session.
#[derive(Debug, Default)]
pub struct RedeliveryLog {
    entries: HashMap<u16, Held>,
    /// Whether messages without the DUP flag may be redeliveries.
    resending: bool,
    /// Number of remaining entries of each batch.
    left: HashMap<i64, usize>,
    expired: Vec<i64>,
}

impl RedeliveryLog {
    /// A batch with these entries is committed.
    pub fn commit(&mut self, batch: i64, entries: impl IntoIterator<Item = RedeliveryEntry>) {
        for entry in entries {
            self.forget(entry.packet_id);
            self.entries.insert(entry.packet_id, Held { hash: entry.hash, batch, current: true });
            *self.left.entry(batch).or_default() += 1;
        }
    }

    /// A session is resumed: the broker redelivers what is not acknowledged.
    pub fn resume(&mut self) {
        self.resending = true;
        for held in self.entries.values_mut() {
            held.current = false;
        }
    }

    /// A broker that processes everything in order has redelivered everything: from now on redeliveries have the DUP flag.
    pub fn expect_marked(&mut self) {
        self.resending = false;
    }

    /// Every broker has redelivered everything: messages that were not redelivered are acknowledged.
    pub fn end_resending(&mut self) {
        self.resending = false;
        let acknowledged: Vec<u16> = self.entries.iter().filter(|(_, held)| !held.current).map(|(packet_id, _)| *packet_id).collect();
        for packet_id in acknowledged {
            self.forget(packet_id);
        }
    }

    /// A message has arrived under a packet identifier: whether it is committed already. If not, the broker has reused the
    /// identifier, and the entry of the previous message is removed. `duplicate`: the DUP flag. `hash` is computed only if there is an
    /// entry.
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

    /// The message is being acknowledged. Returns what to pass to [`RedeliveryLog::confirm`] if it has an entry.
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

    /// The broker has lost the session: all packet identifiers are invalid.
    pub fn clear(&mut self) {
        self.entries.clear();
        self.expired.extend(self.left.drain().map(|(batch, _)| batch));
    }

    /// Whether there is no entry.
    #[cfg(test)]
    fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// The batches without remaining entries, which the database can delete.
    pub fn take_expired(&mut self) -> Vec<i64> {
        std::mem::take(&mut self.expired)
    }

    /// Returns batches that could not be deleted.
    pub fn put_back_expired(&mut self, batches: Vec<i64>) {
        self.expired.extend(batches);
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

    fn entry(packet_id: u16, payload: &str) -> RedeliveryEntry {
        RedeliveryEntry::new(packet_id, b"devices/press-1/telemetry", payload.as_bytes())
    }

    fn holds(log: &mut RedeliveryLog, entry: RedeliveryEntry) -> bool {
        log.holds(entry.packet_id, false, || entry.hash)
    }

    fn holds_marked(log: &mut RedeliveryLog, entry: RedeliveryEntry) -> bool {
        log.holds(entry.packet_id, true, || entry.hash)
    }

    #[test]
    fn a_redelivery_is_known_once_a_connection_until_it_is_confirmed() {
        let mut log = RedeliveryLog::default();
        log.commit(1, [entry(1, "a"), entry(2, "b")]);
        for _ in 0..2 {
            log.resume();
            assert!(holds(&mut log, entry(1, "a")));
        }
        let acknowledged = log.acknowledge(1).unwrap();
        log.confirm(acknowledged);
        assert!(!holds(&mut log, entry(1, "a")));
        assert!(log.take_expired().is_empty());
        log.end_resending();
        assert_eq!((log.take_expired(), log.is_empty()), (vec![1], true));
    }

    #[test]
    fn messages_that_are_not_redelivered_were_acknowledged() {
        let mut log = RedeliveryLog::default();
        log.commit(1, [entry(1, "a"), entry(2, "b")]);
        log.resume();
        assert!(holds(&mut log, entry(2, "b")));
        log.end_resending();
        assert!(!holds(&mut log, entry(1, "a")), "the same payload under the same identifier, much later");
        assert!(log.acknowledge(2).is_some());
    }

    /// As RMQTT does it.
    #[test]
    fn a_late_redelivery_is_recognised_by_its_dup_flag() {
        let mut log = RedeliveryLog::default();
        log.commit(1, [entry(1, "a"), entry(2, "b"), entry(3, "c"), entry(4, "d")]);
        log.resume();
        log.expect_marked();
        assert!(holds_marked(&mut log, entry(1, "a")));
        assert!(!holds_marked(&mut log, entry(2, "x")), "another message, sent before and never received");
        assert!(!holds(&mut log, entry(3, "c")), "the same payload under the same identifier, for the first time");
        log.end_resending();
        assert!(!holds_marked(&mut log, entry(4, "d")));
        assert!(log.acknowledge(1).is_some());
    }

    #[test]
    fn another_message_of_the_same_identifier_is_new() {
        let mut log = RedeliveryLog::default();
        log.commit(1, [entry(1, "a"), entry(2, "b")]);
        assert!(!holds(&mut log, entry(2, "b")), "nothing is sent again without a new connection");
        log.resume();
        assert!(!holds(&mut log, entry(1, "c")));
        assert_eq!(log.take_expired(), [1]);
    }

    /// The broker uses an identifier again as soon as it has the acknowledgement, before it answers the PINGREQ.
    #[test]
    fn a_late_confirmation_does_not_affect_the_next_message() {
        let mut log = RedeliveryLog::default();
        log.commit(1, [entry(1, "a")]);
        let late = log.acknowledge(1).unwrap();
        assert!(!holds(&mut log, entry(1, "b")));
        log.commit(2, [entry(1, "b")]);
        log.confirm(late);
        log.resume();
        assert!(holds(&mut log, entry(1, "b")));
    }

    #[test]
    fn a_lost_session_leaves_no_entries() {
        let mut log = RedeliveryLog::default();
        log.commit(1, [entry(1, "a")]);
        log.clear();
        log.resume();
        assert!(!holds(&mut log, entry(1, "a")));
        assert_eq!(log.take_expired(), [1]);
    }

    proptest! {
        #[test]
        fn entries_survive_the_database(ids in prop::collection::vec((any::<u16>(), any::<u64>()), 0..50)) {
            let entries: Vec<RedeliveryEntry> = ids.into_iter().map(|(packet_id, hash)| RedeliveryEntry { packet_id, hash }).collect();
            prop_assert_eq!(RedeliveryEntry::decode(&RedeliveryEntry::encode(&entries)).collect::<Vec<_>>(), entries);
        }
    }
}
