//! Tracks the connected clients of a broker: lines of its log in, changes out.
//!
//! Address and port identify a connection. A refused client therefore does not affect the device whose name it claims, and the end of
//! an old connection does not affect the new connection that has taken over its session.

use std::collections::{BTreeMap, HashMap, HashSet, VecDeque};
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::can_be_device;
use super::line::{Event, Line, Reason};
use super::refused::RefusedClients;
use super::wire::{ClientState, MAX_PAGE_CLIENTS, Page, PresenceState};
use crate::api::name::CANARY_USERNAME;

/// Maximum number of stored clients that are no longer connected. Above it the tracker discards them and starts a new epoch. They
/// take about 20 MiB; an agent's memory limit is 256 MiB.
const MAX_OFFLINE_CLIENTS: usize = 150_000;

/// Maximum number of stored connections of the agent itself: it has a few at a time, and each appears in the log at once.
const MAX_OWN_CONNECTIONS: usize = 64;

/// The outcome of a line, for metrics.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum LogOutcome {
    /// A client was accepted.
    Connected,
    /// The connection of an accepted client ended.
    Disconnected(Reason),
    /// A client was refused.
    Refused(Reason),
    /// The broker started or ended.
    Broker,
    /// Nothing of interest.
    Nothing,
}

#[derive(Clone, Debug)]
struct Client {
    /// Number of its last change.
    number: u64,
    since: i64,
    status: ClientStatus,
}

#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
enum ClientStatus {
    Online { address: Box<str> },
    Offline,
    BrokerDown,
}

/// The clients of a broker.
#[derive(Debug)]
pub struct Tracker {
    epoch: String,
    number: u64,
    broker_since: i64,
    clients: HashMap<Arc<str>, Client>,
    changes: BTreeMap<u64, Arc<str>>,
    /// Addresses of connected clients that are not Devices.
    others: HashSet<Box<str>>,
    connected: usize,
    refused: RefusedClients,
    /// Addresses of the agent's own connections whose refusal is expected.
    own: VecDeque<Box<str>>,
    /// Whether the client aborted the connection that ends next.
    aborted_in_tls: bool,
}

/// The state of a tracker, for a file.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct TrackerSnapshot {
    broker_since: i64,
    clients: Vec<(String, i64, ClientStatus)>,
    others: Vec<Box<str>>,
    refused: RefusedClients,
}

impl Tracker {
    /// A tracker without clients. `epoch` distinguishes its numbers from those of any other tracker.
    #[must_use]
    pub fn new(epoch: String) -> Self {
        Self {
            epoch,
            number: 0,
            broker_since: 0,
            clients: HashMap::new(),
            changes: BTreeMap::new(),
            others: HashSet::new(),
            connected: 0,
            refused: RefusedClients::default(),
            own: VecDeque::new(),
            aborted_in_tls: false,
        }
    }

    /// A tracker that continues from a snapshot.
    #[must_use]
    pub fn restore(epoch: String, snapshot: TrackerSnapshot) -> Self {
        let mut tracker = Self::new(epoch);
        tracker.broker_since = snapshot.broker_since;
        tracker.others = snapshot.others.into_iter().collect();
        tracker.refused = snapshot.refused;
        for (client, since, status) in snapshot.clients {
            tracker.change(&client, since, status);
        }
        tracker
    }

    /// The state of the tracker.
    #[must_use]
    pub fn snapshot(&self) -> TrackerSnapshot {
        let client = |name: &Arc<str>| self.clients.get(name).map(|client| (name.to_string(), client.since, client.status.clone()));
        TrackerSnapshot {
            broker_since: self.broker_since,
            clients: self.changes.values().filter_map(client).collect(),
            others: self.others.iter().cloned().collect(),
            refused: self.refused.clone(),
        }
    }

    /// Number of the last change.
    #[must_use]
    pub fn number(&self) -> u64 {
        self.number
    }

    /// Number of connected clients that can be Devices.
    #[must_use]
    pub fn connected(&self) -> usize {
        self.connected
    }

    /// Announces a connection of the agent itself from this address and port, to check the broker's certificate: its refusal is expected.
    pub fn expect_own(&mut self, address: &str) {
        if self.own.len() >= MAX_OWN_CONNECTIONS {
            self.own.pop_front();
        }
        self.own.push_back(address.into());
    }

    /// Applies a line. `now` (seconds since 1970) is the time of a line without a time.
    pub fn observe(&mut self, line: &Line<'_>, now: i64) -> LogOutcome {
        let time = line.time.unwrap_or(now);
        match line.event {
            Event::BrokerStarting => {
                self.broker_down(time);
                self.broker_since = time;
                LogOutcome::Broker
            }
            Event::BrokerStopping => {
                self.broker_down(time);
                LogOutcome::Broker
            }
            Event::BrokerRunning => LogOutcome::Broker,
            Event::Connected { client, address } => {
                if can_be_device(client) {
                    self.change(client, time, ClientStatus::Online { address: address.into() });
                } else {
                    self.others.insert(address.into());
                }
                LogOutcome::Connected
            }
            Event::TlsAborted => {
                self.aborted_in_tls = true;
                LogOutcome::Nothing
            }
            Event::Disconnected { client, address, reason } => {
                let aborted_in_tls = std::mem::take(&mut self.aborted_in_tls) && reason == Reason::TlsHandshakeFailed;
                self.disconnected(client, address, if aborted_in_tls { Reason::ClosedByClient } else { reason }, time)
            }
            Event::Denied { address } => self.refused(address, address, Reason::ConnectionLimit, time),
            Event::Cut { client } => self.refused(client, "", Reason::Other, time),
        }
    }

    /// The broker does not run: no client is connected.
    pub fn broker_down(&mut self, time: i64) {
        let online = |client: &Client| matches!(client.status, ClientStatus::Online { .. });
        let connected: Vec<Arc<str>> = self.clients.iter().filter(|(_, client)| online(client)).map(|(name, _)| Arc::clone(name)).collect();
        for name in connected {
            self.change(&name, time, ClientStatus::BrokerDown);
        }
        self.others.clear();
    }

    fn disconnected(&mut self, client: &str, address: &str, reason: Reason, time: i64) -> LogOutcome {
        let here = |known: &Client| matches!(&known.status, ClientStatus::Online { address: known } if **known == *address);
        if self.clients.get(client).is_some_and(here) {
            self.change(client, time, ClientStatus::Offline);
            return LogOutcome::Disconnected(reason);
        }
        if self.others.remove(address) {
            return LogOutcome::Disconnected(reason);
        }
        if reason.is_refusal() { self.refused(client, address, reason, time) } else { LogOutcome::Nothing }
    }

    fn refused(&mut self, client: &str, address: &str, reason: Reason, time: i64) -> LogOutcome {
        // The agent logs in with a new password until the broker has loaded it.
        if client == CANARY_USERNAME && (address.starts_with("127.0.0.1:") || address.starts_with("::1:")) {
            return LogOutcome::Nothing;
        }
        if let Some(own) = self.own.iter().position(|own| **own == *address) {
            self.own.remove(own);
            return LogOutcome::Nothing;
        }
        self.refused.observe(client, address, reason, time);
        LogOutcome::Refused(reason)
    }

    fn change(&mut self, name: &str, since: i64, status: ClientStatus) {
        self.number += 1;
        let online = matches!(status, ClientStatus::Online { .. });
        let client = Client { number: self.number, since, status };
        let (name, before) = match self.clients.get_key_value(name) {
            Some((known, before)) => (Arc::clone(known), Some((before.number, matches!(before.status, ClientStatus::Online { .. })))),
            None => (Arc::from(name), None),
        };
        if let Some((number, _)) = before {
            self.changes.remove(&number);
        }
        self.connected = self.connected + usize::from(online) - usize::from(before.is_some_and(|(_, online)| online));
        self.changes.insert(self.number, Arc::clone(&name));
        self.clients.insert(name, client);
        if self.clients.len() - self.connected > MAX_OFFLINE_CLIENTS {
            self.start_epoch();
        }
    }

    /// Removes the clients that are not connected. A follower has to restart from the first client.
    fn start_epoch(&mut self) {
        let clients = &mut self.clients;
        clients.retain(|_, client| matches!(client.status, ClientStatus::Online { .. }));
        self.changes.retain(|_, name| clients.contains_key(name));
        self.epoch.push('x');
    }

    /// The clients that changed after number `after` of `epoch`; all of them for another epoch.
    #[must_use]
    pub fn page(&self, epoch: &str, after: u64, now: i64) -> Page {
        let same = epoch == self.epoch && after <= self.number;
        let after = if same { after } else { 0 };
        let state = |name: &Arc<str>| {
            let client = self.clients.get(name)?;
            let state = match client.status {
                ClientStatus::Online { .. } => PresenceState::Online,
                ClientStatus::Offline => PresenceState::Offline,
                ClientStatus::BrokerDown => PresenceState::BrokerDown,
            };
            Some(ClientState(name.to_string(), state, client.since))
        };
        let mut changes = self.changes.range(after + 1..);
        let mut next = after;
        let clients = changes
            .by_ref()
            .take(MAX_PAGE_CLIENTS)
            .filter_map(|(number, name)| {
                next = *number;
                state(name)
            })
            .collect();
        let more = changes.next().is_some();
        Page {
            epoch: self.epoch.clone(),
            first: !same,
            next,
            more,
            broker_since: self.broker_since,
            clients,
            refused: self.refused.count,
            recently_refused: self.refused.recent(now),
        }
    }
}

#[cfg(test)]
#[path = "tracker_tests.rs"]
mod tests;
