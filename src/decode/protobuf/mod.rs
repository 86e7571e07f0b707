//! Protocol Buffers: the description of the messages and the pointers of the fields are compiled into one table, by which the
//! wire format is read straight into the slots.

mod compile;

use std::borrow::Cow;
use std::collections::{BTreeMap, HashMap};

use prost_reflect::{DescriptorPool, Kind};

use self::compile::{Compiler, member};
use super::reading::Message;
use super::time::Time;
use super::wire::{Content, Wire, WireError};
use super::{Document, Raw};
use fleetwright_api::pipeline::{Decode, TimeUnit};

/// Full name of the message that is a time.
const TIMESTAMP: &str = "google.protobuf.Timestamp";

/// Why a description does not fit the fields.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
pub enum DescribeError {
    /// There is no description.
    #[error("failed to find the FileDescriptorSet of the format Protobuf: name its ConfigMap in decode.protobuf.configMapRef")]
    FindDescriptor,

    /// The description is none.
    #[error("failed to read the FileDescriptorSet: {detail}; make it with `protoc --include_imports --descriptor_set_out=descriptor.pb`")]
    ReadDescriptor {
        /// What is wrong with it.
        detail: String,
    },

    /// It does not describe the message.
    #[error("failed to find the message {message} in the FileDescriptorSet, which describes {known}")]
    FindMessage {
        /// The message.
        message: String,
        /// Those that it describes.
        known: String,
    },

    /// The message has no such member.
    #[error("failed to find {member} in the message {message}: point to one of its members, by its name in the .proto file or in JSON")]
    FindMember {
        /// The key of the pointer.
        member: String,
        /// The message, or what is none.
        message: String,
    },

    /// The member is of another type than the field.
    #[error("failed to take {member} for the field {field}: expected {expected}, found {found}")]
    MatchType {
        /// The member.
        member: String,
        /// The field.
        field: String,
        /// Its type.
        expected: String,
        /// The member's type.
        found: String,
    },
}

/// Reads the messages of one type.
#[derive(Clone, Debug)]
pub(super) struct Reader {
    /// The numbers of the members that lead to the readings.
    above: Vec<u32>,
    shape: Shape,
}

/// What matters of a message: its members by their numbers.
#[derive(Clone, Debug, Default)]
struct Shape {
    members: BTreeMap<u32, Member>,
}

#[derive(Clone, Debug)]
struct Member {
    slots: Vec<usize>,
    type_: Type,
    /// What the slots hold where the member is not there although its message is: members without presence have a default.
    default: Option<Raw<'static>>,
}

#[derive(Clone, Debug)]
enum Type {
    Double,
    Float,
    Signed {
        zigzag: bool,
        wide: bool,
    },
    Unsigned,
    Fixed {
        signed: bool,
    },
    Boolean,
    Text,
    Bytes,
    Enumeration(HashMap<i32, Box<str>>),
    Time,
    Message(Shape),
    /// The values of a map that some pointer names by their key; the key's type first.
    Map(Box<Type>, BTreeMap<Box<str>, Member>),
}

impl Reader {
    /// Compiles the pointers of `decode` for its message.
    pub fn compile(decode: &Decode, document: &Document, descriptor: Option<&[u8]>) -> Result<Self, DescribeError> {
        let (Some(protobuf), Some(descriptor)) = (&decode.protobuf, descriptor) else { return Err(DescribeError::FindDescriptor) };
        let pool = DescriptorPool::decode(descriptor).map_err(|error| DescribeError::ReadDescriptor { detail: error.to_string() })?;
        let Some(mut message) = pool.get_message_by_name(&protobuf.message) else {
            let mut known: Vec<_> =
                pool.all_messages().filter(|known| !known.is_map_entry()).map(|known| known.full_name().to_owned()).collect();
            known.truncate(10);
            return Err(DescribeError::FindMessage { message: protobuf.message.clone(), known: known.join(", ") });
        };
        let mut above = Vec::new();
        for key in &document.readings {
            let member = member(&message, key)?;
            above.push(member.number());
            match member.kind() {
                Kind::Message(below) if !member.is_map() => message = below,
                _ => return Err(DescribeError::FindMember { member: key.clone(), message: member.full_name().to_owned() }),
            }
        }
        let shape = Compiler { decode }.shape(&message, &document.root)?;
        Ok(Self { above, shape })
    }

    /// Reads a message.
    pub fn decode<'de>(&self, message: &mut Message<'_, 'de>, payload: &'de [u8]) -> Result<(), WireError> {
        if self.above.is_empty() {
            self.shape.read(payload, &mut message.slots)?;
            message.finish(None);
            return Ok(());
        }
        self.descend(&self.above, payload, message, &mut 0)
    }

    fn descend<'de>(&self, above: &[u32], bytes: &'de [u8], message: &mut Message<'_, 'de>, index: &mut usize) -> Result<(), WireError> {
        let Some((wanted, below)) = above.split_first() else {
            self.shape.read(bytes, &mut message.slots)?;
            message.finish(Some(*index));
            *index += 1;
            // The outcome has the bound.
            return if message.is_exceeded() { Err(WireError("the message is beyond a bound")) } else { Ok(()) };
        };
        let mut wire = Wire(bytes);
        while let Some((number, content)) = wire.next()? {
            match content {
                Content::Bytes(bytes) if number == *wanted => self.descend(below, bytes, message, index)?,
                _ => {}
            }
        }
        Ok(())
    }
}

impl Type {
    fn is_integer(&self) -> bool {
        matches!(self, Self::Signed { .. } | Self::Unsigned | Self::Fixed { .. })
    }

    fn is_float(&self) -> bool {
        matches!(self, Self::Double | Self::Float)
    }

    /// The value of a member that is not on the wire.
    fn zero(&self) -> Option<Raw<'static>> {
        Some(match self {
            Self::Double | Self::Float => Raw::Float(0.0),
            Self::Signed { .. } | Self::Unsigned | Self::Fixed { .. } => Raw::Integer(0),
            Self::Boolean => Raw::Boolean(false),
            Self::Text => Raw::Text(Cow::Borrowed("")),
            Self::Enumeration(names) => Raw::Text(Cow::Owned(names.get(&0)?.to_string())),
            _ => return None,
        })
    }

    /// One value, as a slot takes it.
    fn read<'de>(&self, content: Content<'de>) -> Result<Raw<'de>, WireError> {
        Ok(match (self, content) {
            (Self::Double, Content::Fixed64(bits)) => Raw::Float(f64::from_bits(bits)),
            (Self::Float, Content::Fixed32(bits)) => Raw::Float(f64::from(f32::from_bits(bits))),
            (Self::Signed { zigzag: true, .. }, Content::Varint(value)) => {
                Raw::Integer(i128::from((value >> 1).cast_signed() ^ -((value & 1).cast_signed())))
            }
            (Self::Signed { wide: true, .. }, Content::Varint(value)) | (Self::Fixed { signed: true }, Content::Fixed64(value)) => {
                Raw::Integer(value.cast_signed().into())
            }
            #[allow(clippy::cast_possible_truncation, reason = "an int32 is written sign-extended to 64 bits")]
            (Self::Signed { .. }, Content::Varint(value)) => Raw::Integer((value as u32).cast_signed().into()),
            (Self::Unsigned, Content::Varint(value)) | (Self::Fixed { signed: false }, Content::Fixed64(value)) => {
                Raw::Integer(value.into())
            }
            (Self::Fixed { signed: false }, Content::Fixed32(value)) => Raw::Integer(value.into()),
            (Self::Fixed { signed: true }, Content::Fixed32(value)) => Raw::Integer(value.cast_signed().into()),
            (Self::Boolean, Content::Varint(value)) => Raw::Boolean(value != 0),
            (Self::Text, Content::Bytes(bytes)) => {
                Raw::Text(Cow::Borrowed(std::str::from_utf8(bytes).map_err(|_| WireError("expected a text in UTF-8"))?))
            }
            (Self::Bytes, Content::Bytes(_)) => Raw::Other("bytes"),
            #[allow(clippy::cast_possible_truncation, reason = "a value of an enumeration is written sign-extended to 64 bits")]
            (Self::Enumeration(names), Content::Varint(value)) => {
                let number = (value as u32).cast_signed();
                names.get(&number).map_or_else(|| Raw::Integer(number.into()), |name| Raw::Text(Cow::Owned(name.to_string())))
            }
            (Self::Time, Content::Bytes(bytes)) => Raw::Time(read_time(bytes)?),
            _ => return Err(WireError("a member is not of the type that the FileDescriptorSet says")),
        })
    }
}

impl Shape {
    /// Reads the members of a message into the slots.
    fn read<'de>(&self, bytes: &'de [u8], slots: &mut [Raw<'de>]) -> Result<(), WireError> {
        for member in self.members.values() {
            if let Some(default) = &member.default {
                for slot in &member.slots {
                    if slots[*slot] == Raw::Absent {
                        slots[*slot] = default.clone();
                    }
                }
            }
        }
        let mut wire = Wire(bytes);
        while let Some((number, content)) = wire.next()? {
            if let Some(member) = self.members.get(&number) {
                member.read(content, slots)?;
            }
        }
        Ok(())
    }
}

impl Member {
    fn read<'de>(&self, content: Content<'de>, slots: &mut [Raw<'de>]) -> Result<(), WireError> {
        match (&self.type_, content) {
            (Type::Message(shape), Content::Bytes(bytes)) => shape.read(bytes, slots),
            (Type::Map(key_type, values), Content::Bytes(entry)) => {
                let (mut wire, mut key, mut value) = (Wire(entry), None, None);
                while let Some((number, content)) = wire.next()? {
                    match number {
                        1 => key = Some(key_type.read(content)?),
                        2 => value = Some(content),
                        _ => {}
                    }
                }
                match key.or_else(|| key_type.zero()).and_then(|key| values.get(key_text(&key).as_ref())).zip(value) {
                    Some((member, value)) => member.read(value, slots),
                    None => Ok(()),
                }
            }
            (type_, content) => {
                let value = type_.read(content)?;
                if let [slot] = self.slots[..] {
                    slots[slot] = value;
                } else {
                    for slot in &self.slots {
                        slots[*slot] = value.clone();
                    }
                }
                Ok(())
            }
        }
    }
}

/// A key of a map, as a pointer names it.
fn key_text<'a>(key: &'a Raw<'_>) -> Cow<'a, str> {
    match key {
        Raw::Text(text) => Cow::Borrowed(text),
        Raw::Integer(number) => Cow::Owned(number.to_string()),
        Raw::Boolean(truth) => Cow::Borrowed(if *truth { "true" } else { "false" }),
        _ => Cow::Borrowed(""),
    }
}

/// A google.protobuf.Timestamp: seconds since 1970, and nanoseconds.
fn read_time(bytes: &[u8]) -> Result<Time, WireError> {
    let (mut seconds, mut nanoseconds) = (0_i64, 0_i64);
    let mut wire = Wire(bytes);
    while let Some((number, content)) = wire.next()? {
        match (number, content) {
            (1, Content::Varint(value)) => seconds = value.cast_signed(),
            (2, Content::Varint(value)) => nanoseconds = value.cast_signed(),
            _ => {}
        }
    }
    let whole = i128::from(seconds) * 1_000_000_000 + i128::from(nanoseconds);
    Time::from_integer(whole, TimeUnit::Nanoseconds).ok_or(WireError("expected a google.protobuf.Timestamp, found one beyond 64 bits"))
}
