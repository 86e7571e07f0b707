//! The connection state of Devices: as reported by the broker, and as written to the status.

use std::collections::BTreeSet;

use super::DeviceIndex;
use crate::api::Device;
use crate::api::device::ConnectionState;
use crate::operator::device::connection::CompactConnection;
use crate::operator::device::key::{DeviceKey, GatewayKey};

/// The effect of a reported connection state.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct ConnectionChange {
    /// Whether the broker had reported another state before.
    pub moved: bool,
    /// Whether the status contains another state.
    pub differs: bool,
}

impl DeviceIndex {
    /// Stores the connection state that the broker reports. `None` without such a Device, or without a change.
    pub fn connection_observed(&mut self, key: &DeviceKey, connection: CompactConnection) -> Option<ConnectionChange> {
        let record = self.record_mut(key)?;
        let before = record.seen.replace(connection);
        if before == Some(connection) {
            return None;
        }
        let differs = record.last_written.connection.map(|written| written.state) != Some(connection.state);
        Some(ConnectionChange { moved: before.is_some(), differs })
    }

    /// The connection state to write to the status, if it differs. A paused Device and one that was never connected are not
    /// written.
    #[must_use]
    pub fn connection_to_write(&self, key: &DeviceKey) -> Option<CompactConnection> {
        let record = self.gateways.get(&key.gateway)?.devices.get(&*key.name)?;
        let seen = record.seen.filter(|_| !record.paused)?;
        (record.last_written.connection.map(|written| written.state) != Some(seen.state)).then_some(seen)
    }

    /// The connection state was written, with this result.
    pub fn connection_written(&mut self, key: &DeviceKey, device: &Device) {
        if let Some(record) = self.record_mut(key).filter(|record| Some(&*record.uid) == device.metadata.uid.as_deref()) {
            record.last_written.observe(device);
        }
    }

    /// Devices whose status was found to differ from the broker's report since the last call: a user changed it, or the Device is
    /// no longer paused.
    pub fn take_mismatched(&mut self) -> BTreeSet<DeviceKey> {
        std::mem::take(&mut self.mismatched)
    }

    /// Forgets the reported states: the broker is about to report all clients.
    pub fn forget_connections(&mut self, gateway: &GatewayKey) {
        if let Some(state) = self.gateways.get_mut(gateway) {
            state.appeared = false;
            for record in state.devices.values_mut() {
                record.seen = None;
            }
        }
    }

    /// Devices that the broker did not report, although their status says that they are connected or may be.
    #[must_use]
    pub fn unmentioned(&self, gateway: &GatewayKey) -> Vec<DeviceKey> {
        let Some(state) = self.gateways.get(gateway) else { return Vec::new() };
        let written =
            |record: &super::DeviceRecord| record.last_written.connection.is_some_and(|written| written.state != ConnectionState::Offline);
        let unmentioned = state.devices.iter().filter(|(_, record)| record.seen.is_none() && written(record));
        unmentioned.map(|(name, _)| DeviceKey { gateway: gateway.clone(), name: name.as_ref().into() }).collect()
    }

    /// Devices that were last reported as connected.
    #[must_use]
    pub fn online(&self, gateway: &GatewayKey) -> Vec<DeviceKey> {
        let Some(state) = self.gateways.get(gateway) else { return Vec::new() };
        let online = |record: &super::DeviceRecord| {
            record.seen.or(record.last_written.connection).is_some_and(|seen| seen.state == ConnectionState::Online)
        };
        let devices = state.devices.iter().filter(|(_, record)| online(record));
        devices.map(|(name, _)| DeviceKey { gateway: gateway.clone(), name: name.as_ref().into() }).collect()
    }

    /// Number of connected devices of a Gateway, as its broker reports.
    #[must_use]
    pub fn connected(&self, gateway: &GatewayKey) -> usize {
        let online = |record: &&super::DeviceRecord| record.seen.is_some_and(|seen| seen.state == ConnectionState::Online);
        self.gateways.get(gateway).map_or(0, |state| state.devices.values().map(Box::as_ref).filter(online).count())
    }

    /// Whether a Device was added since the agent last reported all clients.
    #[must_use]
    pub fn has_appeared(&self, gateway: &GatewayKey) -> bool {
        self.gateways.get(gateway).is_some_and(|state| state.appeared)
    }

    /// Whether the broker of a Gateway is external.
    #[must_use]
    pub fn is_external(&self, gateway: &GatewayKey) -> bool {
        self.gateways.get(gateway).is_some_and(|state| state.external)
    }

    /// The Gateways that exist.
    #[must_use]
    pub fn existing_gateways(&self) -> Vec<GatewayKey> {
        self.gateways.iter().filter(|(_, state)| state.owner.is_some()).map(|(key, _)| key.clone()).collect()
    }
}
