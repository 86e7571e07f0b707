//! The files that a broker reads: the users of all shards, and the agent's own user.

use super::acl::PATTERNS;
use super::entry::{Entry, EntryError};
use super::shard::Rendered;
use super::{Password, hash};
use crate::api::name::CANARY_USERNAME;

/// The topics that the agent may read: the broker's counters.
const CANARY_ACL: &str = "topic read $SYS/#";

/// The content of Mosquitto's `password_file` and `acl_file`, and of the files of our plugins.
#[derive(Clone, Eq, PartialEq)]
pub struct BrokerFiles {
    /// `password_file`
    pub passwords: String,

    /// File of the plugin `previous_password.so` of the broker's image: passwords that are also accepted.
    pub previous_passwords: String,

    /// File of the plugin `certificate.so` of the broker's image: the accepted public keys of each user.
    pub certificate_keys: String,

    /// `acl_file`
    pub acls: String,
}

impl BrokerFiles {
    /// The files with these users and the agent's canary.
    ///
    /// The canary's password must be new for each content: a broker that accepts it has read exactly this content.
    ///
    /// # Errors
    /// Never for a generated password.
    pub fn new<'a>(users: impl IntoIterator<Item = &'a Entry>, canary: &Password) -> Result<Self, EntryError> {
        // The canary's name is unique, and its password changes with the next generation: its hash needs no random salt.
        let hash = hash::hash("", CANARY_USERNAME, canary, hash::GENERATED_ITERATIONS);
        let canary = Entry::from_lines(CANARY_USERNAME, Some(&hash), vec![CANARY_ACL.to_owned()])?;
        let mut rendered = Rendered::default();
        rendered.push(&canary);
        users.into_iter().filter(|entry| entry.username() != CANARY_USERNAME).for_each(|entry| rendered.push(entry));
        let Rendered { passwords, previous_passwords, certificate_keys, acls } = rendered;
        // A file without a user still needs the patterns. They come first, because they apply to all users.
        Ok(Self { passwords, previous_passwords, certificate_keys, acls: format!("{}\n{acls}", PATTERNS.join("\n")) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::device::{Access, Acl};
    use crate::broker::credential::entry::KeyDigest;

    #[test]
    fn users_and_canary() {
        let hash = hash::hash("uid", "press-1", &Password::generate(), 1);
        let acl = Acl { topic: "plant/#".to_owned(), access: Access::Read };
        let entries = [
            Entry::new("press-1", &hash, std::slice::from_ref(&acl)).unwrap(),
            Entry::new("press-2", &hash, &[]).unwrap().with_previous(&hash).unwrap(),
            Entry::by_certificate("press-3", KeyDigest::of(b"key"), &[]).unwrap(),
            // A Secret from another writer must not replace the canary.
            Entry::new(CANARY_USERNAME, &hash, &[acl]).unwrap(),
        ];
        let files = BrokerFiles::new(&entries, &Password::generate()).unwrap();
        let users: Vec<&str> = files.passwords.lines().map(|line| line.split(':').next().unwrap()).collect();
        assert_eq!(users, ["_agent", "press-1", "press-2"]);
        assert_eq!(files.previous_passwords, format!("press-2:{hash}\n"));
        assert_eq!(files.certificate_keys, format!("press-3:{}\n", KeyDigest::of(b"key")));
        let rules: Vec<&str> = files.acls.lines().skip(PATTERNS.len()).collect();
        assert_eq!(rules, ["user _agent", "topic read $SYS/#", "user press-1", "topic read plant/#"]);
    }
}
