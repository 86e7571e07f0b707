//! The readings of one message: checked, and passed on or refused.

use super::bounds::Budget;
use super::dead_letter::DeadLetterCause;
use super::time::Time;
use super::{Decoder, Outcome, Raw, Value};

/// How many refused readings of a message its dead letter describes; the others are counted.
const MAX_DESCRIBED: usize = 3;

/// Receives a valid reading: its time, if the payload has one, and a value for each field, in the order of the fields.
pub type OnReading<'a> = dyn FnMut(Option<Time>, &[Value<'_>]) + 'a;

/// The state of one message.
pub(super) struct Message<'a, 'de> {
    pub decoder: &'a Decoder,
    pub arrival: Time,
    /// The value of each field; the last slot is that of the time.
    pub slots: Vec<Raw<'de>>,
    values: Vec<Value<'de>>,
    refused: usize,
    cause: Option<DeadLetterCause>,
    budget: Budget,
    /// The bound that the message is beyond: the whole message is refused.
    exceeded: Option<DeadLetterCause>,
    on_reading: &'a mut OnReading<'a>,
}

impl<'a> Message<'a, '_> {
    /// A message before its first reading.
    pub fn new(decoder: &'a Decoder, arrival: Time, capture_bytes: usize, on_reading: &'a mut OnReading<'a>) -> Self {
        Self {
            decoder,
            arrival,
            slots: vec![Raw::Absent; decoder.rules.len() + 1],
            values: Vec::with_capacity(decoder.rules.len()),
            refused: 0,
            cause: None,
            budget: Budget::new(decoder.rules.len(), capture_bytes),
            exceeded: None,
            on_reading,
        }
    }

    /// Checks the values of the slots, including the time, and passes the reading on. Leaves every slot absent. `index` is the
    /// number of the reading where a message may have several.
    pub fn finish(&mut self, index: Option<usize>) {
        let timing = &self.decoder.timing;
        let time = match self.slots.last_mut() {
            Some(raw) if timing.is_in_payload => timing.check(raw, self.arrival).map(Some),
            _ => Ok(None),
        };
        self.finish_at(time, index);
    }

    /// The same for a reading whose time is known.
    pub fn finish_at(&mut self, time: Result<Option<Time>, DeadLetterCause>, index: Option<usize>) {
        let mut first = None;
        for (rule, raw) in self.decoder.rules.iter().zip(&mut self.slots) {
            match rule.check(raw) {
                Ok(value) => self.values.push(value),
                Err(cause) => first = first.or(Some(cause)),
            }
        }
        match time.and_then(|time| first.map_or(Ok(time), Err)) {
            Ok(time) => match self.budget.take(&self.values) {
                Ok(()) => (self.on_reading)(time, &self.values),
                Err(cause) => self.exceed(cause),
            },
            Err(cause) => self.refuse(index, &cause),
        }
        self.values.clear();
    }

    /// Refuses a reading.
    pub fn refuse(&mut self, index: Option<usize>, cause: &DeadLetterCause) {
        if let Err(cause) = self.budget.take_refused() {
            self.exceed(cause);
        }
        self.refused += 1;
        if self.refused > MAX_DESCRIBED {
            return;
        }
        let named =
            index.map_or_else(|| cause.clone(), |index| DeadLetterCause::new(cause.reason, &format!("reading {index}: {}", cause.detail)));
        match &mut self.cause {
            Some(first) => first.join(&named),
            none => *none = Some(named),
        }
    }

    /// The message is beyond a bound. No further reading is passed on.
    pub fn exceed(&mut self, cause: DeadLetterCause) {
        self.exceeded.get_or_insert(cause);
    }

    /// Whether the message is beyond a bound: the rest of it need not be read.
    pub fn is_exceeded(&self) -> bool {
        self.exceeded.is_some()
    }

    /// The result for the message; `read` says whether it was read to its end.
    pub fn outcome(self, read: Result<(), DeadLetterCause>) -> Outcome {
        if let Some(exceeded) = self.exceeded {
            return Outcome::Malformed(exceeded);
        }
        match (read, self.cause) {
            (Err(cause), _) => Outcome::Malformed(cause),
            (Ok(()), None) => Outcome::Complete,
            (Ok(()), Some(cause)) if self.refused > MAX_DESCRIBED => {
                Outcome::Partial(DeadLetterCause::new(cause.reason, &format!("{} readings refused: {}; …", self.refused, cause.detail)))
            }
            (Ok(()), Some(cause)) => Outcome::Partial(cause),
        }
    }
}
