//! The wire format of Protocol Buffers: the members of one message, one after the other.
//!
//! <https://protobuf.dev/programming-guides/encoding/>

use std::fmt;

/// The deepest nesting of groups; the limit of other implementations.
const MAX_GROUPS: usize = 100;

/// Why bytes are not a message.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct WireError(pub &'static str);

impl fmt::Display for WireError {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(self.0)
    }
}

/// The value of a member, before its type is known.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Content<'a> {
    Varint(u64),
    Fixed64(u64),
    Fixed32(u32),
    /// A text, bytes, a message, or packed values.
    Bytes(&'a [u8]),
    /// A group, a deprecated feature; it is skipped.
    Group,
}

/// The rest of a message.
#[derive(Clone, Copy, Debug)]
pub(super) struct Wire<'a>(pub &'a [u8]);

impl<'a> Wire<'a> {
    /// The next member, with its number; `None` at the end.
    pub fn next(&mut self) -> Result<Option<(u32, Content<'a>)>, WireError> {
        if self.0.is_empty() {
            return Ok(None);
        }
        let (number, type_) = self.key()?;
        self.content(number, type_).map(|content| Some((number, content)))
    }

    /// A number of variable length.
    fn varint(&mut self) -> Result<u64, WireError> {
        let mut value = 0_u64;
        for shift in (0..64).step_by(7) {
            let [byte] = self.array()?;
            value |= u64::from(byte & 0x7f) << shift;
            if byte & 0x80 == 0 {
                return Ok(value);
            }
        }
        Err(WireError("expected a number of at most ten bytes"))
    }

    fn fixed32(&mut self) -> Result<u32, WireError> {
        self.array().map(u32::from_le_bytes)
    }

    fn fixed64(&mut self) -> Result<u64, WireError> {
        self.array().map(u64::from_le_bytes)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], WireError> {
        let (taken, rest) = self.0.split_first_chunk().ok_or(WireError("the payload ends inside a value"))?;
        self.0 = rest;
        Ok(*taken)
    }

    fn key(&mut self) -> Result<(u32, u8), WireError> {
        let key = u32::try_from(self.varint()?).map_err(|_| WireError("expected the number of a member, found one beyond 29 bits"))?;
        match key >> 3 {
            0 => Err(WireError("expected the number of a member, found 0")),
            number => Ok((number, u8::try_from(key & 7).unwrap_or_default())),
        }
    }

    fn content(&mut self, number: u32, type_: u8) -> Result<Content<'a>, WireError> {
        match type_ {
            0 => self.varint().map(Content::Varint),
            1 => self.fixed64().map(Content::Fixed64),
            2 => {
                let length = self.varint()?;
                let taken = usize::try_from(length).ok().and_then(|length| self.0.split_at_checked(length));
                let (taken, rest) = taken.ok_or(WireError("the payload ends inside a value"))?;
                self.0 = rest;
                Ok(Content::Bytes(taken))
            }
            3 => self.skip_group(number).map(|()| Content::Group),
            5 => self.fixed32().map(Content::Fixed32),
            _ => Err(WireError("expected a member, found an unknown wire type")),
        }
    }

    fn skip_group(&mut self, number: u32) -> Result<(), WireError> {
        let mut open = vec![number];
        while let Some(innermost) = open.last() {
            match self.key()? {
                (number, 4) if number == *innermost => drop(open.pop()),
                (_, 4) => return Err(WireError("found the end of a group without its beginning")),
                (_, 3) if open.len() == MAX_GROUPS => return Err(WireError("groups are nested too deeply")),
                (number, 3) => open.push(number),
                (number, type_) => drop(self.content(number, type_)?),
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn members_follow_one_another() {
        let mut wire = Wire(b"\x08\x96\x01\x11\x01\0\0\0\0\0\0\0\x1a\x02hi\x23\x08\x01\x2b\x2c\x24\x35\x02\0\0\0");
        let expected = [
            (1, Content::Varint(150)),
            (2, Content::Fixed64(1)),
            (3, Content::Bytes(b"hi")),
            (4, Content::Group),
            (6, Content::Fixed32(2)),
        ];
        for member in expected {
            assert_eq!(wire.next(), Ok(Some(member)));
        }
        assert_eq!(wire.next(), Ok(None));
    }

    #[test]
    fn malformed_messages_are_refused() {
        for bytes in
            [&b"\x08"[..], b"\x08\x80", b"\x0a\x05hi", b"\x00\x01", b"\x0e", b"\x0c", b"\x23\x2c", b"\x23", b"\x09\x01", &[0x80; 11]]
        {
            assert!(Wire(bytes).next().is_err(), "{bytes:?}");
        }
        assert!(Wire(&[0x23; 1000]).next().is_err());
    }
}
