//! From what agents say to what is written: which device, when. Pure, but for the fleet that it shares.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;

use super::totals::{GatewayTotals, Told, clients};
use super::waiting::Waiting;
use crate::api::device::ConnectionState;
use crate::api::gateway::GatewayClients;
use crate::broker::log::damping::{Penalty, STORM_HOLD_SECONDS};
use crate::broker::log::wire::{ClientState, Page, PresenceState as State};
use crate::operator::device::connection::Connection;
use crate::operator::device::fleet::{Fleet, SharedFleet};
use crate::operator::device::key::{DeviceKey, GatewayKey};

/// Where one Gateway stands.
#[derive(Debug, Default)]
struct Gateway {
    /// Whether its agent is in the middle of telling everything.
    listing: bool,
    /// Whether its agent has been heard to the end, and not been silent since; `None` before either.
    heard: Option<bool>,
    /// Whether there may be something else to say of it than was said.
    news: bool,
    /// When everything was told last.
    listed: Option<Instant>,
    clients: Option<GatewayClients>,
    told: Told,
}

/// What is known of all Gateways' clients and not written yet.
#[derive(Debug)]
pub struct Ledger {
    fleet: SharedFleet,
    gateways: HashMap<GatewayKey, Gateway>,
    /// What devices that came or went of late have to pay.
    penalties: HashMap<DeviceKey, Penalty>,
    waiting: Waiting,
    start: Instant,
}

impl Ledger {
    /// Nothing is known; at most `rate` writes a second.
    #[must_use]
    pub fn new(fleet: SharedFleet, rate: f64, now: Instant) -> Self {
        Self { fleet, gateways: HashMap::new(), penalties: HashMap::new(), waiting: Waiting::new(rate, now), start: now }
    }

    /// A page of an agent; `time` in seconds since 1970.
    pub fn page(&mut self, key: &GatewayKey, page: &Page, now: Instant, time: i64) {
        let fleet = self.fleet.clone();
        let mut fleet = fleet.lock();
        let gateway = self.gateways.entry(key.clone()).or_default();
        if page.first {
            gateway.listing = true;
            fleet.forget_connections(key);
        }
        gateway.clients = Some(clients(page.refused, &page.recently_refused));
        gateway.news = true;
        let mut ready = self.waiting.counts(now).0;
        for ClientState(name, state, since) in &page.clients {
            let device = DeviceKey { gateway: key.clone(), name: name.as_str().into() };
            ready += usize::from(self.observe(&mut fleet, device, *state, (*since).min(time), (now, time), ready));
        }
        if page.more {
            return;
        }
        let gateway = self.gateways.entry(key.clone()).or_default();
        gateway.heard = Some(true);
        if std::mem::take(&mut gateway.listing) {
            gateway.listed = Some(now);
            // A broker that has not seen them since it started; they had no time to come back if it has only just.
            let since = if page.broker_since > 0 { page.broker_since.min(time) } else { time };
            for device in fleet.unmentioned(key) {
                self.observe(&mut fleet, device, State::BrokerDown, since, (now, time), ready);
            }
        }
    }

    /// What devices of an external broker say of themselves; `all`: of the others nothing is known.
    pub fn heard(&mut self, key: &GatewayKey, all: bool, devices: Vec<(Arc<str>, Connection)>, now: Instant, time: i64) {
        let fleet = self.fleet.clone();
        let mut fleet = fleet.lock();
        let gateway = self.gateways.entry(key.clone()).or_default();
        (gateway.heard, gateway.news) = (Some(true), true);
        if all {
            gateway.listed = Some(now);
            fleet.forget_connections(key);
        }
        let mut ready = self.waiting.counts(now).0;
        for (name, connection) in devices {
            ready += usize::from(self.take(&mut fleet, DeviceKey { gateway: key.clone(), name }, connection, false, (now, time), ready));
        }
        if all {
            for device in fleet.unmentioned(key) {
                // A broker that lost what it kept, and whose devices are on their way back, is no reason for two writes each.
                self.take(&mut fleet, device, Connection::new(ConnectionState::Unknown, time), true, (now, time), ready);
            }
        }
    }

    /// Takes over where a device stands; `ready` others wait for their turn already. Returns whether it does now too.
    fn observe(
        &mut self,
        fleet: &mut Fleet,
        device: DeviceKey,
        state: State,
        since: i64,
        (now, time): (Instant, i64),
        ready: usize,
    ) -> bool {
        let connection = match state {
            State::Online => Connection::new(ConnectionState::Online, since),
            State::Offline | State::BrokerDown => Connection::new(ConnectionState::Offline, since),
        };
        self.take(fleet, device, connection, state == State::BrokerDown, (now, time), ready)
    }

    /// The same; `broker_down`: for its broker is.
    fn take(
        &mut self,
        fleet: &mut Fleet,
        device: DeviceKey,
        connection: Connection,
        broker_down: bool,
        (now, time): (Instant, i64),
        ready: usize,
    ) -> bool {
        let Some(change) = fleet.connection_observed(&device, connection) else { return false };
        let mut hold = Duration::ZERO;
        if change.moved {
            let penalty = self.penalties.entry(device.clone()).or_default();
            hold = Duration::from_secs_f64(penalty.change(now.duration_since(self.start).as_secs_f64()));
        }
        let storm = connection.state == ConnectionState::Offline && change.moved && ready >= self.waiting.burst();
        if broker_down || storm {
            let passed = Duration::from_secs(u64::try_from(time - connection.since()).unwrap_or_default());
            hold = hold.max(Duration::from_secs(STORM_HOLD_SECONDS).saturating_sub(passed));
        }
        if change.differs {
            self.waiting.put(device, hold, now);
        } else {
            self.waiting.remove(&device);
        }
        change.differs && hold.is_zero()
    }

    /// Nothing has been heard of a Gateway for a while, in the middle of a list or not: how many of its devices are connected,
    /// nobody knows.
    pub fn silent(&mut self, key: &GatewayKey) {
        let gateway = self.gateways.entry(key.clone()).or_default();
        (gateway.heard, gateway.listing, gateway.news) = (Some(false), false, true);
    }

    /// Nothing has been heard of a Gateway for so long that nothing is known of its devices.
    pub fn unknown(&mut self, key: &GatewayKey, since: i64, now: Instant) {
        self.silent(key);
        let fleet = self.fleet.clone();
        let mut fleet = fleet.lock();
        for device in fleet.online(key) {
            let unknown = Connection::new(ConnectionState::Unknown, since);
            if fleet.connection_observed(&device, unknown).is_some_and(|change| change.differs) {
                self.waiting.put(device, Duration::ZERO, now);
            }
        }
    }

    /// A Gateway is gone, and its broker with it.
    pub fn gone(&mut self, key: &GatewayKey, since: i64, now: Instant) {
        self.unknown(key, since, now);
        self.gateways.remove(key);
    }

    /// The Gateways of which something is known.
    pub fn gateways(&self) -> impl Iterator<Item = &GatewayKey> {
        self.gateways.keys()
    }

    /// The next device to write, and what; uses up a turn.
    pub fn next(&mut self, now: Instant) -> Option<(DeviceKey, Connection)> {
        let fleet = self.fleet.clone();
        let fleet = fleet.lock();
        while let Some(device) = self.waiting.take(now) {
            // One that is gone, or was written by another way meanwhile, costs no turn.
            if let Some(connection) = fleet.connection_to_write(&device) {
                self.waiting.used();
                return Some((device, connection));
            }
        }
        None
    }

    /// When [`Self::next`] may have something.
    #[must_use]
    pub fn next_due(&self) -> Option<Instant> {
        self.waiting.next_due()
    }

    /// A device was written, or could not be. What came in the meantime, or a failure, is looked at `after` that long.
    pub fn written(&mut self, device: DeviceKey, after: Duration, now: Instant) {
        if self.fleet.lock().connection_to_write(&device).is_some() {
            self.waiting.put(device, after, now);
        }
    }

    /// Puts right what someone changed; not at once, for it may be that a write is on its way.
    pub fn repair(&mut self, after: Duration, now: Instant) {
        for device in self.fleet.lock().take_mismatched() {
            if !self.waiting.contains(&device) {
                self.waiting.put(device, after, now);
            }
        }
    }

    /// What is to be said of each Gateway of which there is news worth a write.
    pub fn totals(&mut self, now: Instant) -> Vec<(GatewayKey, GatewayTotals)> {
        let fleet = self.fleet.lock();
        let mut news = Vec::new();
        for (key, gateway) in &mut self.gateways {
            // Counting the devices of a Gateway means to look at each.
            let (true, false, Some(heard)) = (gateway.news, gateway.listing, gateway.heard) else { continue };
            let connected = heard.then(|| i64::try_from(fleet.connected(key)).unwrap_or(i64::MAX));
            let totals = GatewayTotals { connected, clients: gateway.clients.clone() };
            news.extend(gateway.told.tell(now, &totals).map(|totals| (key.clone(), totals)));
            gateway.news = !gateway.told.has_told(&totals);
        }
        news
    }

    /// Gateways whose agents should tell everything anew: a device was added, and may have been connected before.
    #[must_use]
    pub fn to_list_again(&self, now: Instant, after: Duration) -> HashSet<GatewayKey> {
        let fleet = self.fleet.lock();
        let long_ago = |gateway: &Gateway| gateway.listed.is_some_and(|at| now.saturating_duration_since(at) >= after);
        let due = self.gateways.iter().filter(|(key, gateway)| long_ago(gateway) && fleet.has_appeared(key));
        due.map(|(key, _)| key.clone()).collect()
    }

    /// How many devices wait for their turn, how many to come to rest, and how long the first has waited.
    #[must_use]
    pub fn backlog(&self, now: Instant) -> (usize, usize, Duration) {
        let (waiting, held) = self.waiting.counts(now);
        (waiting, held, self.waiting.oldest(now))
    }

    /// Forgets the penalties that are over.
    pub fn forget(&mut self, now: Instant) {
        let now = now.duration_since(self.start).as_secs_f64();
        self.penalties.retain(|_, penalty| !penalty.is_over(now));
    }
}

#[cfg(test)]
#[path = "ledger_tests.rs"]
mod tests;
