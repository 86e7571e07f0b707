//! Determines which connection states are written, and when. Pure, apart from the shared index.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;

use super::totals::{GatewayTotals, LastReportedTotals, clients};
use crate::api::device::ConnectionState;
use crate::api::gateway::GatewayClients;
use crate::broker::log::damping::{Penalty, STORM_HOLD_SECONDS};
use crate::broker::log::wire::{ClientState, Page, PresenceState as State};
use crate::operator::device::connection::CompactConnection;
use crate::operator::device::index::{DeviceIndex, SharedDeviceIndex};
use crate::operator::device::key::{DeviceKey, GatewayKey};
use crate::runtime::rate_limited_queue::{Limits, Order, Rate, RateLimitedQueue};

/// Seconds of the write budget that may accumulate while nothing is written.
const BURST_SECONDS: f64 = 2.0;

/// Upper limit of the time that a device which changes all the time is held back.
const MAX_HOLD: Duration = Duration::from_mins(10);

/// The presence of one Gateway's clients.
#[derive(Debug, Default)]
struct Gateway {
    /// Whether its agent is reporting all clients.
    listing: bool,
    /// Whether the agent has reported all clients and is reachable. `None` before the first report.
    heard: Option<bool>,
    /// Whether the totals may have changed since they were last reported.
    changed: bool,
    /// When all clients were last reported.
    listed: Option<Instant>,
    clients: Option<GatewayClients>,
    reported: LastReportedTotals,
}

/// The connection states of all Gateways' clients that are not written yet.
#[derive(Debug)]
pub struct PresenceReporter {
    index: SharedDeviceIndex,
    gateways: HashMap<GatewayKey, Gateway>,
    /// Penalties of devices that changed recently.
    penalties: HashMap<DeviceKey, Penalty>,
    queue: RateLimitedQueue<DeviceKey>,
    start: Instant,
}

impl PresenceReporter {
    /// Without any state; at most `rate` writes per second.
    #[must_use]
    pub fn new(index: SharedDeviceIndex, rate: f64, now: Instant) -> Self {
        let limits = Limits {
            rate: Some(Rate { per_second: rate, burst_seconds: BURST_SECONDS }),
            max_delay: Some(MAX_HOLD),
            order: Order::Alternate,
            ..Limits::default()
        };
        Self { index, gateways: HashMap::new(), penalties: HashMap::new(), queue: RateLimitedQueue::new(limits, now), start: now }
    }

    /// Processes a page of an agent. `time` is in seconds since 1970.
    pub fn page(&mut self, key: &GatewayKey, page: &Page, now: Instant, time: i64) {
        let index = self.index.clone();
        let mut index = index.lock();
        let gateway = self.gateways.entry(key.clone()).or_default();
        if page.first {
            gateway.listing = true;
            index.forget_connections(key);
        }
        gateway.clients = Some(clients(page.refused, &page.recently_refused));
        gateway.changed = true;
        let mut ready = self.ready(now);
        for ClientState(name, state, since) in &page.clients {
            let device = DeviceKey { gateway: key.clone(), name: name.as_str().into() };
            ready += usize::from(self.observe(&mut index, device, *state, (*since).min(time), (now, time), ready));
        }
        if page.more {
            return;
        }
        let gateway = self.gateways.entry(key.clone()).or_default();
        gateway.heard = Some(true);
        if std::mem::take(&mut gateway.listing) {
            gateway.listed = Some(now);
            // The broker has not seen these devices since it started. If that is recent, they may still reconnect.
            let since = if page.broker_since > 0 { page.broker_since.min(time) } else { time };
            for device in index.unmentioned(key) {
                self.observe(&mut index, device, State::BrokerDown, since, (now, time), ready);
            }
        }
    }

    /// Processes messages of an external broker's devices. With `all`, the list is complete: nothing is known of other devices.
    pub fn heard(&mut self, key: &GatewayKey, all: bool, devices: Vec<(Arc<str>, CompactConnection)>, now: Instant, time: i64) {
        let index = self.index.clone();
        let mut index = index.lock();
        let gateway = self.gateways.entry(key.clone()).or_default();
        (gateway.heard, gateway.changed) = (Some(true), true);
        if all {
            gateway.listed = Some(now);
            index.forget_connections(key);
        }
        let mut ready = self.ready(now);
        for (name, connection) in devices {
            ready += usize::from(self.take(&mut index, DeviceKey { gateway: key.clone(), name }, connection, false, (now, time), ready));
        }
        if all {
            for device in index.unmentioned(key) {
                // After a broker lost its retained messages, its devices reconnect soon. This saves two writes for each.
                self.take(&mut index, device, CompactConnection::new(ConnectionState::Unknown, time), true, (now, time), ready);
            }
        }
    }

    /// Stores the reported state of a device; `ready` others are ready to be written. Returns whether this one is ready now too.
    fn observe(
        &mut self,
        index: &mut DeviceIndex,
        device: DeviceKey,
        state: State,
        since: i64,
        (now, time): (Instant, i64),
        ready: usize,
    ) -> bool {
        let connection = match state {
            State::Online => CompactConnection::new(ConnectionState::Online, since),
            State::Offline | State::BrokerDown => CompactConnection::new(ConnectionState::Offline, since),
        };
        self.take(index, device, connection, state == State::BrokerDown, (now, time), ready)
    }

    /// The same. `broker_down`: the device is offline because its broker is.
    fn take(
        &mut self,
        index: &mut DeviceIndex,
        device: DeviceKey,
        connection: CompactConnection,
        broker_down: bool,
        (now, time): (Instant, i64),
        ready: usize,
    ) -> bool {
        let Some(change) = index.connection_observed(&device, connection) else { return false };
        let mut hold = Duration::ZERO;
        if change.moved {
            let penalty = self.penalties.entry(device.clone()).or_default();
            hold = Duration::from_secs_f64(penalty.change(now.duration_since(self.start).as_secs_f64()));
        }
        let storm = connection.state == ConnectionState::Offline && change.moved && ready >= self.queue.burst();
        if broker_down || storm {
            let passed = Duration::from_secs(u64::try_from(time - connection.since()).unwrap_or_default());
            hold = hold.max(Duration::from_secs(STORM_HOLD_SECONDS).saturating_sub(passed));
        }
        if change.differs {
            self.queue.postpone(device, (), now + hold, now);
        } else {
            self.queue.remove(&device);
        }
        change.differs && hold.is_zero()
    }

    /// There has been no update of a Gateway for some time: the number of connected devices is unknown.
    pub fn silent(&mut self, key: &GatewayKey) {
        let gateway = self.gateways.entry(key.clone()).or_default();
        (gateway.heard, gateway.listing, gateway.changed) = (Some(false), false, true);
    }

    /// There has been no update of a Gateway for so long that the state of its devices is unknown.
    pub fn unknown(&mut self, key: &GatewayKey, since: i64, now: Instant) {
        self.silent(key);
        let index = self.index.clone();
        let mut index = index.lock();
        for device in index.online(key) {
            let unknown = CompactConnection::new(ConnectionState::Unknown, since);
            if index.connection_observed(&device, unknown).is_some_and(|change| change.differs) {
                self.queue.postpone(device, (), now, now);
            }
        }
    }

    /// A Gateway was deleted with its broker.
    pub fn gone(&mut self, key: &GatewayKey, since: i64, now: Instant) {
        self.unknown(key, since, now);
        self.gateways.remove(key);
    }

    /// The Gateways with known clients.
    pub fn gateways(&self) -> impl Iterator<Item = &GatewayKey> {
        self.gateways.keys()
    }

    /// The next device to write, with its state. It counts for the write budget.
    pub fn next(&mut self, now: Instant) -> Option<(DeviceKey, CompactConnection)> {
        let index = self.index.clone();
        let index = index.lock();
        while let Some((device, ())) = self.queue.pop(now) {
            // A device that was deleted or written meanwhile does not count for the budget.
            if let Some(connection) = index.connection_to_write(&device) {
                return Some((device, connection));
            }
            self.queue.skip(&device, now);
        }
        None
    }

    /// When [`Self::next`] may return a device.
    #[must_use]
    pub fn next_due(&self) -> Option<Instant> {
        self.queue.next_due()
    }

    /// A write has ended. The device is queued again `after` this long if its state differs from the status. `None` after a write
    /// that must not be repeated.
    pub fn written(&mut self, device: DeviceKey, after: Option<Duration>, now: Instant) {
        self.queue.done(&device, now);
        if let Some(after) = after
            && self.index.lock().connection_to_write(&device).is_some()
        {
            self.queue.postpone(device, (), now + after, now);
        }
    }

    /// Queues devices whose status a user changed. Not at once, because a write may be in progress.
    pub fn repair(&mut self, after: Duration, now: Instant) {
        for device in self.index.lock().take_mismatched() {
            if !self.queue.contains(&device) {
                self.queue.postpone(device, (), now + after, now);
            }
        }
    }

    /// The totals of each Gateway with a change that has to be written.
    pub fn totals(&mut self, now: Instant) -> Vec<(GatewayKey, GatewayTotals)> {
        let index = self.index.lock();
        let mut changed = Vec::new();
        for (key, gateway) in &mut self.gateways {
            // Counting visits each device of a Gateway.
            let (true, false, Some(heard)) = (gateway.changed, gateway.listing, gateway.heard) else { continue };
            let connected = heard.then(|| i64::try_from(index.connected(key)).unwrap_or(i64::MAX));
            let totals = GatewayTotals { connected, clients: gateway.clients.clone() };
            changed.extend(gateway.reported.update(now, &totals).map(|totals| (key.clone(), totals)));
            gateway.changed = !gateway.reported.is_last(&totals);
        }
        changed
    }

    /// Gateways whose agents must report all clients again: a Device was added whose client may have connected before.
    #[must_use]
    pub fn to_list_again(&self, now: Instant, after: Duration) -> HashSet<GatewayKey> {
        let index = self.index.lock();
        let long_ago = |gateway: &Gateway| gateway.listed.is_some_and(|at| now.saturating_duration_since(at) >= after);
        let due = self.gateways.iter().filter(|(key, gateway)| long_ago(gateway) && index.has_appeared(key));
        due.map(|(key, _)| key.clone()).collect()
    }

    /// Number of devices that are ready, number that are held back, and how long the oldest has been ready.
    #[must_use]
    pub fn backlog(&mut self, now: Instant) -> (usize, usize, Duration) {
        (self.ready(now), self.queue.delayed(), self.queue.oldest(now))
    }

    fn ready(&mut self, now: Instant) -> usize {
        self.queue.advance(now);
        self.queue.ready()
    }

    /// Removes expired penalties.
    pub fn forget(&mut self, now: Instant) {
        let now = now.duration_since(self.start).as_secs_f64();
        self.penalties.retain(|_, penalty| !penalty.is_over(now));
    }
}

#[cfg(test)]
#[path = "reporter_tests.rs"]
mod tests;
