//! Documents in JSON or CBOR: an object, which is one reading, or an array of objects, at the top of the message or below a pointer.
//!
//! One pass over the payload. Of repeated keys of an object the last one counts, as in most parsers.

use std::borrow::Cow;
use std::fmt;

use serde::de::{DeserializeSeed, Deserializer, Error, IgnoredAny, MapAccess, SeqAccess, Visitor};

use super::bounds::read_json;
use super::dead_letter::{DeadLetterCause, Reason};
use super::pointer::Node;
use super::reading::Message;
use super::{Document, Raw, from_cbor, from_json};

/// Reads a message in JSON.
pub(super) fn json<'de>(message: &mut Message<'_, 'de>, document: &Document, payload: &'de [u8]) -> Result<(), DeadLetterCause> {
    let found = from_json(payload, Root::new(message, document))?;
    check_found(found, document)
}

/// Reads a message in CBOR.
pub(super) fn cbor<'de>(message: &mut Message<'_, 'de>, document: &Document, payload: &'de [u8]) -> Result<(), DeadLetterCause> {
    let found = from_cbor(payload, Root::new(message, document))?;
    check_found(found, document)
}

fn check_found(found: bool, document: &Document) -> Result<(), DeadLetterCause> {
    if found {
        return Ok(());
    }
    Err(DeadLetterCause::new(Reason::MissingField, &format!("expected an array at /{}, found none", document.readings.join("/"))))
}

/// The position of the readings, an object or an array, or a position above it. The value is whether the readings exist.
struct Root<'m, 'a, 'de> {
    message: &'m mut Message<'a, 'de>,
    node: &'m Node,
    above: &'m [String],
}

impl<'m, 'a, 'de> Root<'m, 'a, 'de> {
    fn new(message: &'m mut Message<'a, 'de>, document: &'m Document) -> Self {
        Self { message, node: &document.root, above: &document.readings }
    }
}

impl<'de> DeserializeSeed<'de> for Root<'_, '_, 'de> {
    type Value = bool;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<bool, D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Root<'_, '_, 'de> {
    type Value = bool;

    fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(if self.above.is_empty() { "an object, or an array of objects" } else { "an object with the readings" })
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<bool, A::Error> {
        let Some((key, below)) = self.above.split_first() else {
            Place { node: self.node, slots: &mut self.message.slots }.visit_map(map)?;
            self.message.finish(None);
            return Ok(true);
        };
        let mut found = false;
        while let Some(here) = map.next_key_seed(IsKey(key))? {
            if here {
                found |= map.next_value_seed(Root { message: &mut *self.message, node: self.node, above: below })?;
            } else {
                map.next_value::<IgnoredAny>()?;
            }
        }
        Ok(found)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut sequence: A) -> Result<bool, A::Error> {
        if !self.above.is_empty() {
            return Err(A::Error::custom("expected an object with the readings, found an array"));
        }
        let mut index = 0;
        while sequence.next_element_seed(Element { message: &mut *self.message, root: self.node, index })?.is_some() {
            index += 1;
            if self.message.is_exceeded() {
                return Err(A::Error::custom("the message is beyond a bound"));
            }
        }
        Ok(true)
    }
}

/// One element of the array.
struct Element<'m, 'a, 'de> {
    message: &'m mut Message<'a, 'de>,
    root: &'m Node,
    index: usize,
}

impl Element<'_, '_, '_> {
    fn refuse(self, found: &str) {
        self.message.refuse(Some(self.index), &DeadLetterCause::new(Reason::WrongType, &format!("expected an object, found {found}")));
    }
}

impl<'de> DeserializeSeed<'de> for Element<'_, '_, 'de> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Element<'_, '_, 'de> {
    type Value = ();

    fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("an object")
    }

    fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<(), A::Error> {
        Place { node: self.root, slots: &mut self.message.slots }.visit_map(map)?;
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

    fn visit_i128<E: Error>(self, _: i128) -> Result<(), E> {
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

    fn visit_bytes<E: Error>(self, _: &[u8]) -> Result<(), E> {
        self.refuse("bytes");
        Ok(())
    }

    fn visit_unit<E: Error>(self) -> Result<(), E> {
        self.refuse("null");
        Ok(())
    }
}

/// A position in a reading to which, or below which, a field points.
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
        if self.node.is_json {
            let value = read_json(deserializer)?;
            fill_whole(self.node, &value, self.slots);
            return Ok(());
        }
        deserializer.deserialize_any(self)
    }
}

/// Fills the slots at and below a position that a field takes as JSON.
fn fill_whole(node: &Node, value: &serde_json::Value, slots: &mut [Raw<'_>]) {
    for slot in &node.slots {
        slots[*slot] = Raw::of_json(value, node.is_json);
    }
    for (key, child) in node.children() {
        let below = match value {
            serde_json::Value::Object(members) => members.get(key),
            serde_json::Value::Array(elements) => key.parse::<usize>().ok().and_then(|index| elements.get(index)),
            _ => None,
        };
        if let Some(below) = below {
            fill_whole(child, below, slots);
        }
    }
}

impl<'de> Visitor<'de> for Place<'_, '_, 'de> {
    type Value = ();

    fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("a value")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        if self.node.is_leaf() {
            while map.next_entry::<IgnoredAny, IgnoredAny>()?.is_some() {}
            self.fill(Raw::Other("an object"));
            return Ok(());
        }
        while let Some(child) = map.next_key_seed(Key(self.node))? {
            match child {
                Some(node) => map.next_value_seed(Place { node, slots: &mut *self.slots })?,
                None => map.next_value::<IgnoredAny>().map(drop)?,
            }
        }
        self.fill(Raw::Other("an object"));
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
                self.fill(Raw::Other("an array"));
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

    fn visit_i128<E: Error>(self, number: i128) -> Result<(), E> {
        self.fill(Raw::Integer(number));
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

    fn visit_bytes<E: Error>(self, _: &[u8]) -> Result<(), E> {
        self.fill(Raw::Other("bytes"));
        Ok(())
    }

    fn visit_unit<E: Error>(self) -> Result<(), E> {
        self.fill(Raw::Null);
        Ok(())
    }
}

/// A key: the position below it, if a field points there.
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

/// Compares a key with this one.
struct IsKey<'k>(&'k str);

impl<'de> DeserializeSeed<'de> for IsKey<'_> {
    type Value = bool;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<bool, D::Error> {
        deserializer.deserialize_str(self)
    }
}

impl Visitor<'_> for IsKey<'_> {
    type Value = bool;

    fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("a key")
    }

    fn visit_str<E: Error>(self, key: &str) -> Result<bool, E> {
        Ok(self.0 == key)
    }
}
