//! Models of a broker and a database, as a session observes them.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use proptest::prelude::*;

use crate::decode::time::Time;
use crate::sink::job::Job;
use crate::sink::written::Written;
use crate::state::redelivery::RedeliveryEntry;

/// A published message, identified by its index.
#[derive(Clone, Debug)]
pub struct Published {
    pub topic: String,
    pub payload: String,
    pub is_row: bool,
}

#[derive(Debug)]
pub enum Down {
    Publish { packet_id: u16, duplicate: bool, message: usize },
    Pong,
}

#[derive(Debug)]
pub enum Up {
    Acknowledgement(u16),
    Ping,
}

/// The broker and the connection to it. It assigns the lowest free packet identifier, so that identifiers are reused soon.
#[derive(Default)]
pub struct Broker {
    pub queue: VecDeque<usize>,
    /// Sent and not acknowledged, in order.
    pub in_flight: Vec<(u16, usize)>,
    /// Packet identifiers in the order in which they were sent on this connection.
    sent: VecDeque<u16>,
    pub down: VecDeque<Down>,
    pub up: VecDeque<Up>,
    /// Whether it answers the first PINGREQ of a connection before it sends unacknowledged messages again, with DUP.
    resends_late: bool,
    /// The messages to send again on this connection.
    again: VecDeque<(u16, usize)>,
}

impl Broker {
    pub fn new(resends_late: bool) -> Self {
        Self { resends_late, ..Self::default() }
    }

    pub fn send(&mut self) {
        if let Some((packet_id, message)) = self.again.pop_front() {
            self.put(packet_id, true, message);
            return;
        }
        let Some(message) = self.queue.pop_front() else { return };
        let packet_id = (1..=u16::MAX).find(|id| self.in_flight.iter().all(|(used, _)| used != id)).unwrap();
        self.in_flight.push((packet_id, message));
        self.put(packet_id, false, message);
    }

    fn put(&mut self, packet_id: u16, duplicate: bool, message: usize) {
        self.sent.push_back(packet_id);
        self.down.push_back(Down::Publish { packet_id, duplicate, message });
    }

    /// Whether no packet is queued or in flight.
    pub fn is_idle(&self) -> bool {
        self.queue.is_empty() && self.in_flight.is_empty() && self.up.is_empty() && self.down.is_empty()
    }

    pub fn receive(&mut self, database: &Database) -> Result<(), TestCaseError> {
        match self.up.pop_front() {
            Some(Up::Ping) => self.down.push_back(Down::Pong),
            Some(Up::Acknowledgement(packet_id)) => {
                prop_assert_eq!(self.sent.pop_front(), Some(packet_id), "acknowledged in the order of arrival, on this connection");
                let index = self.in_flight.iter().position(|(id, _)| *id == packet_id).unwrap();
                let (_, message) = self.in_flight.remove(index);
                prop_assert!(database.holds(message), "{} was acknowledged before its commit", message);
            }
            None => {}
        }
        Ok(())
    }

    /// A connection begins. Unacknowledged messages are sent again if the session is present; otherwise all messages are lost.
    pub fn connect(&mut self, present: bool) -> Vec<usize> {
        (self.down, self.up, self.sent, self.again) = Default::default();
        let mut forgotten = Vec::new();
        if present && self.resends_late {
            self.again.extend(self.in_flight.iter().copied());
        } else if present {
            for (packet_id, message) in self.in_flight.clone() {
                self.put(packet_id, false, message);
            }
        } else {
            forgotten.extend(self.in_flight.drain(..).map(|(_, message)| message));
            forgotten.extend(self.queue.drain(..));
        }
        self.up.push_back(Up::Ping);
        forgotten
    }
}

/// The tables.
#[derive(Default)]
pub struct Database {
    pub generation: i64,
    /// Keys. The message number takes the place of the device.
    rows: BTreeSet<(usize, Time)>,
    pub letters: Vec<usize>,
    pub acknowledgements: BTreeMap<i64, Vec<RedeliveryEntry>>,
}

impl Database {
    pub fn holds(&self, message: usize) -> bool {
        self.count(message) > 0
    }

    pub fn count(&self, message: usize) -> usize {
        let rows = self.rows.range((message, Time(i64::MIN))..=(message, Time(i64::MAX))).count();
        rows + self.letters.iter().filter(|letter| **letter == message).count()
    }

    /// As `sink::transaction` does it. `None` if another process has claimed the session.
    pub fn write(&mut self, job: &Job) -> Option<Written> {
        let mut written = Written { dead_letters: job.batch.dead_letters.clone(), entries: job.entries.clone(), ..Written::default() };
        if self.acknowledgements.contains_key(&job.number) && job.session.generation == self.generation {
            return Some(written);
        }
        if !job.entries.is_empty() && job.session.generation != self.generation {
            return None;
        }
        for row in 0..job.batch.rows.len() {
            let message = number(job, job.batch.rows.message(row).unwrap());
            let (time, _) = job.batch.rows.span(row..row + 1).unwrap();
            if self.rows.insert((message, time)) {
                written.rows += 1;
            } else {
                written.redelivered += 1;
            }
        }
        self.letters.extend(job.batch.dead_letters.keys().map(|letter| number(job, *letter)));
        self.acknowledgements.retain(|batch, _| !job.expired.contains(batch));
        if !job.entries.is_empty() {
            self.acknowledgements.insert(job.number, job.entries.clone());
        }
        Some(written)
    }
}

/// The number of a message, read from its payload.
fn number(job: &Job, message: u32) -> usize {
    let payload = std::str::from_utf8(job.batch.message(message).unwrap().payload).unwrap();
    payload.chars().filter(char::is_ascii_digit).collect::<String>().parse::<usize>().unwrap() % 1_000_000
}
