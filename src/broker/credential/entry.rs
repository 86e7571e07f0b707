//! A user of a broker.

use std::fmt;
use std::str::FromStr;

use sha2::{Digest, Sha256};
use thiserror::Error;

use super::acl::{self, AclError};
use super::hash;
use crate::api::device::Acl;
use crate::api::name;

/// The longest user name: a Kubernetes name has up to 253 characters, and a worker's adds a prefix and an ordinal.
const MAX_USERNAME_BYTES: usize = 300;

/// Maximum size of a user's access rules: the sum of their topics in bytes. The schema of Devices has the same limit, in characters. With
/// 64 rules of 256 characters a user would take up to 66 KB, and sixteen such users in a shard would exceed the size of a Secret.
pub const MAX_TOPICS_BYTES: usize = 8 << 10;

/// One user of a broker: name, credentials, and access rules beyond the common ones. All parts are validated, so that they cannot
/// corrupt the broker's files.
#[derive(Clone, Eq, PartialEq)]
pub struct Entry {
    username: String,
    password_hash: Option<String>,
    /// Digest of the public key of its certificates.
    certificate_key: Option<KeyDigest>,
    /// Hash of the previous password, which is also accepted for a while.
    previous_hash: Option<String>,
    acls: Vec<String>,
}

/// Why a user is invalid.
#[derive(Clone, Debug, Eq, Error, PartialEq)]
pub enum EntryError {
    /// A user name is also a client identifier, a level of topics, and part of a line of a file.
    #[error("user name {username:?} is not allowed: expected 1 to 300 of a-z, 0-9, `.`, `-` and `_`")]
    InvalidUsername {
        /// The given value.
        username: String,
    },

    /// A hash without the format of [`hash::hash`].
    #[error("the password hash of user {username:?} does not have Mosquitto's format: expected $7$<iterations>$<salt>$<hash>")]
    InvalidHash {
        /// The user.
        username: String,
    },

    /// Not the digest of a public key.
    #[error("the certificate key of user {username:?} is not a digest: expected 64 hexadecimal digits")]
    InvalidKey {
        /// The user.
        username: String,
    },

    /// Rules that take too much of the broker's file.
    #[error(
        "the topics of the access rules of user {username:?} have {bytes} bytes: expected at most {MAX_TOPICS_BYTES}; use wildcards, or shorter \
         topics"
    )]
    LongRules {
        /// The user.
        username: String,
        /// The sum of the topics in bytes.
        bytes: usize,
    },

    /// A rule that is invalid in the broker's file.
    #[error("failed to grant a topic to user {username:?}")]
    GrantTopic {
        /// The user.
        username: String,
        /// The cause.
        #[source]
        source: AclError,
    },
}

impl Entry {
    /// A user with a hash from [`hash::hash`] and the rules beyond the common ones.
    ///
    /// # Errors
    /// If a part would corrupt the broker's files.
    pub fn new(username: &str, password_hash: &str, acls: &[Acl]) -> Result<Self, EntryError> {
        Self::from_lines(username, Some(password_hash), lines(username, acls)?)
    }

    /// A user without a password, who authenticates with a certificate of this public key.
    ///
    /// # Errors
    /// If a part would corrupt the broker's files.
    pub fn by_certificate(username: &str, key: KeyDigest, acls: &[Acl]) -> Result<Self, EntryError> {
        Ok(Self::from_lines(username, None, lines(username, acls)?)?.with_certificate_key(key))
    }

    /// The same as [`Entry::new`], from lines of [`acl::line`].
    pub(super) fn from_lines(username: &str, password_hash: Option<&str>, mut acls: Vec<String>) -> Result<Self, EntryError> {
        if !is_username(username) {
            return Err(EntryError::InvalidUsername { username: username.to_owned() });
        }
        if password_hash.is_some_and(|hash| !hash::is_well_formed(hash)) {
            return Err(EntryError::InvalidHash { username: username.to_owned() });
        }
        // Rules only grant access, so their order does not matter.
        acls.sort_unstable();
        acls.dedup();
        let password_hash = password_hash.map(str::to_owned);
        Ok(Self { username: username.to_owned(), password_hash, certificate_key: None, previous_hash: None, acls })
    }

    /// The same user, who may also authenticate with a certificate of this public key.
    #[must_use]
    pub fn with_certificate_key(mut self, key: KeyDigest) -> Self {
        self.certificate_key = Some(key);
        self
    }

    /// The same user, who may also log in with the password that has this hash.
    ///
    /// # Errors
    /// If the hash does not have the format of [`hash::hash`].
    pub fn with_previous(mut self, previous_hash: &str) -> Result<Self, EntryError> {
        if !hash::is_well_formed(previous_hash) {
            return Err(EntryError::InvalidHash { username: self.username });
        }
        self.previous_hash = Some(previous_hash.to_owned());
        Ok(self)
    }

    /// MQTT user name and client identifier.
    #[must_use]
    pub fn username(&self) -> &str {
        &self.username
    }

    /// The hash in Mosquitto's `password_file`, if the user has a password.
    #[must_use]
    pub fn password_hash(&self) -> Option<&str> {
        self.password_hash.as_deref()
    }

    /// Digest of the public key of its certificates, if it may connect with these.
    #[must_use]
    pub fn certificate_key(&self) -> Option<KeyDigest> {
        self.certificate_key
    }

    /// Hash of the previous password, if that is accepted too.
    #[must_use]
    pub fn previous_hash(&self) -> Option<&str> {
        self.previous_hash.as_deref()
    }

    /// Lines of Mosquitto's `acl_file` beside the common patterns; sorted.
    #[must_use]
    pub fn acls(&self) -> &[String] {
        &self.acls
    }

    /// The size of its lines in the broker's files, in bytes.
    #[must_use]
    pub fn bytes(&self) -> usize {
        let hashes = [self.password_hash.as_deref(), self.previous_hash.as_deref()].map(|hash| hash.map_or(0, str::len));
        let key = self.certificate_key.map_or(0, |_| KeyDigest::DIGITS);
        let rules: usize = self.acls.iter().map(|line| line.len() + "\n".len()).sum();
        // Each of up to four lines begins with the name and a separator, and ends with a line break.
        hashes.iter().sum::<usize>() + key + rules + 4 * (self.username.len() + "user \n".len())
    }

    /// Digest of hashes and rules: equal revisions mean that a broker that has loaded one entry has loaded the other.
    #[must_use]
    pub fn revision(&self) -> String {
        // The formats of the four differ, so that one cannot be mistaken for another.
        let key = self.certificate_key.map(|key| key.to_string());
        let parts = self.password_hash.iter().chain(&self.acls).chain(&self.previous_hash).chain(&key);
        name::revision(parts.map(String::as_bytes))
    }
}

/// SHA-256 of a public key (its `SubjectPublicKeyInfo`, DER). The broker accepts only certificates of this key for a user. A renewed
/// certificate of the same key therefore needs no change, and a certificate of another key is refused, even from a trusted authority.
#[derive(Clone, Copy, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct KeyDigest([u8; 32]);

impl KeyDigest {
    /// Number of hexadecimal digits.
    const DIGITS: usize = 64;

    /// The digest of a public key.
    #[must_use]
    pub fn of(subject_public_key_info: &[u8]) -> Self {
        Self(Sha256::digest(subject_public_key_info).into())
    }
}

impl fmt::Display for KeyDigest {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(formatter, "{byte:02x}"))
    }
}

impl fmt::Debug for KeyDigest {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "KeyDigest({self})")
    }
}

impl FromStr for KeyDigest {
    type Err = ();

    /// Accepts only the format of `Display`, because the digest becomes a line of a file.
    fn from_str(text: &str) -> Result<Self, ()> {
        let digit = |byte: u8| matches!(byte, b'0'..=b'9' | b'a'..=b'f').then(|| char::from(byte).to_digit(16)).flatten();
        let mut digest = [0; 32];
        let (pairs, rest) = text.as_bytes().as_chunks::<2>();
        if pairs.len() != digest.len() || !rest.is_empty() {
            return Err(());
        }
        for (byte, [high, low]) in digest.iter_mut().zip(pairs) {
            let value = (digit(*high).ok_or(())? << 4) | digit(*low).ok_or(())?;
            *byte = u8::try_from(value).map_err(|_| ())?;
        }
        Ok(Self(digest))
    }
}

/// The lines of these rules, each valid, in all not too long.
fn lines(username: &str, acls: &[Acl]) -> Result<Vec<String>, EntryError> {
    let bytes = acls.iter().map(|acl| acl.topic.len()).sum();
    if bytes > MAX_TOPICS_BYTES {
        return Err(EntryError::LongRules { username: username.to_owned(), bytes });
    }
    let grant = |source| EntryError::GrantTopic { username: username.to_owned(), source };
    acls.iter().map(acl::line).collect::<Result<Vec<_>, _>>().map_err(grant)
}

fn is_username(text: &str) -> bool {
    (1..=MAX_USERNAME_BYTES).contains(&text.len())
        && text.bytes().all(|byte| matches!(byte, b'a'..=b'z' | b'0'..=b'9' | b'.' | b'-' | b'_'))
}

impl fmt::Debug for Entry {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("Entry").field("username", &self.username).field("acls", &self.acls).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::device::Access;
    use crate::broker::credential::Password;

    fn acl(topic: &str) -> Acl {
        Acl { topic: topic.to_owned(), access: Access::Write }
    }

    #[test]
    fn the_revision_depends_on_password_and_rules() {
        let first = hash::hash("uid", "press-1", &Password::generate(), 1);
        let second = hash::hash("uid", "press-1", &Password::generate(), 1);
        let revision = |hash: &str, acls: &[Acl]| Entry::new("press-1", hash, acls).unwrap().revision();
        let reference = revision(&first, &[acl("a"), acl("b")]);
        assert_eq!(reference, revision(&first, &[acl("b"), acl("a"), acl("b")]));
        assert_ne!(reference, revision(&second, &[acl("a"), acl("b")]));
        assert_ne!(reference, revision(&first, &[acl("a")]));
        let rotated = Entry::new("press-1", &first, &[acl("a"), acl("b")]).unwrap().with_previous(&second).unwrap();
        assert_ne!(reference, rotated.revision());
    }

    #[test]
    fn the_digest_of_a_key_is_read_as_it_is_written() {
        let digest = KeyDigest::of(b"key");
        let text = digest.to_string();
        assert_eq!(text.parse(), Ok(digest));
        for bad in ["", "ab", &text.to_uppercase(), &format!("{text}0"), &text[1..], &text.replace(char::is_numeric, "ä")] {
            assert_eq!(bad.parse::<KeyDigest>(), Err(()), "{bad:?}");
        }
        let by_key = |key: &[u8]| Entry::by_certificate("press-1", KeyDigest::of(key), &[acl("a")]).unwrap().revision();
        assert_ne!(by_key(b"one"), by_key(b"another"));
    }

    #[test]
    fn values_that_would_corrupt_the_files_are_refused() {
        let good = hash::hash("uid", "press-1", &Password::generate(), 1);
        for username in ["", "a b", "a:b", "a\nuser b", "a/b", "+", "Press", &"x".repeat(301)] {
            assert!(matches!(Entry::new(username, &good, &[]), Err(EntryError::InvalidUsername { .. })), "{username:?}");
        }
        assert!(matches!(Entry::new("press-1", "plain", &[]), Err(EntryError::InvalidHash { .. })));
        assert!(matches!(Entry::new("press-1", &good, &[acl("a\nb")]), Err(EntryError::GrantTopic { .. })));
        // 32 topics of 256 bytes are the limit.
        let long = |count: usize| (0..count).map(|number| acl(&format!("{number:0>256}"))).collect::<Vec<_>>();
        assert!(Entry::new("press-1", &good, &long(32)).is_ok());
        for refused in [Entry::new("press-1", &good, &long(33)), Entry::by_certificate("press-1", KeyDigest::of(b"key"), &long(33))] {
            assert!(matches!(refused, Err(EntryError::LongRules { bytes: 8448, .. })), "{refused:?}");
        }
        assert!(Entry::new("_ingest_vibration_0", &good, &[]).is_ok());
        assert!(Entry::new("press-1", &good, &[]).unwrap().with_previous("plain\npress-2:plain").is_err());
    }
}
