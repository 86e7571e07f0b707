//! From the description of the messages and the pointers of the fields to the table of members.

use prost_reflect::{FieldDescriptor, Kind, MessageDescriptor};

use super::{DescribeError, Member, Shape, TIMESTAMP, Type};
use crate::pointer::Node;
use fleetwright_api::pipeline::{Decode, FieldType, TimeUnit};

/// What the compiler needs to know of the fields.
pub(super) struct Compiler<'a> {
    pub decode: &'a Decode,
}

/// The member that a key of a pointer names.
pub(super) fn member(message: &MessageDescriptor, key: &str) -> Result<FieldDescriptor, DescribeError> {
    let found = message.get_field_by_name(key).or_else(|| message.get_field_by_json_name(key));
    found.ok_or_else(|| DescribeError::FindMember { member: key.to_owned(), message: message.full_name().to_owned() })
}

impl Compiler<'_> {
    /// The members of a message that the pointers name.
    pub fn shape(&self, message: &MessageDescriptor, node: &Node) -> Result<Shape, DescribeError> {
        let mut shape = Shape::default();
        for (key, below) in node.children() {
            let field = member(message, key)?;
            shape.members.insert(field.number(), self.member(&field, below)?);
        }
        Ok(shape)
    }

    fn member(&self, field: &FieldDescriptor, node: &Node) -> Result<Member, DescribeError> {
        let key = || node.children().next().map_or("a single value", |(key, _)| key).to_owned();
        let nothing = || DescribeError::FindMember { member: key(), message: field.full_name().to_owned() };
        if field.is_list() {
            return Err(nothing());
        }
        let type_ = match field.kind() {
            Kind::Message(entry) if field.is_map() && node.slots.is_empty() => {
                let (key, value) = (entry.map_entry_key_field(), entry.map_entry_value_field());
                let members = node.children().map(|(name, below)| Ok((name.into(), self.member(&value, below)?)));
                Type::Map(Box::new(type_of(&key.kind()).ok_or_else(nothing)?), members.collect::<Result<_, _>>()?)
            }
            Kind::Message(message) if message.full_name() != TIMESTAMP && node.slots.is_empty() => {
                Type::Message(self.shape(&message, node)?)
            }
            kind if node.is_leaf() => self.leaf(type_of(&kind).ok_or_else(nothing)?, &node.slots),
            _ => return Err(nothing()),
        };
        for slot in &node.slots {
            self.check(field, *slot, &type_)?;
        }
        let default = if field.supports_presence() { None } else { type_.zero() };
        Ok(Member { slots: node.slots.clone(), type_, default })
    }

    /// A value of an enumeration is a name, and for whole numbers its number.
    fn leaf(&self, type_: Type, slots: &[usize]) -> Type {
        let wants_number = |slot: &usize| self.decode.fields.get(*slot).is_some_and(|field| field.type_ == FieldType::Int64);
        match type_ {
            Type::Enumeration(_) if slots.iter().all(wants_number) => Type::Signed { zigzag: false, wide: false },
            other => other,
        }
    }

    /// Whether the field, or the time, that takes a slot can hold values of this type.
    fn check(&self, member: &FieldDescriptor, slot: usize, type_: &Type) -> Result<(), DescribeError> {
        let numeric_time = |unit| {
            matches!(type_, Type::Time)
                || if unit == TimeUnit::Rfc3339 { matches!(type_, Type::Text) } else { type_.is_integer() || type_.is_float() }
        };
        let (name, expected, fits) = match self.decode.fields.get(slot) {
            Some(field) => {
                let fits = match field.type_ {
                    FieldType::Float64 => type_.is_float() || type_.is_integer(),
                    FieldType::Int64 => type_.is_integer(),
                    FieldType::Boolean => matches!(type_, Type::Boolean),
                    FieldType::Text => matches!(type_, Type::Text | Type::Enumeration(_)),
                    FieldType::Timestamp => numeric_time(field.time_unit.unwrap_or(TimeUnit::Rfc3339)),
                    FieldType::Json => false,
                };
                (field.name.clone(), format!("{:?}", field.type_), fits)
            }
            None => {
                let unit = self.decode.time.as_ref().map(|time| time.unit).unwrap_or_default();
                ("time".to_owned(), format!("{unit:?}"), numeric_time(unit))
            }
        };
        if fits {
            return Ok(());
        }
        Err(DescribeError::MatchType {
            member: member.full_name().to_owned(),
            field: name,
            expected,
            found: format!("{:?}", member.kind()),
        })
    }
}

/// The type of a member that a column could take; `None` for a message that is no time.
fn type_of(kind: &Kind) -> Option<Type> {
    Some(match kind {
        Kind::Double => Type::Double,
        Kind::Float => Type::Float,
        Kind::Int32 => Type::Signed { zigzag: false, wide: false },
        Kind::Int64 => Type::Signed { zigzag: false, wide: true },
        Kind::Sint32 => Type::Signed { zigzag: true, wide: false },
        Kind::Sint64 => Type::Signed { zigzag: true, wide: true },
        Kind::Uint32 | Kind::Uint64 => Type::Unsigned,
        Kind::Fixed32 | Kind::Fixed64 => Type::Fixed { signed: false },
        Kind::Sfixed32 | Kind::Sfixed64 => Type::Fixed { signed: true },
        Kind::Bool => Type::Boolean,
        Kind::String => Type::Text,
        Kind::Bytes => Type::Bytes,
        Kind::Enum(enumeration) => Type::Enumeration(enumeration.values().map(|value| (value.number(), value.name().into())).collect()),
        Kind::Message(message) if message.full_name() == TIMESTAMP => Type::Time,
        Kind::Message(_) => return None,
    })
}
