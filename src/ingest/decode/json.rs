//! JSON: an object, which is one reading, or an array of objects.
//!
//! One pass over the payload. Where a key stands twice in an object, the last one counts, as nearly everywhere.

use std::borrow::Cow;
use std::fmt;

use serde::de::{DeserializeSeed, Deserializer, Error, IgnoredAny, MapAccess, SeqAccess, Visitor};

use super::check::check_time;
use super::pointer::Node;
use super::time::Time;
use super::{Decoder, Outcome, Raw, Value};
use crate::ingest::dead_letter::{Reason, Refusal};

/// How many refused elements of an array the dead letter names; of the others it gives the number.
const NAMED: usize = 3;

pub(super) fn decode(decoder: &Decoder, payload: &[u8], arrival: Time, reading: impl FnMut(Option<Time>, &[Value<'_>])) -> Outcome {
    let mut message = Message {
        decoder,
        arrival,
        slots: vec![Raw::Absent; decoder.rules.len() + 1],
        values: Vec::with_capacity(decoder.rules.len()),
        refused: 0,
        refusal: None,
        reading,
    };
    let mut deserializer = serde_json::Deserializer::from_slice(payload);
    let parsed = Root(&mut message).deserialize(&mut deserializer).and_then(|()| deserializer.end());
    match (parsed, message.refusal) {
        (Err(error), _) => Outcome::Malformed(Refusal::new(Reason::Malformed, &error.to_string())),
        (Ok(()), None) => Outcome::Complete,
        (Ok(()), Some(refusal)) if message.refused > NAMED => {
            Outcome::Partial(Refusal::new(refusal.reason, &format!("{} readings refused: {}; …", message.refused, refusal.detail)))
        }
        (Ok(()), Some(refusal)) => Outcome::Partial(refusal),
    }
}

/// The state of one message.
struct Message<'a, 'de, F> {
    decoder: &'a Decoder,
    arrival: Time,
    /// What stands where a field points to; the last slot is the time's.
    slots: Vec<Raw<'de>>,
    values: Vec<Value<'de>>,
    refused: usize,
    refusal: Option<Refusal>,
    reading: F,
}

impl<F: FnMut(Option<Time>, &[Value<'_>])> Message<'_, '_, F> {
    /// Checks what the slots hold and hands the reading over; leaves every slot absent.
    fn finish(&mut self, index: Option<usize>) {
        match self.check() {
            Ok(time) => (self.reading)(time, &self.values),
            Err(refusal) => self.refuse(index, &refusal),
        }
        self.values.clear();
    }

    fn check(&mut self) -> Result<Option<Time>, Refusal> {
        let checked = match (self.decoder.time, self.slots.last_mut()) {
            (Some(unit), Some(raw)) => check_time(raw, unit, self.arrival).map(Some),
            _ => Ok(None),
        };
        let mut first = None;
        for (rule, raw) in self.decoder.rules.iter().zip(&mut self.slots) {
            match rule.check(raw) {
                Ok(value) => self.values.push(value),
                Err(refusal) => first = first.or(Some(refusal)),
            }
        }
        let time = checked?;
        first.map_or(Ok(time), Err)
    }

    fn refuse(&mut self, index: Option<usize>, refusal: &Refusal) {
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
}

/// The payload: an object or an array.
struct Root<'m, 'a, 'de, F>(&'m mut Message<'a, 'de, F>);

impl<'de, F: FnMut(Option<Time>, &[Value<'_>])> DeserializeSeed<'de> for Root<'_, '_, 'de, F> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de, F: FnMut(Option<Time>, &[Value<'_>])> Visitor<'de> for Root<'_, '_, 'de, F> {
    type Value = ();

    fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("an object, or an array of objects")
    }

    fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<(), A::Error> {
        Place { node: &self.0.decoder.root, slots: &mut self.0.slots }.visit_map(map)?;
        self.0.finish(None);
        Ok(())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut sequence: A) -> Result<(), A::Error> {
        let mut index = 0;
        while sequence.next_element_seed(Element { message: &mut *self.0, index })?.is_some() {
            index += 1;
        }
        Ok(())
    }
}

/// One element of the array.
struct Element<'m, 'a, 'de, F> {
    message: &'m mut Message<'a, 'de, F>,
    index: usize,
}

impl<F: FnMut(Option<Time>, &[Value<'_>])> Element<'_, '_, '_, F> {
    fn refuse(self, found: &str) {
        self.message.refuse(Some(self.index), &Refusal::new(Reason::WrongType, &format!("expected an object, found {found}")));
    }
}

impl<'de, F: FnMut(Option<Time>, &[Value<'_>])> DeserializeSeed<'de> for Element<'_, '_, 'de, F> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de, F: FnMut(Option<Time>, &[Value<'_>])> Visitor<'de> for Element<'_, '_, 'de, F> {
    type Value = ();

    fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("an object")
    }

    fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<(), A::Error> {
        Place { node: &self.message.decoder.root, slots: &mut self.message.slots }.visit_map(map)?;
        self.message.finish(Some(self.index));
        Ok(())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut sequence: A) -> Result<(), A::Error> {
        while sequence.next_element::<IgnoredAny>()?.is_some() {}
        self.refuse("an array");
        Ok(())
    }

    fn visit_bool<E: Error>(self, _: bool) -> Result<(), E> {
        self.refuse("a truth value");
        Ok(())
    }

    fn visit_i64<E: Error>(self, _: i64) -> Result<(), E> {
        self.refuse("a number");
        Ok(())
    }

    fn visit_u64<E: Error>(self, _: u64) -> Result<(), E> {
        self.refuse("a number");
        Ok(())
    }

    fn visit_f64<E: Error>(self, _: f64) -> Result<(), E> {
        self.refuse("a number");
        Ok(())
    }

    fn visit_str<E: Error>(self, _: &str) -> Result<(), E> {
        self.refuse("a text");
        Ok(())
    }

    fn visit_unit<E: Error>(self) -> Result<(), E> {
        self.refuse("null");
        Ok(())
    }
}

/// A place in a reading that a field points to, or below which one does.
struct Place<'m, 'n, 'de> {
    node: &'n Node,
    slots: &'m mut [Raw<'de>],
}

impl<'de> Place<'_, '_, 'de> {
    fn fill(self, raw: Raw<'de>) {
        if let [slot] = self.node.slots[..] {
            self.slots[slot] = raw;
        } else {
            for slot in &self.node.slots {
                self.slots[*slot] = raw.clone();
            }
        }
    }
}

impl<'de> DeserializeSeed<'de> for Place<'_, '_, 'de> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Place<'_, '_, 'de> {
    type Value = ();

    fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("a JSON value")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        if self.node.is_leaf() {
            while map.next_entry::<IgnoredAny, IgnoredAny>()?.is_some() {}
            self.fill(Raw::Object);
            return Ok(());
        }
        while let Some(child) = map.next_key_seed(Key(self.node))? {
            match child {
                Some(node) => map.next_value_seed(Place { node, slots: &mut *self.slots })?,
                None => map.next_value::<IgnoredAny>().map(drop)?,
            }
        }
        self.fill(Raw::Object);
        Ok(())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut sequence: A) -> Result<(), A::Error> {
        let mut index = 0_usize;
        loop {
            let child = if self.node.is_leaf() { None } else { self.node.child(&index.to_string()) };
            let more = match child {
                Some(node) => sequence.next_element_seed(Place { node, slots: &mut *self.slots })?.is_some(),
                None => sequence.next_element::<IgnoredAny>()?.is_some(),
            };
            if !more {
                self.fill(Raw::Array);
                return Ok(());
            }
            index += 1;
        }
    }

    fn visit_bool<E: Error>(self, truth: bool) -> Result<(), E> {
        self.fill(Raw::Boolean(truth));
        Ok(())
    }

    fn visit_i64<E: Error>(self, number: i64) -> Result<(), E> {
        self.fill(Raw::Integer(number.into()));
        Ok(())
    }

    fn visit_u64<E: Error>(self, number: u64) -> Result<(), E> {
        self.fill(Raw::Integer(number.into()));
        Ok(())
    }

    fn visit_f64<E: Error>(self, number: f64) -> Result<(), E> {
        self.fill(Raw::Float(number));
        Ok(())
    }

    fn visit_borrowed_str<E: Error>(self, text: &'de str) -> Result<(), E> {
        self.fill(Raw::Text(Cow::Borrowed(text)));
        Ok(())
    }

    fn visit_str<E: Error>(self, text: &str) -> Result<(), E> {
        self.fill(Raw::Text(Cow::Owned(text.to_owned())));
        Ok(())
    }

    fn visit_unit<E: Error>(self) -> Result<(), E> {
        self.fill(Raw::Null);
        Ok(())
    }
}

/// A key: the place under it, if one matters.
struct Key<'n>(&'n Node);

impl<'de, 'n> DeserializeSeed<'de> for Key<'n> {
    type Value = Option<&'n Node>;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Self::Value, D::Error> {
        deserializer.deserialize_str(self)
    }
}

impl<'n> Visitor<'_> for Key<'n> {
    type Value = Option<&'n Node>;

    fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("a key")
    }

    fn visit_str<E: Error>(self, key: &str) -> Result<Self::Value, E> {
        Ok(self.0.child(key))
    }
}
