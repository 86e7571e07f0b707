//! What an agent tells the operator of its broker's clients: a page at a time, each client once, in the order of their last
//! changes.
//!
//! `GET /presence?epoch=E&after=N` answers with the clients whose last change is later than number N of epoch E, at once where
//! there are any, else as soon as there are or after [`MAX_WAIT_SECONDS`]. Numbers of another epoch mean nothing: the
//! answer then begins with the first client, and who is not on any page is not connected.

use serde::{Deserialize, Serialize};

use super::refused::RefusedClient;

/// Path of the endpoint.
pub const PATH: &str = "/presence";

/// The longest that an answer is held back for news.
pub const MAX_WAIT_SECONDS: u64 = 20;

/// The most clients of a page: with names of the usual length some 150 KiB.
pub const MAX_PAGE_CLIENTS: usize = 4_096;

/// The most bytes that a page can have: [`MAX_PAGE_CLIENTS`] with the longest names, and the refused.
pub const MAX_PAGE_BYTES: usize = 2 << 20;

/// What is asked for.
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
pub struct Query {
    /// Epoch of the last page; empty for the first.
    #[serde(default)]
    pub epoch: String,

    /// Number of the last page.
    #[serde(default)]
    pub after: u64,
}

/// A page.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct Page {
    /// The life of the agent that the numbers belong to.
    pub epoch: String,

    /// Whether this is the first page of an epoch: what was known of another is void.
    pub first: bool,

    /// Number to ask on from.
    pub next: u64,

    /// Whether there is another page at once.
    pub more: bool,

    /// When the broker started, as far as the agent has seen it (seconds since 1970).
    pub broker_since: i64,

    /// Clients that can be Devices.
    pub clients: Vec<ClientState>,

    /// How often a client was refused since the broker's pod was made.
    pub refused: u64,

    /// The most persistent of those that were refused within the last hour.
    pub recently_refused: Vec<RefusedClient>,
}

/// A client: its name, where it stands, and since when (seconds since 1970).
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct ClientState(pub String, pub PresenceState, pub i64);

/// Where a client stands.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum PresenceState {
    /// Connected.
    Online,

    /// Not connected.
    Offline,

    /// Not connected since the broker itself ended.
    BrokerDown,
}
