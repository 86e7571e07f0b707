//! The key of the digests in the status of Devices: pure.

use std::fmt;

use hmac::{Hmac, KeyInit, Mac};
use sha2::Sha256;

/// Bytes of a key: the output of SHA-256 (RFC 2104, section 3).
pub const KEY_BYTES: usize = 32;

/// The key of HMAC-SHA-256 with which the operator digests what a broker holds for a device. Without it, a person who may read Devices could
/// guess a password offline, because the salt of its hash follows from the uid of the Device.
#[derive(Clone, Eq, PartialEq)]
pub struct DigestKey([u8; KEY_BYTES]);

impl DigestKey {
    /// A key from a Secret; `None` if it has another length.
    #[must_use]
    pub fn given(bytes: &[u8]) -> Option<Self> {
        bytes.try_into().ok().map(Self)
    }

    /// The key itself, for its Secret.
    #[must_use]
    pub fn expose(&self) -> &[u8; KEY_BYTES] {
        &self.0
    }

    /// The first 16 hexadecimal digits of the digest.
    #[must_use]
    pub fn digest(&self, text: &str) -> Box<str> {
        // HMAC takes a key of any length.
        let Ok(mut mac) = Hmac::<Sha256>::new_from_slice(&self.0) else { return Box::default() };
        mac.update(text.as_bytes());
        let digest: [u8; 32] = mac.finalize().into_bytes().into();
        let first: [u8; 8] = std::array::from_fn(|index| digest[index]);
        format!("{:016x}", u64::from_be_bytes(first)).into()
    }
}

impl Default for DigestKey {
    /// A random key.
    fn default() -> Self {
        Self(rand::random())
    }
}

impl fmt::Debug for DigestKey {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("DigestKey(…)")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_digest_depends_on_key_and_text() {
        let key = DigestKey::given(&[0x0b; KEY_BYTES]).unwrap();
        assert_eq!(key.digest("text"), DigestKey::given(key.expose()).unwrap().digest("text"));
        assert_ne!(key.digest("text"), key.digest("another text"));
        assert_ne!(key.digest("text"), DigestKey::default().digest("text"));
        assert_eq!(key.digest("text").len(), 16);
        assert!(DigestKey::given(&[0; 31]).is_none() && DigestKey::given(&[]).is_none());
        assert!(!format!("{key:?}").contains("11"));
    }
}
