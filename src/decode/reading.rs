//! The readings of one message: checked, and handed over or refused.

use super::refusal::Refusal;
use super::time::Time;
use super::{Decoder, Outcome, Raw, Value};

/// How many refused readings of a message the dead letter names; of the others it gives the number.
const NAMED: usize = 3;

/// Takes a good reading: its time, if the payload gives one, and a value a field, in the order of the fields.
pub type Take<'a> = dyn FnMut(Option<Time>, &[Value<'_>]) + 'a;

/// The state of one message.
pub(super) struct Message<'a, 'de> {
    pub decoder: &'a Decoder,
    pub arrival: Time,
    /// What stands where a field points to; the last slot is the time's.
    pub slots: Vec<Raw<'de>>,
    values: Vec<Value<'de>>,
    refused: usize,
    refusal: Option<Refusal>,
    take: &'a mut Take<'a>,
}

impl<'a> Message<'a, '_> {
    /// A message of which nothing was read yet.
    pub fn new(decoder: &'a Decoder, arrival: Time, take: &'a mut Take<'a>) -> Self {
        Self {
            decoder,
            arrival,
            slots: vec![Raw::Absent; decoder.rules.len() + 1],
            values: Vec::with_capacity(decoder.rules.len()),
            refused: 0,
            refusal: None,
            take,
        }
    }

    /// Checks what the slots hold, the time's among them, and hands the reading over; leaves every slot absent. `index` is the
    /// reading's number where a message may have several.
    pub fn finish(&mut self, index: Option<usize>) {
        let timing = &self.decoder.timing;
        let time = match self.slots.last_mut() {
            Some(raw) if timing.is_in_payload => timing.check(raw, self.arrival).map(Some),
            _ => Ok(None),
        };
        self.finish_at(time, index);
    }

    /// The same for a reading whose time is known.
    pub fn finish_at(&mut self, time: Result<Option<Time>, Refusal>, index: Option<usize>) {
        let mut first = None;
        for (rule, raw) in self.decoder.rules.iter().zip(&mut self.slots) {
            match rule.check(raw) {
                Ok(value) => self.values.push(value),
                Err(refusal) => first = first.or(Some(refusal)),
            }
        }
        match time.and_then(|time| first.map_or(Ok(time), Err)) {
            Ok(time) => (self.take)(time, &self.values),
            Err(refusal) => self.refuse(index, &refusal),
        }
        self.values.clear();
    }

    /// Refuses a reading.
    pub fn refuse(&mut self, index: Option<usize>, refusal: &Refusal) {
        self.refused += 1;
        if self.refused > NAMED {
            return;
        }
        let named =
            index.map_or_else(|| refusal.clone(), |index| Refusal::new(refusal.reason, &format!("reading {index}: {}", refusal.detail)));
        match &mut self.refusal {
            Some(first) => first.join(&named),
            none => *none = Some(named),
        }
    }

    /// What became of the message, which was read to its end or not.
    pub fn outcome(self, read: Result<(), Refusal>) -> Outcome {
        match (read, self.refusal) {
            (Err(refusal), _) => Outcome::Malformed(refusal),
            (Ok(()), None) => Outcome::Complete,
            (Ok(()), Some(refusal)) if self.refused > NAMED => {
                Outcome::Partial(Refusal::new(refusal.reason, &format!("{} readings refused: {}; …", self.refused, refusal.detail)))
            }
            (Ok(()), Some(refusal)) => Outcome::Partial(refusal),
        }
    }
}
