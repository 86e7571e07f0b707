//! The protocol by which an agent reports its broker's clients to the operator: in pages, each client once, in the order of their
//! last changes.
//!
//! `GET /presence?epoch=E&after=N` returns the clients whose last change is later than number N of epoch E. Without such a client the
//! answer waits for one, up to [`MAX_WAIT_SECONDS`]. Numbers of another epoch are invalid: the answer then starts with the first
//! client, and a client that is on no page is not connected.

use serde::{Deserialize, Serialize};

use super::refused::RefusedClient;

/// Path of the endpoint.
pub const PATH: &str = "/presence";

/// Maximum wait of an answer for a change.
pub const MAX_WAIT_SECONDS: u64 = 20;

/// Maximum number of clients on a page: about 150 KiB with names of the usual length.
pub const MAX_PAGE_CLIENTS: usize = 4_096;

/// Maximum size of a page in bytes: [`MAX_PAGE_CLIENTS`] with the longest names, and the refused clients.
pub const MAX_PAGE_BYTES: usize = 2 << 20;

/// The query parameters.
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
    /// The run of the agent to which the numbers belong.
    pub epoch: String,

    /// Whether this is the first page of an epoch: the receiver discards the state of other epochs.
    pub first: bool,

    /// Number for the next request.
    pub next: u64,

    /// Whether another page is available at once.
    pub more: bool,

    /// Start of the broker, if the agent has seen it (seconds since 1970).
    pub broker_since: i64,

    /// Clients that can be Devices.
    pub clients: Vec<ClientState>,

    /// Number of refusals since the broker's pod was created.
    pub refused: u64,

    /// The most frequently refused clients of the last hour.
    pub recently_refused: Vec<RefusedClient>,
}

/// A client: its name, its state, and the time of its last change (seconds since 1970).
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct ClientState(pub String, pub PresenceState, pub i64);

/// The state of a client.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum PresenceState {
    /// Connected.
    Online,

    /// Not connected.
    Offline,

    /// Not connected, because the broker ended.
    BrokerDown,
}
