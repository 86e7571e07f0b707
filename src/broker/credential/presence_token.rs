//! The bearer token with which the operator reads `/presence` of an agent.
//!
//! Both sides derive it from the password hash of the operator's own broker user. The operator computes that hash from its Secret,
//! and the agent reads it from the shard. So there is no further Secret, and neither the password nor the hash crosses the network.

use std::fmt;

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use sha2::{Digest, Sha256};
use subtle::ConstantTimeEq;

use super::Entry;

/// Separates the token from any other digest of a password hash.
const DOMAIN: &[u8] = b"fleetwright.io/presence-token/v1";

/// A bearer token. Its Debug output does not show it.
#[derive(Clone, Eq, PartialEq)]
pub struct PresenceToken([u8; 32]);

impl PresenceToken {
    /// The token that belongs to a password hash.
    #[must_use]
    pub fn derive(password_hash: &str) -> Self {
        Self(Sha256::new().chain_update(DOMAIN).chain_update(password_hash).finalize().into())
    }

    /// The tokens of a user: of its password, and of its previous password while the broker accepts that.
    pub fn of(entry: &Entry) -> impl Iterator<Item = Self> {
        entry.password_hash().into_iter().chain(entry.previous_hash()).map(Self::derive)
    }

    /// The value of the header `Authorization`.
    #[must_use]
    pub fn authorization(&self) -> String {
        format!("Bearer {}", URL_SAFE_NO_PAD.encode(self.0))
    }

    /// Whether the value of a header `Authorization` carries this token. Takes the same time for every wrong token.
    #[must_use]
    pub fn matches(&self, authorization: &[u8]) -> bool {
        self.authorization().as_bytes().ct_eq(authorization).into()
    }
}

impl fmt::Debug for PresenceToken {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("PresenceToken(…)")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::broker::credential::{Password, hash};

    #[test]
    fn matches_only_the_token_of_the_same_hash() {
        let hash = |uid: &str| hash::hash(uid, "_operator", &Password::given(b"secret").unwrap(), 1);
        let token = PresenceToken::derive(&hash("a"));
        let header = token.authorization();
        assert!(token.matches(header.as_bytes()));
        assert!(PresenceToken::derive(&hash("a")).matches(header.as_bytes()));
        assert!(!PresenceToken::derive(&hash("b")).matches(header.as_bytes()));
        for wrong in ["", "Bearer ", "Bearer x", &header[7..], &header[..header.len() - 1], &format!("{header}A")] {
            assert!(!token.matches(wrong.as_bytes()), "{wrong:?}");
        }
        assert!(!header.contains("secret") && !format!("{token:?}").contains(&header[7..]));
    }

    #[test]
    fn a_previous_password_has_a_token_too() {
        let hash = |text: &[u8]| hash::hash("uid", "_operator", &Password::given(text).unwrap(), 1);
        let entry = Entry::new("_operator", &hash(b"new"), &[]).unwrap().with_previous(&hash(b"old")).unwrap();
        let tokens: Vec<PresenceToken> = PresenceToken::of(&entry).collect();
        assert_eq!(tokens, [PresenceToken::derive(&hash(b"new")), PresenceToken::derive(&hash(b"old"))]);
    }
}
