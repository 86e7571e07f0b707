//! Passwords: generated ones, and those that people give.

use std::fmt;

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use thiserror::Error;

/// The longest password in bytes. MQTT carries up to 65,535 (MQTT 5.0 section 3.1.3.6); nobody needs more than this, and
/// what is far longer is a wrong file.
pub const MAX_BYTES: usize = 1024;

/// Random bytes of a generated password.
const GENERATED_BYTES: usize = 32;

/// A password that a broker and its clients can use. Its Debug output does not show it.
#[derive(Clone, Eq, PartialEq)]
pub struct Password(String);

/// Why a given password cannot be used.
#[derive(Clone, Debug, Eq, Error, PartialEq)]
pub enum PasswordError {
    /// Nothing in it.
    #[error("the password is empty: 1 to {MAX_BYTES} bytes are expected")]
    Empty,

    /// Above [`MAX_BYTES`].
    #[error("the password has {bytes} bytes: 1 to {MAX_BYTES} are expected; is this the right key of the Secret?")]
    TooLong {
        /// Its length.
        bytes: usize,
    },

    /// Not text.
    #[error("the password is not UTF-8 (first at byte {position}): encode it as text, for instance in base64 or hexadecimal")]
    NotText {
        /// Offset of the first byte that is not, from 0.
        position: usize,
    },

    /// The classic slip: a file that was written by `echo` or an editor.
    #[error(
        "the password ends with a line break: write the Secret without it, for instance with `printf %s` or `kubectl create secret generic --from-literal`"
    )]
    TrailingLineBreak,

    /// Devices and shells disagree on these.
    #[error("the password has a control character at byte {position}: only printable characters are expected")]
    ControlCharacter {
        /// Offset, from 0.
        position: usize,
    },
}

impl Password {
    /// A fresh password of 256 random bits: 43 characters of URL-safe base64, which needs quoting nowhere.
    #[must_use]
    pub fn generate() -> Self {
        let bytes: [u8; GENERATED_BYTES] = rand::random();
        Self(URL_SAFE_NO_PAD.encode(bytes))
    }

    /// A password that someone gave.
    ///
    /// # Errors
    /// When it is empty, longer than [`MAX_BYTES`], not UTF-8, or has control characters.
    pub fn given(bytes: &[u8]) -> Result<Self, PasswordError> {
        if bytes.is_empty() {
            return Err(PasswordError::Empty);
        }
        if bytes.len() > MAX_BYTES {
            return Err(PasswordError::TooLong { bytes: bytes.len() });
        }
        let text = std::str::from_utf8(bytes).map_err(|error| PasswordError::NotText { position: error.valid_up_to() })?;
        let printable = text.strip_suffix('\n').map_or(text, |line| line.strip_suffix('\r').unwrap_or(line));
        match (printable.find(char::is_control), printable.len() == text.len()) {
            (Some(position), _) => Err(PasswordError::ControlCharacter { position }),
            (None, false) => Err(PasswordError::TrailingLineBreak),
            (None, true) => Ok(Self(text.to_owned())),
        }
    }

    /// The password itself, for the Secret of its owner and for a login. Never for a log.
    #[must_use]
    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Password {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("Password(…)")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn generated_passwords_differ_and_are_valid() {
        let (first, second) = (Password::generate(), Password::generate());
        assert_ne!(first, second);
        assert_eq!(URL_SAFE_NO_PAD.decode(first.expose()).unwrap().len(), GENERATED_BYTES);
        assert_eq!(Password::given(first.expose().as_bytes()), Ok(first));
    }

    #[test]
    fn given_passwords() {
        use PasswordError::*;
        for (bytes, expected) in [
            ("p".as_bytes(), None),
            ("with space, ümläut : $7$ \u{1F512}".as_bytes(), None),
            (&[b'x'; MAX_BYTES], None),
            (b"", Some(Empty)),
            (&[b'x'; MAX_BYTES + 1], Some(TooLong { bytes: MAX_BYTES + 1 })),
            (b"ab\xff", Some(NotText { position: 2 })),
            (b"secret\n", Some(TrailingLineBreak)),
            (b"secret\r\n", Some(TrailingLineBreak)),
            (b"\n", Some(TrailingLineBreak)),
            (b"two\nlines", Some(ControlCharacter { position: 3 })),
            (b"two\nlines\n", Some(ControlCharacter { position: 3 })),
            (b"nul\0", Some(ControlCharacter { position: 3 })),
            ("c1\u{85}".as_bytes(), Some(ControlCharacter { position: 2 })),
        ] {
            assert_eq!(Password::given(bytes).err(), expected, "{bytes:?}");
        }
    }

    #[test]
    fn debug_output_hides_it() {
        let password = Password::generate();
        assert!(!format!("{password:?}").contains(password.expose()));
    }
}
