//! What the Devices' side knows of connections: where each device stands as its broker says, and as its status says.

use std::collections::BTreeSet;

use super::DeviceIndex;
use crate::api::Device;
use crate::api::device::ConnectionState;
use crate::operator::device::connection::CompactConnection;
use crate::operator::device::key::{DeviceKey, GatewayKey};

/// What came of news of a device's connection.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct ConnectionChange {
    /// Whether the broker had said something else of it before.
    pub moved: bool,
    /// Whether its status says something else.
    pub differs: bool,
}

impl DeviceIndex {
    /// The broker says where a device stands; `None` where there is no such Device, or nothing new.
    pub fn connection_observed(&mut self, key: &DeviceKey, connection: CompactConnection) -> Option<ConnectionChange> {
        let record = self.record_mut(key)?;
        let before = record.seen.replace(connection);
        if before == Some(connection) {
            return None;
        }
        let differs = record.last_written.connection.map(|written| written.state) != Some(connection.state);
        Some(ConnectionChange { moved: before.is_some(), differs })
    }

    /// What the status of a Device should say of its connection, where it says something else. A Device that is paused keeps
    /// what it has, and one that was never connected gets nothing.
    #[must_use]
    pub fn connection_to_write(&self, key: &DeviceKey) -> Option<CompactConnection> {
        let record = self.gateways.get(&key.gateway)?.devices.get(&*key.name)?;
        let seen = record.seen.filter(|_| !record.paused)?;
        (record.last_written.connection.map(|written| written.state) != Some(seen.state)).then_some(seen)
    }

    /// The connection stands in the status, and this is the Device since.
    pub fn connection_written(&mut self, key: &DeviceKey, device: &Device) {
        if let Some(record) = self.record_mut(key).filter(|record| Some(&*record.uid) == device.metadata.uid.as_deref()) {
            record.last_written.observe(device);
        }
    }

    /// Devices whose status was found to say something else of their connection than their brokers, since the last call: someone
    /// changed it, or the Device is no longer paused.
    pub fn take_mismatched(&mut self) -> BTreeSet<DeviceKey> {
        std::mem::take(&mut self.mismatched)
    }

    /// What a broker said holds no longer: it is about to say everything resync.
    pub fn forget_connections(&mut self, gateway: &GatewayKey) {
        if let Some(state) = self.gateways.get_mut(gateway) {
            state.appeared = false;
            for record in state.devices.values_mut() {
                record.seen = None;
            }
        }
    }

    /// Devices of which the broker said nothing, though their status says that they are connected, or may be.
    #[must_use]
    pub fn unmentioned(&self, gateway: &GatewayKey) -> Vec<DeviceKey> {
        let Some(state) = self.gateways.get(gateway) else { return Vec::new() };
        let written =
            |record: &super::DeviceRecord| record.last_written.connection.is_some_and(|written| written.state != ConnectionState::Offline);
        let unmentioned = state.devices.iter().filter(|(_, record)| record.seen.is_none() && written(record));
        unmentioned.map(|(name, _)| DeviceKey { gateway: gateway.clone(), name: name.as_ref().into() }).collect()
    }

    /// Devices that were last said to be connected.
    #[must_use]
    pub fn online(&self, gateway: &GatewayKey) -> Vec<DeviceKey> {
        let Some(state) = self.gateways.get(gateway) else { return Vec::new() };
        let online = |record: &super::DeviceRecord| {
            record.seen.or(record.last_written.connection).is_some_and(|seen| seen.state == ConnectionState::Online)
        };
        let devices = state.devices.iter().filter(|(_, record)| online(record));
        devices.map(|(name, _)| DeviceKey { gateway: gateway.clone(), name: name.as_ref().into() }).collect()
    }

    /// How many devices of a Gateway its broker says are connected.
    #[must_use]
    pub fn connected(&self, gateway: &GatewayKey) -> usize {
        let online = |record: &&super::DeviceRecord| record.seen.is_some_and(|seen| seen.state == ConnectionState::Online);
        self.gateways.get(gateway).map_or(0, |state| state.devices.values().map(Box::as_ref).filter(online).count())
    }

    /// Whether a device was added since the broker's agent was last asked for all of its clients.
    #[must_use]
    pub fn has_appeared(&self, gateway: &GatewayKey) -> bool {
        self.gateways.get(gateway).is_some_and(|state| state.appeared)
    }

    /// Whether the broker of a Gateway runs elsewhere.
    #[must_use]
    pub fn is_external(&self, gateway: &GatewayKey) -> bool {
        self.gateways.get(gateway).is_some_and(|state| state.external)
    }

    /// The Gateways that there are.
    #[must_use]
    pub fn existing_gateways(&self) -> Vec<GatewayKey> {
        self.gateways.iter().filter(|(_, state)| state.owner.is_some()).map(|(key, _)| key.clone()).collect()
    }
}
