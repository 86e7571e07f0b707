//! Messages in arguments.

use std::io::Read;

use anyhow::{Context, bail};
use base64::Engine;
use base64::prelude::BASE64_STANDARD;

/// The encoding of messages.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Encoding {
    /// The bytes themselves.
    Plain,
    /// In hexadecimal digits.
    Hex,
    /// In base64.
    Base64,
}

/// The content of a file, or of standard input.
pub fn read(path: &str) -> anyhow::Result<Vec<u8>> {
    if path == "-" {
        let mut content = Vec::new();
        std::io::stdin().read_to_end(&mut content).context("failed to read standard input")?;
        return Ok(content);
    }
    std::fs::read(path).with_context(|| format!("failed to read {path}"))
}

/// The bytes of a message.
pub fn payload(argument: &str, encoding: Encoding) -> anyhow::Result<Vec<u8>> {
    let content = match argument.strip_prefix('@') {
        Some(path) => std::fs::read(path).with_context(|| format!("failed to read {path}"))?,
        None if argument == "-" => read(argument)?,
        None => argument.as_bytes().to_vec(),
    };
    decode(content, encoding)
}

fn decode(mut content: Vec<u8>, encoding: Encoding) -> anyhow::Result<Vec<u8>> {
    if encoding != Encoding::Plain {
        content.retain(|byte| !byte.is_ascii_whitespace());
    }
    match encoding {
        Encoding::Plain => Ok(content),
        Encoding::Base64 => BASE64_STANDARD.decode(content).context("failed to read the message as base64"),
        Encoding::Hex => {
            let digit = |byte: &u8| char::from(*byte).to_digit(16).and_then(|digit| u8::try_from(digit).ok());
            let pair = |pair: &[u8]| match pair {
                [high, low] => Some(digit(high)? << 4 | digit(low)?),
                _ => None,
            };
            match content.chunks(2).map(pair).collect() {
                Some(bytes) => Ok(bytes),
                None => bail!("failed to read the message: expected pairs of hexadecimal digits"),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_may_be_encoded() {
        for (text, encoding, expected) in [
            ("a1 63\n72", Encoding::Plain, Some(&b"a1 63\n72"[..])),
            ("a1 63\n7F", Encoding::Hex, Some(&b"\xa1c\x7f"[..])),
            ("a1f", Encoding::Hex, None),
            ("ü1", Encoding::Hex, None),
            ("oWM=\n", Encoding::Base64, Some(&b"\xa1c"[..])),
            ("oWM", Encoding::Base64, None),
        ] {
            assert_eq!(payload(text, encoding).ok().as_deref(), expected, "{text} {encoding:?}");
        }
        assert!(payload("@/nowhere/at/all", Encoding::Plain).is_err());
    }
}
