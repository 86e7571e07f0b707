//! Decodes the messages of one gateway in the order of their arrival, for a worker and for a dry run.

use std::sync::Arc;

use super::bounds::{MAX_CAPTURE_BYTES, MAX_DEVICE_BYTES};
use super::dead_letter::{DeadLetterCause, Reason};
use super::sparkplug::SparkplugState;
use super::time::Time;
use super::{Decoder, Outcome, Parsed, Value};
use fleetwright_api::external::MAX_SESSIONS;
use fleetwright_api::topic::TopicPattern;

/// A valid reading: its values are typed and checked.
#[derive(Clone, Copy, Debug)]
pub struct Reading<'r, 'v> {
    /// Its time.
    pub time: Time,
    /// Whether that is the time of arrival.
    pub is_arrival_time: bool,
    /// A value for each field, in the order of the fields. Texts may borrow from the payload.
    pub values: &'r [Value<'v>],
}

/// Receives the readings of a message, one after the other, as soon as their values are known. The encoder of rows is called here,
/// and other consumers of typed values can be. If the message turns out to be malformed, what was passed on must be discarded.
pub type ReadingObserver<'a> = dyn FnMut(&Reading<'_, '_>) + 'a;

/// Decodes the messages of one gateway.
#[derive(Debug)]
pub struct Stream {
    topic: Arc<TopicPattern>,
    decoder: Arc<Decoder>,
    /// The last time of arrival that was assigned to a reading.
    last_arrival: Time,
    grid: Grid,
    /// The state between messages of Sparkplug B.
    sparkplug: SparkplugState,
}

/// The times that may be assigned, in microseconds.
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
    /// A stream before its first message.
    #[must_use]
    pub fn new(topic: Arc<TopicPattern>, decoder: Arc<Decoder>) -> Self {
        Self { topic, decoder, last_arrival: Time::default(), grid: Grid::EVERY, sparkplug: SparkplugState::default() }
    }

    /// The same, as one of several that share the messages of a gateway: no two of them assign the same time of arrival, because such
    /// readings are distinguished by time and device only.
    #[must_use]
    pub fn sharing(self, number: i32) -> Self {
        Self { grid: Grid { step: MAX_SESSIONS.into(), first: number.into() }, ..self }
    }

    /// The same, as one of several sessions of a process: the memory of births is divided among them.
    #[must_use]
    pub fn with_birth_bytes(self, bytes: usize) -> Self {
        Self { sparkplug: SparkplugState::with_limit(bytes), ..self }
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

    /// As in [`SparkplugState::take_gaps`].
    pub fn take_gaps(&mut self) -> u64 {
        self.sparkplug.take_gaps()
    }

    /// As in [`SparkplugState::take_rebirths`].
    pub fn take_rebirths(&mut self) -> Vec<String> {
        self.sparkplug.take_rebirths()
    }

    /// A unique time of arrival for a message that arrived at `arrival`; just that if times are in the payload. Unique times differ by at
    /// least a microsecond: they distinguish the readings of a device.
    pub fn arrival(&mut self, arrival: Time) -> Time {
        if !self.decoder.takes_arrival_time() {
            return arrival;
        }
        self.last_arrival = self.grid.next(self.last_arrival, arrival);
        self.last_arrival
    }

    /// Lets the next message keep its time of arrival although it is earlier than the last one, as in a replay.
    pub fn forget_arrivals(&mut self) {
        self.last_arrival = Time::default();
    }

    /// Observes a message, as in [`Decoder::observe`]. `None` if it has no readings.
    pub fn observe(&mut self, topic: &[u8], payload: &[u8]) -> Option<Parsed> {
        match std::str::from_utf8(topic) {
            Ok(topic) => self.decoder.observe(&mut self.sparkplug, topic, self.topic.depth(), payload),
            Err(_) => Some(Parsed::default()),
        }
    }

    /// The device that a topic names; `tags` is filled with the other captures.
    ///
    /// # Errors
    /// When the topic does not match that of the Pipeline, or a capture is too long.
    pub fn read_topic<'t>(&self, topic: &'t [u8], tags: &mut Vec<&'t str>) -> Result<&'t str, DeadLetterCause> {
        let text = std::str::from_utf8(topic)
            .map_err(|error| DeadLetterCause::new(Reason::TopicMismatch, &format!("the topic is not UTF-8: {error}")))?;
        let device = self
            .topic
            .capture(text, tags)
            .filter(|_| !text.contains('\0'))
            .ok_or_else(|| DeadLetterCause::new(Reason::TopicMismatch, &format!("expected a topic like {}", self.topic.filter())))?;
        if device.len() > MAX_DEVICE_BYTES {
            let detail = format!("no Device has a name of more than {MAX_DEVICE_BYTES} bytes, found {} bytes", device.len());
            return Err(DeadLetterCause::new(Reason::UnknownDevice, &detail));
        }
        match self.topic.tags().iter().zip(&*tags).find(|(_, capture)| capture.len() > MAX_CAPTURE_BYTES) {
            None => Ok(device),
            Some((tag, capture)) => {
                let detail = format!("{{{tag}}} of the topic: expected at most {MAX_CAPTURE_BYTES} bytes, found {}", capture.len());
                Err(DeadLetterCause::new(Reason::TooLarge, &detail))
            }
        }
    }

    /// Decodes a message that was observed and whose topic was read, and passes each valid reading to `observer`. `parsed` is what
    /// [`Self::observe`] returned; the default parses the payload again.
    pub fn decode(&mut self, topic: &[u8], payload: &[u8], parsed: Parsed, arrival: Time, observer: &mut ReadingObserver<'_>) -> Outcome {
        let (last, grid) = (&mut self.last_arrival, self.grid);
        let next = |last: &mut Time| {
            *last = grid.next(*last, arrival);
            *last
        };
        let topic = std::str::from_utf8(topic).unwrap_or_default();
        // At most: captures are parts of the topic.
        let captures = if self.topic.tags().is_empty() { 0 } else { topic.len() + 4 * self.topic.tags().len() };
        let outcome = self.decoder.decode(&self.sparkplug, topic, payload, parsed, arrival, captures, &mut |time, values| match time {
            Some(time) => observer(&Reading { time, is_arrival_time: false, values }),
            None => observer(&Reading { time: next(last), is_arrival_time: true, values }),
        });
        match outcome {
            Outcome::Malformed(cause) if cause.reason == Reason::UnknownMetric => {
                self.sparkplug.request_rebirth(topic);
                Outcome::Malformed(cause)
            }
            // Such readings have no key that a replay of the message could find: the message is stored as a whole, or not at all.
            Outcome::Partial(cause) if self.decoder.takes_arrival_time() => Outcome::Malformed(cause),
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
        fn no_two_that_share_give_the_same_time(arrivals in prop::collection::vec((0..MAX_SESSIONS, 0_i64..200), 0..200)) {
            let mut last = [Time::default(); MAX_SESSIONS as usize];
            let mut given = BTreeSet::new();
            for (number, arrival) in arrivals {
                let grid = Grid { step: MAX_SESSIONS.into(), first: number.into() };
                let last = &mut last[usize::try_from(number).unwrap()];
                let next = grid.next(*last, Time(arrival));
                prop_assert!(next > *last && next >= Time(arrival));
                prop_assert!(next.0 - arrival.max(last.0 + 1) < i64::from(MAX_SESSIONS));
                prop_assert!(given.insert(next));
                *last = next;
            }
        }
    }
}
