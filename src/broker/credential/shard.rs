//! Shards: all users of a Gateway, spread over Secrets, so that one change writes one Secret of some 64 KiB.
//!
//! A user belongs to the shard that [`shard_of`] says under the number of shards that shard 0 declares, and counts only
//! there. Every shard also says under which number it was written. When the number changes, the operator writes in the order
//! of [`write_order`] and only then deletes what is left over; then a reader that follows [`assemble`] misses no user at any
//! moment, in whatever order it hears of the writes.

use std::borrow::Borrow;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;

use k8s_openapi::ByteString;
use sha2::{Digest, Sha256};
use thiserror::Error;

use super::acl;
use super::entry::{Entry, EntryError};
use crate::api::name::{self, MAX_SHARDS};

/// Key of a shard's Secret: lines of Mosquitto's `password_file`, sorted by user.
pub const PASSWORDS_KEY: &str = "passwords";

/// Key of a shard's Secret: as [`PASSWORDS_KEY`], the passwords of some of its users that are accepted besides those; not there
/// where there are none.
pub const PREVIOUS_PASSWORDS_KEY: &str = "previous-passwords";

/// Key of a shard's Secret: lines `user:digest` of the public keys of those of its users that may connect by certificate; not there
/// where there are none.
pub const CERTIFICATE_KEYS_KEY: &str = "certificate-keys";

/// Keys that are not there where no user of the shard has such.
pub const OPTIONAL_KEYS: [&str; 2] = [PREVIOUS_PASSWORDS_KEY, CERTIFICATE_KEYS_KEY];

/// Key of a shard's Secret: blocks of Mosquitto's `acl_file`, sorted by user.
pub const ACLS_KEY: &str = "acls";

/// Key of a shard's Secret: the number of shards under which it was written.
pub const COUNT_KEY: &str = "shards";

/// With more users a shard on average, the number of shards doubles.
const GROW_ABOVE: usize = 512;

/// With fewer users a shard on average, it halves. A quarter of the other, so that a few users more or less never undo a step.
const SHRINK_BELOW: usize = 128;

/// The data of a shard's Secret.
pub type Data = BTreeMap<String, ByteString>;

/// The shard of a user when there are `count` (a power of two). Depends on nothing else, and spreads evenly.
#[must_use]
pub fn shard_of(username: &str, count: usize) -> usize {
    let digest: [u8; 32] = Sha256::digest(username.as_bytes()).into();
    // A doubling adds one bit: each shard keeps half of its users, and the rest go to one new shard.
    usize::from(digest[0]) % count.clamp(1, MAX_SHARDS)
}

/// How many shards `users` should have where there are `current` now (0: none yet): a power of two up to [`MAX_SHARDS`].
#[must_use]
pub fn shard_count(users: usize, current: usize) -> usize {
    let mut count = current.clamp(1, MAX_SHARDS).next_power_of_two();
    while count < MAX_SHARDS && users > count * GROW_ABOVE {
        count *= 2;
    }
    while count > 1 && users < count * SHRINK_BELOW {
        count /= 2;
    }
    count
}

/// In which order to write the shards when their number changes. Growing: the new ones, shard 0, then those that lose users.
/// Shrinking: those that gain users, then shard 0; the surplus is deleted after all of these.
#[must_use]
pub fn write_order(current: usize, wanted: usize) -> Vec<usize> {
    let wanted = wanted.max(1);
    (current.clamp(1, wanted)..wanted)
        .chain((1..wanted).filter(|_| wanted <= current))
        .chain(std::iter::once(0))
        .chain((1..current).filter(|_| wanted > current))
        .collect()
}

/// One shard: its users by name, and the number of shards it was written under.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Shard {
    count: usize,
    entries: BTreeMap<String, Entry>,
}

/// Why the data of a Secret is no shard.
#[derive(Debug, Error)]
pub enum ShardError {
    /// A key that every shard has.
    #[error("key {key:?} is missing")]
    MissingKey {
        /// Which.
        key: &'static str,
    },

    /// A value that is not text.
    #[error("key {key:?} is not UTF-8")]
    NotText {
        /// Which.
        key: &'static str,
    },

    /// Neither 1, 2, 4, … nor within bounds.
    #[error("key \"shards\" holds {found:?}: expected a power of two from 1 to {MAX_SHARDS}")]
    InvalidCount {
        /// As found, cut short.
        found: String,
    },

    /// A line that [`Shard::render`] does not write. The line itself is not shown: it may hold a hash.
    #[error("line {line} of key {key:?} is not what the operator writes")]
    UnknownLine {
        /// Where.
        key: &'static str,
        /// Number of the line, from 1.
        line: usize,
    },

    /// An entry that would break the broker's files.
    #[error("failed to read the entry of a user")]
    ReadEntry(#[from] EntryError),
}

/// A reader has not heard enough yet: what it has so far may miss users.
#[derive(Clone, Copy, Debug, Eq, Error, PartialEq)]
#[error("shard {shard} is not there, or not yet as shard 0 says")]
pub struct Incomplete {
    /// The one to read again.
    pub shard: usize,
}

impl Shard {
    /// A shard of these users, under this number of shards.
    pub fn new(count: usize, entries: impl IntoIterator<Item = Entry>) -> Self {
        Self { count, entries: entries.into_iter().map(|entry| (entry.username().to_owned(), entry)).collect() }
    }

    /// All shards of these users, each user in exactly one.
    #[must_use]
    pub fn divide(count: usize, entries: impl IntoIterator<Item = Entry>) -> Vec<Self> {
        let count = count.clamp(1, MAX_SHARDS);
        let mut shards = vec![Self::new(count, []); count];
        for entry in entries {
            let username = entry.username().to_owned();
            shards[shard_of(&username, count)].entries.insert(username, entry);
        }
        shards
    }

    /// The number of shards that it was written under.
    #[must_use]
    pub const fn count(&self) -> usize {
        self.count
    }

    /// Its users by name.
    #[must_use]
    pub const fn entries(&self) -> &BTreeMap<String, Entry> {
        &self.entries
    }

    /// The data of its Secret: the same users give the same bytes.
    #[must_use]
    pub fn render(&self) -> Data {
        let mut rendered = Rendered::default();
        self.entries.values().for_each(|entry| rendered.push(entry));
        let Rendered { passwords, previous_passwords, certificate_keys, acls } = rendered;
        let some = [(PREVIOUS_PASSWORDS_KEY, previous_passwords), (CERTIFICATE_KEYS_KEY, certificate_keys)];
        [(PASSWORDS_KEY, passwords), (ACLS_KEY, acls), (COUNT_KEY, self.count.to_string())]
            .into_iter()
            .chain(some.into_iter().filter(|(_, text)| !text.is_empty()))
            .map(|(key, text)| (key.to_owned(), ByteString(text.into_bytes())))
            .collect()
    }

    /// The shard that [`Shard::render`] wrote.
    ///
    /// # Errors
    /// When the data is anything else: it came from elsewhere, and the broker must not get it.
    pub fn parse(data: &Data) -> Result<Self, ShardError> {
        let count = parse_count(text(data, COUNT_KEY)?)?;
        let mut acls = parse_acls(text(data, ACLS_KEY)?)?;
        let optional = |key| if data.contains_key(key) { parse_lines(data, key) } else { Ok(BTreeMap::new()) };
        let mut previous = optional(PREVIOUS_PASSWORDS_KEY)?;
        let mut certificate_keys = optional(CERTIFICATE_KEYS_KEY)?;
        let mut passwords = parse_lines(data, PASSWORDS_KEY)?;
        let users: BTreeSet<&str> = passwords.keys().chain(certificate_keys.keys()).copied().collect();
        let mut entries = BTreeMap::new();
        for username in users {
            let mut entry = Entry::from_lines(username, passwords.remove(username), acls.remove(username).unwrap_or_default())?;
            if let Some(key) = certificate_keys.remove(username) {
                let key = key.parse().map_err(|()| EntryError::InvalidKey { username: username.to_owned() })?;
                entry = entry.with_certificate_key(key);
            }
            if let Some(previous) = previous.remove(username) {
                entry = entry.with_previous(previous)?;
            }
            entries.insert(username.to_owned(), entry);
        }
        // Rules, or previous passwords, of a user that has no other way in.
        for (key, left_over) in [(ACLS_KEY, !acls.is_empty()), (PREVIOUS_PASSWORDS_KEY, !previous.is_empty())] {
            if left_over {
                return Err(ShardError::UnknownLine { key, line: 1 });
            }
        }
        Ok(Self { count, entries })
    }
}

/// Lines of password files and of a file of keys, and blocks of an access control file.
#[derive(Debug, Default)]
pub(super) struct Rendered {
    pub passwords: String,
    pub previous_passwords: String,
    pub certificate_keys: String,
    pub acls: String,
}

impl Rendered {
    pub fn push(&mut self, entry: &Entry) {
        // Writing to a String cannot fail.
        if let Some(hash) = entry.password_hash() {
            let _ = writeln!(self.passwords, "{}:{hash}", entry.username());
        }
        if let Some(key) = entry.certificate_key() {
            let _ = writeln!(self.certificate_keys, "{}:{key}", entry.username());
        }
        if let Some(previous) = entry.previous_hash() {
            let _ = writeln!(self.previous_passwords, "{}:{previous}", entry.username());
        }
        if !entry.acls().is_empty() {
            let _ = writeln!(self.acls, "user {}\n{}", entry.username(), entry.acls().join("\n"));
        }
    }
}

/// The revision of a shard's data: what an agent reports once its broker has proven to hold it.
#[must_use]
pub fn revision(data: &Data) -> String {
    const NOTHING: &ByteString = &ByteString(Vec::new());
    let keys = [PASSWORDS_KEY, PREVIOUS_PASSWORDS_KEY, CERTIFICATE_KEYS_KEY, ACLS_KEY, COUNT_KEY];
    name::revision(keys.map(|key| data.get(key).unwrap_or(NOTHING).0.as_slice()))
}

/// The number of shards that shard 0 declares, where its data says one.
#[must_use]
pub fn declared_count(data: &Data) -> Option<usize> {
    text(data, COUNT_KEY).and_then(parse_count).ok()
}

/// All users of these shards (by number), by name.
///
/// # Errors
/// When a shard is missing, or older or newer than shard 0 in a way that could miss a user.
pub fn assemble<S: Borrow<Shard>>(shards: &BTreeMap<usize, S>) -> Result<BTreeMap<&str, &Entry>, Incomplete> {
    let count = shards.get(&0).ok_or(Incomplete { shard: 0 })?.borrow().count;
    let mut users = BTreeMap::new();
    for number in 0..count {
        // Written under a larger number than shard 0: either it has already lost users to shards that are not followed yet, or it
        // has not yet got those of shards that are no longer followed. Under a smaller number it has more users than count.
        let shard = shards.get(&number).map(Borrow::borrow).filter(|shard| shard.count <= count).ok_or(Incomplete { shard: number })?;
        users.extend(
            shard
                .entries
                .iter()
                .filter(|(username, _)| shard_of(username, count) == number)
                .map(|(username, entry)| (username.as_str(), entry)),
        );
    }
    Ok(users)
}

fn text<'a>(data: &'a Data, key: &'static str) -> Result<&'a str, ShardError> {
    let bytes = data.get(key).ok_or(ShardError::MissingKey { key })?;
    std::str::from_utf8(&bytes.0).map_err(|_| ShardError::NotText { key })
}

fn parse_count(text: &str) -> Result<usize, ShardError> {
    let count = text.parse().ok().filter(|count: &usize| count.is_power_of_two() && *count <= MAX_SHARDS);
    count.ok_or_else(|| ShardError::InvalidCount { found: text.chars().take(16).collect() })
}

/// What stands behind each user's name, each user once.
fn parse_lines<'a>(data: &'a Data, key: &'static str) -> Result<BTreeMap<&'a str, &'a str>, ShardError> {
    let mut values = BTreeMap::new();
    for (index, line) in text(data, key)?.lines().enumerate() {
        let known = line.split_once(':').filter(|(username, value)| values.insert(*username, *value).is_none());
        known.ok_or(ShardError::UnknownLine { key, line: index + 1 })?;
    }
    Ok(values)
}

fn parse_acls(text: &str) -> Result<BTreeMap<&str, Vec<String>>, ShardError> {
    let mut acls: BTreeMap<&str, Vec<String>> = BTreeMap::new();
    let mut user = None;
    for (index, line) in text.lines().enumerate() {
        match (line.strip_prefix("user "), user) {
            (Some(username), _) if !acls.contains_key(username) => user = Some(username),
            (None, Some(username)) if acl::is_line(line) => acls.entry(username).or_default().push(line.to_owned()),
            _ => return Err(ShardError::UnknownLine { key: ACLS_KEY, line: index + 1 }),
        }
    }
    Ok(acls)
}

#[cfg(test)]
#[path = "shard_tests.rs"]
mod tests;
