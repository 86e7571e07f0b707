//! The messages of one gateway, in the order of their arrival: what a worker makes of each, and a dry run as well.

use std::sync::Arc;

use super::refusal::{Reason, Refusal};
use super::sparkplug::Memory;
use super::time::Time;
use super::{Decoder, Outcome, Value};
use fleetwright_api::external::MOST_SESSIONS;
use fleetwright_api::topic::TopicPattern;

/// Takes the messages of one gateway apart.
#[derive(Debug)]
pub struct Stream {
    topic: Arc<TopicPattern>,
    decoder: Arc<Decoder>,
    /// The last time of arrival that was given to a reading.
    last_arrival: Time,
    grid: Grid,
    /// What messages have said that others need.
    memory: Memory,
}

/// The times that may be given, in microseconds.
#[derive(Clone, Copy, Debug)]
struct Grid {
    step: i64,
    first: i64,
}

impl Grid {
    const EVERY: Self = Self { step: 1, first: 0 };

    /// The first time that is not before `arrival`, and after `last`.
    fn next(self, last: Time, arrival: Time) -> Time {
        let earliest = arrival.max(last.after(1));
        earliest.after((self.first - earliest.0).rem_euclid(self.step))
    }
}

impl Stream {
    /// A stream of which no message has come yet.
    #[must_use]
    pub fn new(topic: Arc<TopicPattern>, decoder: Arc<Decoder>) -> Self {
        Self { topic, decoder, last_arrival: Time::default(), grid: Grid::EVERY, memory: Memory::default() }
    }

    /// The same, as one of several that share the messages of a gateway: no two of them give the same time of arrival, since that and the
    /// device are all that tells such readings apart.
    #[must_use]
    pub fn sharing(self, number: i32) -> Self {
        Self { grid: Grid { step: MOST_SESSIONS.into(), first: number.into() }, ..self }
    }

    /// The Pipeline's topic.
    #[must_use]
    pub fn topic(&self) -> &TopicPattern {
        &self.topic
    }

    /// As in [`Decoder::takes_arrival_time`].
    #[must_use]
    pub fn takes_arrival_time(&self) -> bool {
        self.decoder.takes_arrival_time()
    }

    /// As in [`Memory::take_gaps`].
    pub fn take_gaps(&mut self) -> u64 {
        self.memory.take_gaps()
    }

    /// As in [`Memory::take_rebirths`].
    pub fn take_rebirths(&mut self) -> Vec<String> {
        self.memory.take_rebirths()
    }

    /// A time of arrival that nothing else has, for a message that came at `arrival`; just that where times stand in the payload.
    /// They are a microsecond apart at the least: they tell the readings of a device apart.
    pub fn arrival(&mut self, arrival: Time) -> Time {
        if !self.decoder.takes_arrival_time() {
            return arrival;
        }
        self.last_arrival = self.grid.next(self.last_arrival, arrival);
        self.last_arrival
    }

    /// Lets a message keep its time of arrival that came before others, as one that is replayed.
    pub fn forget_arrivals(&mut self) {
        self.last_arrival = Time::default();
    }

    /// Takes note of a message. Whether it may hold readings; what else it says is remembered.
    pub fn observe(&mut self, topic: &[u8], payload: &[u8]) -> bool {
        match std::str::from_utf8(topic) {
            Ok(topic) => self.decoder.observe(&mut self.memory, topic, self.topic.depth(), payload),
            Err(_) => true,
        }
    }

    /// The device that a topic names; `tags` is filled with the other captures.
    ///
    /// # Errors
    /// When the topic is not of the Pipeline's form.
    pub fn read_topic<'t>(&self, topic: &'t [u8], tags: &mut Vec<&'t str>) -> Result<&'t str, Refusal> {
        let text =
            std::str::from_utf8(topic).map_err(|error| Refusal::new(Reason::TopicMismatch, &format!("the topic is not UTF-8: {error}")))?;
        self.topic
            .capture(text, tags)
            .filter(|_| !text.contains('\0'))
            .ok_or_else(|| Refusal::new(Reason::TopicMismatch, &format!("expected a topic like {}", self.topic.filter())))
    }

    /// Decodes a message that was observed and whose topic was read. Hands each good reading over: its time, whether that is the
    /// time of arrival, and a value a field.
    pub fn decode(&mut self, topic: &[u8], payload: &[u8], arrival: Time, reading: &mut dyn FnMut(Time, bool, &[Value<'_>])) -> Outcome {
        let (last, grid) = (&mut self.last_arrival, self.grid);
        let next = |last: &mut Time| {
            *last = grid.next(*last, arrival);
            *last
        };
        let topic = std::str::from_utf8(topic).unwrap_or_default();
        let outcome = self.decoder.decode(&self.memory, topic, payload, arrival, &mut |time, values| match time {
            Some(time) => reading(time, false, values),
            None => reading(next(last), true, values),
        });
        match outcome {
            Outcome::Malformed(refusal) if refusal.reason == Reason::UnknownMetric => {
                self.memory.miss_birth(topic);
                Outcome::Malformed(refusal)
            }
            // No key tells such readings again when the message is replayed: all of it is stored then, or nothing ever.
            Outcome::Partial(refusal) if self.decoder.takes_arrival_time() => Outcome::Malformed(refusal),
            outcome => outcome,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn no_two_that_share_give_the_same_time(arrivals in prop::collection::vec((0..MOST_SESSIONS, 0_i64..200), 0..200)) {
            let mut last = [Time::default(); MOST_SESSIONS as usize];
            let mut given = BTreeSet::new();
            for (number, arrival) in arrivals {
                let grid = Grid { step: MOST_SESSIONS.into(), first: number.into() };
                let last = &mut last[usize::try_from(number).unwrap()];
                let next = grid.next(*last, Time(arrival));
                prop_assert!(next > *last && next >= Time(arrival));
                prop_assert!(next.0 - arrival.max(last.0 + 1) < i64::from(MOST_SESSIONS));
                prop_assert!(given.insert(next));
                *last = next;
            }
        }
    }
}
