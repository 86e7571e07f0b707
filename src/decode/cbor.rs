//! CBOR (RFC 8949) for serde. `minicbor` reads the tokens. Definite and indefinite lengths, half-precision numbers and tags are
//! accepted. Items are nested at most [`MAX_DEPTH`] levels deep, so that a payload cannot overflow the stack.

use std::borrow::Cow;
use std::fmt;

use minicbor::Decoder;
use minicbor::data::{IanaTag, Type};
use serde::de::{DeserializeSeed, MapAccess, SeqAccess, Visitor};
use serde::forward_to_deserialize_any;

/// The maximum nesting of items; the limit of serde_json.
const MAX_DEPTH: u8 = 128;

/// The maximum length of a bignum in bytes. Larger values fit no column.
const MAX_BIGNUM_BYTES: usize = 15;

/// Why a payload is not CBOR, or not of the expected type.
#[derive(Debug)]
pub(super) struct CborError(String);

impl fmt::Display for CborError {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(&self.0)
    }
}

impl std::error::Error for CborError {}

impl serde::de::Error for CborError {
    fn custom<T: fmt::Display>(message: T) -> Self {
        Self(message.to_string())
    }
}

impl From<minicbor::decode::Error> for CborError {
    fn from(error: minicbor::decode::Error) -> Self {
        Self(error.to_string())
    }
}

type Result<T> = std::result::Result<T, CborError>;

/// Reads one item.
pub(super) struct Deserializer<'de> {
    decoder: Decoder<'de>,
    depth: u8,
}

impl<'de> Deserializer<'de> {
    /// Reads from the beginning of the payload.
    pub fn new(payload: &'de [u8]) -> Self {
        Self { decoder: Decoder::new(payload), depth: 0 }
    }

    /// Checks that the payload has ended.
    pub fn end(&self) -> Result<()> {
        if self.decoder.position() == self.decoder.input().len() { Ok(()) } else { Err(self.error("expected the end of the payload")) }
    }

    fn error(&self, what: &str) -> CborError {
        CborError(format!("{what} at position {}", self.decoder.position()))
    }

    /// Whether the next byte ends an indefinite length. Takes it if so.
    fn is_break(&mut self) -> bool {
        let is_break = matches!(self.decoder.datatype(), Ok(Type::Break));
        if is_break {
            self.decoder.set_position(self.decoder.position() + 1);
        }
        is_break
    }

    fn bytes(&mut self) -> Result<Cow<'de, [u8]>> {
        if self.decoder.datatype()? != Type::BytesIndef {
            return Ok(Cow::Borrowed(self.decoder.bytes()?));
        }
        let mut whole = Vec::new();
        for chunk in self.decoder.bytes_iter()? {
            whole.extend_from_slice(chunk?);
        }
        Ok(Cow::Owned(whole))
    }

    fn text_of_chunks(&mut self) -> Result<String> {
        Ok(self.decoder.str_iter()?.collect::<std::result::Result<String, _>>()?)
    }

    fn tagged<V: Visitor<'de>>(&mut self, visitor: V) -> Result<V::Value> {
        match IanaTag::try_from(self.decoder.tag()?) {
            Ok(tag @ (IanaTag::PosBignum | IanaTag::NegBignum)) => {
                let bytes = self.bytes()?;
                if bytes.len() > MAX_BIGNUM_BYTES {
                    return visitor.visit_bytes(&bytes);
                }
                let number = bytes.iter().fold(0_i128, |value, byte| (value << 8) | i128::from(*byte));
                visitor.visit_i128(if tag == IanaTag::NegBignum { -1 - number } else { number })
            }
            Ok(IanaTag::Decimal) => {
                let (exponent, mantissa): (i32, i64) = serde::Deserialize::deserialize(&mut *self)?;
                // Parsing the decimal text is exact. Multiplying by a power of ten would round twice.
                visitor.visit_f64(format!("{mantissa}e{exponent}").parse().map_err(|_| self.error("expected a decimal fraction"))?)
            }
            // Other tags do not change the value.
            _ => serde::Deserializer::deserialize_any(self, visitor),
        }
    }

    fn any<V: Visitor<'de>>(&mut self, visitor: V) -> Result<V::Value> {
        match self.decoder.datatype()? {
            Type::U8 | Type::U16 | Type::U32 | Type::U64 => visitor.visit_u64(self.decoder.u64()?),
            Type::I8 | Type::I16 | Type::I32 | Type::I64 => visitor.visit_i64(self.decoder.i64()?),
            Type::Int => visitor.visit_i128(self.decoder.int()?.into()),
            Type::F16 | Type::F32 | Type::F64 => visitor.visit_f64(self.decoder.f64()?),
            Type::Bool => visitor.visit_bool(self.decoder.bool()?),
            Type::Null => {
                self.decoder.null()?;
                visitor.visit_unit()
            }
            Type::Undefined => {
                self.decoder.undefined()?;
                visitor.visit_unit()
            }
            Type::String => visitor.visit_borrowed_str(self.decoder.str()?),
            Type::StringIndef => visitor.visit_string(self.text_of_chunks()?),
            Type::Bytes => visitor.visit_borrowed_bytes(self.decoder.bytes()?),
            Type::BytesIndef => visitor.visit_byte_buf(self.bytes()?.into_owned()),
            Type::Array | Type::ArrayIndef => {
                let mut items = Items { left: self.decoder.array()?, deserializer: self };
                let value = visitor.visit_seq(&mut items)?;
                items.finish()?;
                Ok(value)
            }
            Type::Map | Type::MapIndef => {
                let mut items = Items { left: self.decoder.map()?, deserializer: self };
                let value = visitor.visit_map(&mut items)?;
                items.finish()?;
                Ok(value)
            }
            Type::Tag => self.tagged(visitor),
            Type::Break => Err(self.error("expected an item, found the end of an indefinite length")),
            other @ (Type::Simple | Type::Unknown(_)) => Err(self.error(&format!("expected an item, found {other}"))),
        }
    }
}

impl<'de> serde::Deserializer<'de> for &mut Deserializer<'de> {
    type Error = CborError;

    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value> {
        if self.depth == MAX_DEPTH {
            return Err(self.error(&format!("expected at most {MAX_DEPTH} nested items, found more")));
        }
        self.depth += 1;
        let value = self.any(visitor);
        self.depth -= 1;
        value
    }

    /// A key: a text, or a number as its decimal digits.
    fn deserialize_str<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value> {
        match self.decoder.datatype()? {
            Type::String => visitor.visit_borrowed_str(self.decoder.str()?),
            Type::StringIndef => visitor.visit_string(self.text_of_chunks()?),
            Type::U8 | Type::U16 | Type::U32 | Type::U64 | Type::I8 | Type::I16 | Type::I32 | Type::I64 | Type::Int => {
                visitor.visit_string(self.decoder.int()?.to_string())
            }
            other => Err(self.error(&format!("expected a key that is a text or an integer, found {other}"))),
        }
    }

    fn deserialize_string<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value> {
        self.deserialize_str(visitor)
    }

    fn deserialize_option<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value> {
        visitor.visit_some(self)
    }

    fn deserialize_newtype_struct<V: Visitor<'de>>(self, _: &'static str, visitor: V) -> Result<V::Value> {
        visitor.visit_newtype_struct(self)
    }

    forward_to_deserialize_any! {
        bool i8 i16 i32 i64 i128 u8 u16 u32 u64 u128 f32 f64 char bytes byte_buf unit unit_struct seq tuple
        tuple_struct map struct enum identifier ignored_any
    }
}

/// The remaining items of an array or a map.
struct Items<'d, 'de> {
    deserializer: &'d mut Deserializer<'de>,
    /// The number of items or pairs. `None` if a break ends them.
    left: Option<u64>,
}

impl Items<'_, '_> {
    fn advance(&mut self) -> bool {
        match &mut self.left {
            Some(0) => false,
            Some(left) => {
                *left -= 1;
                true
            }
            None if self.deserializer.is_break() => {
                self.left = Some(0);
                false
            }
            None => true,
        }
    }

    /// Checks that the visitor has taken all items.
    fn finish(&mut self) -> Result<()> {
        if self.advance() { Err(self.deserializer.error("expected the end of an array or a map, found another item")) } else { Ok(()) }
    }
}

impl<'de> SeqAccess<'de> for &mut Items<'_, 'de> {
    type Error = CborError;

    fn next_element_seed<T: DeserializeSeed<'de>>(&mut self, seed: T) -> Result<Option<T::Value>> {
        if self.advance() { seed.deserialize(&mut *self.deserializer).map(Some) } else { Ok(None) }
    }
}

impl<'de> MapAccess<'de> for &mut Items<'_, 'de> {
    type Error = CborError;

    fn next_key_seed<K: DeserializeSeed<'de>>(&mut self, seed: K) -> Result<Option<K::Value>> {
        if self.advance() { seed.deserialize(&mut *self.deserializer).map(Some) } else { Ok(None) }
    }

    fn next_value_seed<V: DeserializeSeed<'de>>(&mut self, seed: V) -> Result<V::Value> {
        seed.deserialize(&mut *self.deserializer)
    }
}

#[cfg(test)]
mod tests {
    use serde::Deserialize;
    use serde_json::{Value, json};

    use super::*;

    fn bytes(hex: &str) -> Vec<u8> {
        (0..hex.len()).step_by(2).map(|index| u8::from_str_radix(&hex[index..index + 2], 16).unwrap()).collect()
    }

    fn read(hex: &str) -> std::result::Result<Value, String> {
        let payload = bytes(hex);
        let mut deserializer = Deserializer::new(&payload);
        let value = Value::deserialize(&mut deserializer).map_err(|error| error.to_string())?;
        deserializer.end().map_err(|error| error.to_string())?;
        Ok(value)
    }

    /// The examples of RFC 8949, appendix A, that JSON can represent.
    #[test]
    fn the_examples_of_the_rfc_are_read() {
        for (hex, expected) in [
            ("00", json!(0)),
            ("17", json!(23)),
            ("1818", json!(24)),
            ("1903e8", json!(1000)),
            ("1a000f4240", json!(1_000_000)),
            ("1bffffffffffffffff", json!(u64::MAX)),
            ("20", json!(-1)),
            ("3903e7", json!(-1000)),
            ("f90000", json!(0.0)),
            ("f93c00", json!(1.0)),
            ("f93e00", json!(1.5)),
            ("f97bff", json!(65504.0)),
            ("f90001", json!(5.960_464_477_539_063e-8)),
            ("f90400", json!(6.103_515_625e-5)),
            ("f9c400", json!(-4.0)),
            ("fa47c35000", json!(100_000.0)),
            ("fb3ff199999999999a", json!(1.1)),
            ("fbc010666666666666", json!(-4.1)),
            ("f4", json!(false)),
            ("f5", json!(true)),
            ("f6", json!(null)),
            ("f7", json!(null)),
            ("c074323031332d30332d32315432303a30343a30305a", json!("2013-03-21T20:04:00Z")),
            ("c11a514b67b0", json!(1_363_896_240)),
            ("c1fb41d452d9ec200000", json!(1_363_896_240.5)),
            ("c48221196ab3", json!(273.15)),
            ("60", json!("")),
            ("62225c", json!("\"\\")),
            ("62c3bc", json!("ü")),
            ("80", json!([])),
            ("8301820203820405", json!([1, [2, 3], [4, 5]])),
            ("a201020304", json!({"1": 2, "3": 4})),
            ("a26161016162820203", json!({"a": 1, "b": [2, 3]})),
            ("7f657374726561646d696e67ff", json!("streaming")),
            ("9fff", json!([])),
            ("9f018202039f0405ffff", json!([1, [2, 3], [4, 5]])),
            ("83018202039f0405ff", json!([1, [2, 3], [4, 5]])),
            ("bf61610161629f0203ffff", json!({"a": 1, "b": [2, 3]})),
            ("826161bf61626163ff", json!(["a", {"b": "c"}])),
        ] {
            assert_eq!(read(hex), Ok(expected), "{hex}");
        }
    }

    #[test]
    fn malformed_items_are_errors() {
        for hex in ["", "18", "1c", "61", "61ff", "81", "a161", "9f00", "ff", "0000", "7f01ff", "f8ff", "5f", "c2", "1f", "bf6161ff", "fc"]
        {
            assert!(read(hex).is_err(), "{hex}");
        }
        assert!(read(&"81".repeat(100_000)).is_err());
        assert!(read(&"c1".repeat(100_000)).is_err());
        assert!(read("9bffffffffffffffff00").is_err());
    }
}
