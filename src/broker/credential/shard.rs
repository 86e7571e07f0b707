//! Shards: the users of a Gateway, distributed over Secrets, so that one change writes one Secret of about 64 KiB.
//!
//! Shard 0 declares the number of shards. [`shard_of`] maps a user to its shard for this number, and the user is valid only in that
//! shard. Every shard also contains the number under which it was written. When the number changes, the operator writes in the order
//! of [`write_order`] and then deletes surplus shards. A reader that uses [`assemble`] therefore never misses a user, in whatever
//! order it receives the writes.

use std::borrow::Borrow;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;

use k8s_openapi::ByteString;
use sha2::{Digest, Sha256};
use thiserror::Error;

use super::acl;
use super::entry::{Entry, EntryError};
use crate::api::name::{self, MAX_SHARDS, SYSTEM_USERNAME_PREFIX};

/// Key of a shard's Secret: lines of Mosquitto's `password_file`, sorted by user.
pub const PASSWORDS_KEY: &str = "passwords";

/// Key of a shard's Secret: in the format of [`PASSWORDS_KEY`], the passwords of some users that are also accepted; absent if no
/// user has one.
pub const PREVIOUS_PASSWORDS_KEY: &str = "previous-passwords";

/// Key of a shard's Secret: lines `user:digest` of the public keys of the users that may connect with a certificate; absent if no user
/// may.
pub const CERTIFICATE_KEYS_KEY: &str = "certificate-keys";

/// Keys that are absent if no user of the shard has a value.
pub const OPTIONAL_KEYS: [&str; 2] = [PREVIOUS_PASSWORDS_KEY, CERTIFICATE_KEYS_KEY];

/// Key of a shard's Secret: blocks of Mosquitto's `acl_file`, sorted by user.
pub const ACLS_KEY: &str = "acls";

/// Key of a shard's Secret: the number of shards under which it was written.
pub const COUNT_KEY: &str = "shards";

/// The number of shards doubles above this average number of users per shard.
const GROW_ABOVE: usize = 512;

/// The number of shards halves below this average. It is a quarter of the maximum, so that a few users more or less never undo a step.
const SHRINK_BELOW: usize = 128;

/// The number of shards also doubles above this average size of a shard, in bytes. It is a quarter of [`MAX_SHARD_BYTES`], because hashing
/// distributes users of different sizes unevenly.
const GROW_ABOVE_BYTES: usize = MAX_SHARD_BYTES / 4;

/// The number of shards halves only below this average size, a quarter of the maximum.
const SHRINK_BELOW_BYTES: usize = GROW_ABOVE_BYTES / 4;

/// Maximum size of a shard, in bytes. The API server accepts 1 MiB of data in a Secret (`MaxSecretSize` of Kubernetes).
pub const MAX_SHARD_BYTES: usize = 1_000_000;

/// The data of a shard's Secret.
pub type Data = BTreeMap<String, ByteString>;

/// The shard of a user among `count` shards (a power of two). Depends only on its arguments, and distributes evenly.
#[must_use]
pub fn shard_of(username: &str, count: usize) -> usize {
    let digest: [u8; 32] = Sha256::digest(username.as_bytes()).into();
    // A doubling adds one bit: each shard keeps half of its users, and the rest go to one new shard.
    usize::from(digest[0]) % count.clamp(1, MAX_SHARDS)
}

/// The wanted number of shards for `users` with this number of `bytes` in all, with `current` shards now (0: none yet): a power of two up
/// to [`MAX_SHARDS`].
#[must_use]
pub fn shard_count(users: usize, bytes: usize, current: usize) -> usize {
    let mut count = current.clamp(1, MAX_SHARDS).next_power_of_two();
    while count < MAX_SHARDS && (users > count * GROW_ABOVE || bytes > count * GROW_ABOVE_BYTES) {
        count *= 2;
    }
    while count > 1 && users < count * SHRINK_BELOW && bytes < count * SHRINK_BELOW_BYTES {
        count /= 2;
    }
    count
}

/// The order in which to write the shards when their number changes. Growing: the new shards, shard 0, then the shards that lose users.
/// Shrinking: the shards that gain users, then shard 0. Surplus shards are deleted afterwards.
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

/// Why the data of a Secret is not a shard.
#[derive(Debug, Error)]
pub enum ShardError {
    /// A required key is missing.
    #[error("key {key:?} is missing")]
    MissingKey {
        /// The key.
        key: &'static str,
    },

    /// A value that is not UTF-8.
    #[error("key {key:?} is not UTF-8")]
    NotText {
        /// The key.
        key: &'static str,
    },

    /// A number of shards that is not a power of two within bounds.
    #[error("key \"shards\" holds {found:?}: expected a power of two from 1 to {MAX_SHARDS}")]
    InvalidCount {
        /// The value, shortened.
        found: String,
    },

    /// A line that [`Shard::render`] does not write. The error does not show the line, which may contain a hash.
    #[error("line {line} of key {key:?} does not have the format that the operator writes")]
    UnknownLine {
        /// The key.
        key: &'static str,
        /// Number of the line, from 1.
        line: usize,
    },

    /// An entry that would corrupt the broker's files.
    #[error("failed to read the entry of a user")]
    ReadEntry(#[from] EntryError),
}

/// The known shards are incomplete: users may be missing.
#[derive(Clone, Copy, Debug, Eq, Error, PartialEq)]
#[error("shard {shard} does not exist, or does not match shard 0 yet")]
pub struct Incomplete {
    /// The shard to read again.
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

    /// Removes the largest users until the shard is small enough for a Secret, and returns their names. The others keep their credentials. It
    /// never removes workers and the operator.
    pub fn take_excess(&mut self) -> Vec<String> {
        let mut bytes: usize = self.entries.values().map(Entry::bytes).sum();
        if bytes <= MAX_SHARD_BYTES {
            return Vec::new();
        }
        let devices = self.entries.values().filter(|entry| !entry.username().starts_with(SYSTEM_USERNAME_PREFIX));
        let mut devices: Vec<(usize, String)> = devices.map(|entry| (entry.bytes(), entry.username().to_owned())).collect();
        devices.sort_unstable();
        let mut excess = Vec::new();
        while bytes > MAX_SHARD_BYTES
            && let Some((size, device)) = devices.pop()
        {
            self.entries.remove(&device);
            bytes -= size;
            excess.push(device);
        }
        excess
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
    /// If the data is in another format: another writer changed it, and the broker must not get it.
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
        // Rules or previous passwords of a user without a password or key.
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

/// The revision of a shard's data, which an agent reports after its broker has loaded it.
#[must_use]
pub fn revision(data: &Data) -> String {
    const NOTHING: &ByteString = &ByteString(Vec::new());
    let keys = [PASSWORDS_KEY, PREVIOUS_PASSWORDS_KEY, CERTIFICATE_KEYS_KEY, ACLS_KEY, COUNT_KEY];
    name::revision(keys.map(|key| data.get(key).unwrap_or(NOTHING).0.as_slice()))
}

/// The number of shards that shard 0 declares, if its data contains a valid one.
#[must_use]
pub fn declared_count(data: &Data) -> Option<usize> {
    text(data, COUNT_KEY).and_then(parse_count).ok()
}

/// All users of these shards (by number), by name.
///
/// # Errors
/// If a shard is missing, or so much older or newer than shard 0 that a user could be missing.
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

/// The value after each user's name, each user once.
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
