//! CBOR (RFC 8949) as serde reads it: every well-formed item, with definite and indefinite lengths, half-precision numbers, and
//! tags, which are read for what they stand before. Never deeper than [`DEPTH`], so that no payload can use up the stack.

use std::borrow::Cow;
use std::fmt;

use serde::de::{DeserializeSeed, MapAccess, SeqAccess, Visitor};
use serde::forward_to_deserialize_any;

/// How deep items may stand in one another; that is also what serde_json takes.
const DEPTH: u8 = 128;

/// Tags of numbers that no other item holds (RFC 8949, 3.4.3 and 3.4.4).
const POSITIVE_BIGNUM: u64 = 2;
const NEGATIVE_BIGNUM: u64 = 3;
const DECIMAL_FRACTION: u64 = 4;

/// The additional information of an indefinite length, and the byte that ends it.
const INDEFINITE: u8 = 31;
const BREAK: u8 = 0xff;

/// Why bytes are not CBOR, or not what was asked for.
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

type Result<T> = std::result::Result<T, CborError>;

/// Reads one item.
pub(super) struct Deserializer<'de> {
    rest: &'de [u8],
    length: usize,
    depth: u8,
}

/// The head of an item: its major type, and its argument; `None` for an indefinite length.
#[derive(Clone, Copy)]
struct Head {
    major: u8,
    information: u8,
    argument: Option<u64>,
}

impl<'de> Deserializer<'de> {
    /// Reads from the beginning of the payload.
    pub fn new(payload: &'de [u8]) -> Self {
        Self { rest: payload, length: payload.len(), depth: 0 }
    }

    /// Checks that nothing is left.
    pub fn end(&self) -> Result<()> {
        if self.rest.is_empty() { Ok(()) } else { Err(self.error("expected the end of the payload")) }
    }

    fn error(&self, what: &str) -> CborError {
        CborError(format!("{what} at byte {}", self.length - self.rest.len()))
    }

    fn take(&mut self, length: u64) -> Result<&'de [u8]> {
        let taken = usize::try_from(length).ok().and_then(|length| self.rest.split_at_checked(length));
        let Some((taken, rest)) = taken else { return Err(self.error("the payload ends inside an item that begins before")) };
        self.rest = rest;
        Ok(taken)
    }

    fn head(&mut self) -> Result<Head> {
        let first = self.take(1)?.first().copied().unwrap_or_default();
        let (major, information) = (first >> 5, first & 0x1f);
        let argument = match information {
            0..24 => Some(u64::from(information)),
            24..28 => Some(self.take(1 << (information - 24))?.iter().fold(0, |value, byte| (value << 8) | u64::from(*byte))),
            INDEFINITE => None,
            _ => return Err(self.error("expected a length, found a reserved value")),
        };
        Ok(Head { major, information, argument })
    }

    /// Whether the next byte ends an indefinite length; takes it if so.
    fn is_break(&mut self) -> bool {
        match self.rest.split_first() {
            Some((&BREAK, rest)) => {
                self.rest = rest;
                true
            }
            _ => false,
        }
    }

    /// The bytes of a string, which may come in chunks.
    fn string(&mut self, head: Head) -> Result<Cow<'de, [u8]>> {
        if let Some(length) = head.argument {
            return self.take(length).map(Cow::Borrowed);
        }
        let mut whole = Vec::new();
        while !self.is_break() {
            let chunk = self.head()?;
            match chunk.argument {
                Some(length) if chunk.major == head.major => whole.extend_from_slice(self.take(length)?),
                _ => return Err(self.error("expected a chunk of a string")),
            }
        }
        Ok(Cow::Owned(whole))
    }

    fn text<V: Visitor<'de>>(&mut self, head: Head, visitor: V) -> Result<V::Value> {
        match self.string(head)? {
            Cow::Borrowed(bytes) => visitor.visit_borrowed_str(std::str::from_utf8(bytes).map_err(|_| self.error("expected UTF-8"))?),
            Cow::Owned(bytes) => visitor.visit_string(String::from_utf8(bytes).map_err(|_| self.error("expected UTF-8"))?),
        }
    }

    fn simple<V: Visitor<'de>>(&self, head: Head, visitor: V) -> Result<V::Value> {
        let argument = head.argument.unwrap_or_default();
        match head.information {
            20 => visitor.visit_bool(false),
            21 => visitor.visit_bool(true),
            22 | 23 => visitor.visit_unit(),
            25 => visitor.visit_f64(half(u16::try_from(argument).unwrap_or_default())),
            26 => visitor.visit_f64(f64::from(f32::from_bits(u32::try_from(argument).unwrap_or_default()))),
            27 => visitor.visit_f64(f64::from_bits(argument)),
            INDEFINITE => Err(self.error("expected an item, found the end of one")),
            _ => Err(self.error("expected true, false, null or a number, found an unassigned simple value")),
        }
    }

    fn tagged<V: Visitor<'de>>(&mut self, head: Head, visitor: V) -> Result<V::Value> {
        match head.argument {
            Some(tag @ (POSITIVE_BIGNUM | NEGATIVE_BIGNUM)) => {
                let inner = self.head()?;
                if inner.major != 2 {
                    return Err(self.error("expected the bytes of a bignum"));
                }
                let bytes = self.string(inner)?;
                // Beyond that no column has room for it.
                if bytes.len() > 15 {
                    return visitor.visit_bytes(&bytes);
                }
                let number = bytes.iter().fold(0_i128, |value, byte| (value << 8) | i128::from(*byte));
                visitor.visit_i128(if tag == NEGATIVE_BIGNUM { -1 - number } else { number })
            }
            Some(DECIMAL_FRACTION) => {
                let (exponent, mantissa): (i32, i64) = serde::Deserialize::deserialize(&mut *self)?;
                // The text of a decimal fraction is read exactly; a power of ten would round twice.
                visitor.visit_f64(format!("{mantissa}e{exponent}").parse().map_err(|_| self.error("expected a decimal fraction"))?)
            }
            Some(_) => serde::Deserializer::deserialize_any(self, visitor),
            None => Err(self.error("expected a tag")),
        }
    }

    fn any<V: Visitor<'de>>(&mut self, visitor: V) -> Result<V::Value> {
        let head = self.head()?;
        let argument = || head.argument.ok_or_else(|| self.error("expected a number, found an indefinite length"));
        match head.major {
            0 => visitor.visit_u64(argument()?),
            1 => {
                let number = -1 - i128::from(argument()?);
                match i64::try_from(number) {
                    Ok(number) => visitor.visit_i64(number),
                    Err(_) => visitor.visit_i128(number),
                }
            }
            2 => match self.string(head)? {
                Cow::Borrowed(bytes) => visitor.visit_borrowed_bytes(bytes),
                Cow::Owned(bytes) => visitor.visit_byte_buf(bytes),
            },
            3 => self.text(head, visitor),
            4 => {
                let mut items = Items { left: head.argument, deserializer: self };
                let value = visitor.visit_seq(&mut items)?;
                items.finish()?;
                Ok(value)
            }
            5 => {
                let mut items = Items { left: head.argument, deserializer: self };
                let value = visitor.visit_map(&mut items)?;
                items.finish()?;
                Ok(value)
            }
            6 => self.tagged(head, visitor),
            _ => self.simple(head, visitor),
        }
    }
}

impl<'de> serde::Deserializer<'de> for &mut Deserializer<'de> {
    type Error = CborError;

    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value> {
        if self.depth == DEPTH {
            return Err(self.error("items stand too deep in one another"));
        }
        self.depth += 1;
        let value = self.any(visitor);
        self.depth -= 1;
        value
    }

    /// A key: a text, or a number as its decimal digits.
    fn deserialize_str<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value> {
        let head = self.head()?;
        match (head.major, head.argument) {
            (0, Some(number)) => visitor.visit_string(number.to_string()),
            (1, Some(number)) => visitor.visit_string((-1 - i128::from(number)).to_string()),
            (3, _) => self.text(head, visitor),
            _ => Err(self.error("expected a key that is a text or a number")),
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

/// What is left of an array or a map.
struct Items<'d, 'de> {
    deserializer: &'d mut Deserializer<'de>,
    /// How many items or pairs; `None` where a break ends them.
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

    /// Checks that the visitor took all there was.
    fn finish(&mut self) -> Result<()> {
        if self.advance() { Err(self.deserializer.error("found more items than were expected")) } else { Ok(()) }
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

/// A number of half precision (RFC 8949, appendix D).
fn half(bits: u16) -> f64 {
    let (exponent, mantissa) = (i32::from((bits >> 10) & 0x1f), f64::from(bits & 0x3ff));
    let magnitude = match exponent {
        0 => mantissa * 2_f64.powi(-24),
        31 if mantissa == 0.0 => f64::INFINITY,
        31 => f64::NAN,
        _ => (mantissa + 1024.0) * 2_f64.powi(exponent - 25),
    };
    if bits & 0x8000 == 0 { magnitude } else { -magnitude }
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

    /// The examples of RFC 8949, appendix A, as far as JSON can say what they are.
    #[test]
    fn the_examples_of_the_rfc() {
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
    fn what_is_not_well_formed() {
        for hex in ["", "18", "1c", "61", "61ff", "81", "a161", "9f00", "ff", "0000", "7f01ff", "f8ff", "5f", "c2", "1f", "bf6161ff", "fc"]
        {
            assert!(read(hex).is_err(), "{hex}");
        }
        assert!(read(&"81".repeat(100_000)).is_err());
        assert!(read(&"c1".repeat(100_000)).is_err());
        assert!(read("9bffffffffffffffff00").is_err());
    }
}
