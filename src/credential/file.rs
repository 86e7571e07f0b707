//! The files that a broker reads: users of all shards, and the agent's own.

use super::acl::PATTERNS;
use super::entry::{Entry, EntryError};
use super::{Password, hash, shard};
use crate::api::name::CANARY_USERNAME;

/// What the agent itself may read: the broker's counters.
const CANARY_ACL: &str = "topic read $SYS/#";

/// The content of Mosquitto's `password_file` and `acl_file`.
#[derive(Clone, Eq, PartialEq)]
pub struct BrokerFiles {
    /// `password_file`
    pub passwords: String,

    /// `acl_file`
    pub acls: String,
}

impl BrokerFiles {
    /// The files with these users and the agent's canary.
    ///
    /// The canary's password must be fresh for each content: a broker that accepts it has read exactly this.
    ///
    /// # Errors
    /// Never for a generated password.
    pub fn new<'a>(users: impl IntoIterator<Item = &'a Entry>, canary: &Password) -> Result<Self, EntryError> {
        // Alone of its name, and gone with the next generation: nothing to salt against.
        let hash = hash::hash("", CANARY_USERNAME, canary, hash::GENERATED_ITERATIONS);
        let canary = Entry::from_lines(CANARY_USERNAME, &hash, vec![CANARY_ACL.to_owned()])?;
        let users = users.into_iter().filter(|entry| entry.username() != CANARY_USERNAME);
        let (mut passwords, mut acls) = shard::render_entries([&canary]);
        let (their_passwords, their_acls) = shard::render_entries(users);
        passwords.push_str(&their_passwords);
        acls.push_str(&their_acls);
        // A file without a user still needs the patterns; they stand first so that a reader sees what holds for all.
        Ok(Self { passwords, acls: format!("{}\n{acls}", PATTERNS.join("\n")) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::device::{Access, Acl};

    #[test]
    fn users_and_canary() {
        let hash = hash::hash("uid", "press-1", &Password::generate(), 1);
        let acl = Acl { topic: "plant/#".to_owned(), access: Access::Read };
        let entries = [
            Entry::new("press-1", &hash, std::slice::from_ref(&acl)).unwrap(),
            Entry::new("press-2", &hash, &[]).unwrap(),
            // A Secret that someone else wrote must not become the canary.
            Entry::new(CANARY_USERNAME, &hash, &[acl]).unwrap(),
        ];
        let files = BrokerFiles::new(&entries, &Password::generate()).unwrap();
        let users: Vec<&str> = files.passwords.lines().map(|line| line.split(':').next().unwrap()).collect();
        assert_eq!(users, ["_agent", "press-1", "press-2"]);
        let rules: Vec<&str> = files.acls.lines().skip(PATTERNS.len()).collect();
        assert_eq!(rules, ["user _agent", "topic read $SYS/#", "user press-1", "topic read plant/#"]);
    }
}
