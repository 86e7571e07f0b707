//! Passwords, their hashes, keys of certificates, the shards that carry them to a broker, and the broker's files: all pure.
//!
//! The path of a credential: [`password`] (in the device's own Secret) -> [`hash`] -> [`entry`] (with its [`acl`]) ->
//! [`shard`] (a Secret with many entries, written by the operator) -> [`file`] (the agent's files for the broker).

pub mod acl;
pub mod entry;
pub mod file;
pub mod hash;
pub mod password;
pub mod presence_token;
pub mod shard;

pub use entry::{Entry, KeyDigest};
pub use password::Password;
pub use presence_token::PresenceToken;
pub use shard::Shard;
