//! Formats whose messages have single values: the values of one time become one reading.

use std::collections::HashMap;

use super::Raw;
use super::bounds::{MAX_READINGS, MAX_VALUES, too_large};
use super::dead_letter::{DeadLetterCause, Reason};
use super::reading::Message;
use super::time::Time;
use fleetwright_api::pipeline::Decode;

/// The fields by the name of their values.
#[derive(Clone, Debug)]
pub(super) struct Names(HashMap<Box<str>, Vec<usize>>);

impl Names {
    /// The names of a `decode`.
    pub fn compile(decode: &Decode) -> Self {
        let mut names: HashMap<Box<str>, Vec<usize>> = HashMap::new();
        for (slot, field) in decode.fields.iter().enumerate() {
            names.entry(field.metric.as_deref().unwrap_or(&field.name).into()).or_default().push(slot);
        }
        Self(names)
    }

    /// The slots of the fields with this name.
    pub fn slots(&self, name: &str) -> &[usize] {
        self.0.get(name).map_or(&[], Vec::as_slice)
    }
}

/// The readings of a message, by their time.
#[derive(Debug, Default)]
pub(super) struct ReadingsByTime<'de> {
    /// In the order in which their times appear.
    readings: Vec<Reading<'de>>,
    values: usize,
    by_time: HashMap<Option<Time>, usize>,
}

/// The values of one time; `None` is the time of arrival.
#[derive(Debug)]
struct Reading<'de> {
    time: Option<Time>,
    values: Vec<(usize, Raw<'de>)>,
    cause: Option<DeadLetterCause>,
}

impl<'de> ReadingsByTime<'de> {
    fn reading(&mut self, time: Option<Time>) -> Result<&mut Reading<'de>, DeadLetterCause> {
        let index = match self.by_time.get(&time) {
            Some(index) => *index,
            None if self.readings.len() == MAX_READINGS => return Err(too_large(&format!("at most {MAX_READINGS} readings"))),
            None => {
                self.by_time.insert(time, self.readings.len());
                self.readings.push(Reading { time, values: Vec::new(), cause: None });
                self.readings.len() - 1
            }
        };
        Ok(&mut self.readings[index])
    }

    /// Adds a value to the reading of its time.
    ///
    /// # Errors
    /// If the message is beyond a bound.
    pub fn add(&mut self, time: Option<Time>, slots: &[usize], value: &Raw<'de>) -> Result<(), DeadLetterCause> {
        self.values += slots.len();
        if self.values > MAX_VALUES {
            return Err(too_large(&format!("at most {MAX_VALUES} values")));
        }
        self.reading(time)?.values.extend(slots.iter().map(|slot| (*slot, value.clone())));
        Ok(())
    }

    /// Refuses the reading of a time.
    ///
    /// # Errors
    /// If the message is beyond a bound.
    pub fn refuse(&mut self, time: Option<Time>, cause: DeadLetterCause) -> Result<(), DeadLetterCause> {
        self.reading(time)?.cause.get_or_insert(cause);
        Ok(())
    }

    /// Whether no value was added.
    pub fn is_empty(&self) -> bool {
        self.readings.is_empty()
    }

    /// Passes the readings on.
    pub fn finish(self, message: &mut Message<'_, 'de>) {
        let several = self.readings.len() > 1;
        for (index, reading) in self.readings.into_iter().enumerate() {
            let mut cause = reading.cause;
            for (slot, value) in reading.values {
                if message.slots[slot] != Raw::Absent && message.slots[slot] != value {
                    cause = Some(message.decoder.rules[slot].refuse(Reason::Conflict, "one value at a time", "two"));
                }
                message.slots[slot] = value;
            }
            let arrival = message.arrival;
            let checked = reading.time.map(|time| message.decoder.timing.check_known(time, arrival)).transpose();
            message.finish_at(cause.map_or(checked, Err), several.then_some(index));
        }
    }
}
