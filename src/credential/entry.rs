//! What a broker holds of one user.

use std::fmt;

use thiserror::Error;

use super::acl::{self, AclError};
use super::hash;
use crate::api::device::Acl;
use crate::api::name;

/// The longest user name: a Kubernetes name has up to 253 characters, and a worker's adds a prefix and an ordinal.
const MAX_USERNAME_BYTES: usize = 300;

/// One user of a broker: name, password hash and rules beyond the common ones. Made only of what keeps the broker's files whole.
#[derive(Clone, Eq, PartialEq)]
pub struct Entry {
    username: String,
    password_hash: String,
    /// Of the password before, which is accepted as well for a while.
    previous_hash: Option<String>,
    acls: Vec<String>,
}

/// Why something cannot be a user of a broker.
#[derive(Clone, Debug, Eq, Error, PartialEq)]
pub enum EntryError {
    /// A user name is also a client identifier, a level of topics, and part of a line of a file.
    #[error("user name {username:?} is not allowed: expected 1 to 300 of a-z, 0-9, `.`, `-` and `_`")]
    InvalidUsername {
        /// As given.
        username: String,
    },

    /// Not of the form that [`hash::hash`] gives.
    #[error("the password hash of user {username:?} is not one that Mosquitto reads: expected $7$<iterations>$<salt>$<hash>")]
    InvalidHash {
        /// Whose hash it is.
        username: String,
    },

    /// A rule that cannot stand in the broker's file.
    #[error("failed to grant a topic to user {username:?}")]
    GrantTopic {
        /// To whom.
        username: String,
        /// Why.
        #[source]
        source: AclError,
    },
}

impl Entry {
    /// A user with a hash from [`hash::hash`] and the rules beyond the common ones.
    ///
    /// # Errors
    /// When a part would break the broker's files.
    pub fn new(username: &str, password_hash: &str, acls: &[Acl]) -> Result<Self, EntryError> {
        let grant = |source| EntryError::GrantTopic { username: username.to_owned(), source };
        let lines = acls.iter().map(acl::line).collect::<Result<Vec<_>, _>>().map_err(grant)?;
        Self::from_lines(username, password_hash, lines)
    }

    /// As [`Entry::new`], from lines that [`acl::line`] wrote.
    pub(super) fn from_lines(username: &str, password_hash: &str, mut acls: Vec<String>) -> Result<Self, EntryError> {
        if !is_username(username) {
            return Err(EntryError::InvalidUsername { username: username.to_owned() });
        }
        if !hash::is_well_formed(password_hash) {
            return Err(EntryError::InvalidHash { username: username.to_owned() });
        }
        // Rules only ever add up, so that their order says nothing.
        acls.sort_unstable();
        acls.dedup();
        Ok(Self { username: username.to_owned(), password_hash: password_hash.to_owned(), previous_hash: None, acls })
    }

    /// The same user, who may also log in with the password that has this hash.
    ///
    /// # Errors
    /// When the hash is not of the form that [`hash::hash`] gives.
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

    /// As in Mosquitto's `password_file`.
    #[must_use]
    pub fn password_hash(&self) -> &str {
        &self.password_hash
    }

    /// Hash of the password before, where that is accepted too.
    #[must_use]
    pub fn previous_hash(&self) -> Option<&str> {
        self.previous_hash.as_deref()
    }

    /// Lines of Mosquitto's `acl_file`, beside the common patterns; sorted.
    #[must_use]
    pub fn acls(&self) -> &[String] {
        &self.acls
    }

    /// Digest of hashes and rules: tells whether a broker that proved to hold one entry holds this one.
    #[must_use]
    pub fn revision(&self) -> String {
        // A rule never looks like a hash, so that the two cannot be taken for each other.
        let parts = [&self.password_hash].into_iter().chain(&self.acls).chain(&self.previous_hash);
        name::revision(parts.map(String::as_bytes))
    }
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
    use crate::credential::Password;

    fn acl(topic: &str) -> Acl {
        Acl { topic: topic.to_owned(), access: Access::Write }
    }

    #[test]
    fn revision_follows_password_and_rules() {
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
    fn refuses_what_would_break_the_files() {
        let good = hash::hash("uid", "press-1", &Password::generate(), 1);
        for username in ["", "a b", "a:b", "a\nuser b", "a/b", "+", "Press", &"x".repeat(301)] {
            assert!(matches!(Entry::new(username, &good, &[]), Err(EntryError::InvalidUsername { .. })), "{username:?}");
        }
        assert!(matches!(Entry::new("press-1", "plain", &[]), Err(EntryError::InvalidHash { .. })));
        assert!(matches!(Entry::new("press-1", &good, &[acl("a\nb")]), Err(EntryError::GrantTopic { .. })));
        assert!(Entry::new("_ingest_vibration_0", &good, &[]).is_ok());
        assert!(Entry::new("press-1", &good, &[]).unwrap().with_previous("plain\npress-2:plain").is_err());
    }
}
