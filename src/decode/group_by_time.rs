//! Formats whose messages have single values: the values of one time become one reading.

use std::collections::HashMap;

use super::Raw;
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
    fn reading(&mut self, time: Option<Time>) -> &mut Reading<'de> {
        let index = *self.by_time.entry(time).or_insert_with(|| {
            self.readings.push(Reading { time, values: Vec::new(), cause: None });
            self.readings.len() - 1
        });
        &mut self.readings[index]
    }

    /// Adds a value to the reading of its time.
    pub fn add(&mut self, time: Option<Time>, slots: &[usize], value: &Raw<'de>) {
        self.reading(time).values.extend(slots.iter().map(|slot| (*slot, value.clone())));
    }

    /// Refuses the reading of a time.
    pub fn refuse(&mut self, time: Option<Time>, cause: DeadLetterCause) {
        self.reading(time).cause.get_or_insert(cause);
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
