//! The index of all Devices: events change it, and it determines what has to be done. Pure.

use std::collections::{BTreeSet, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::Notify;

use super::digest_key::DigestKey;
use super::gateway::GatewayState;
use super::key::{DeviceKey, GatewayKey};
use super::record::DeviceRecord;
use crate::state::registry::DeviceRow;

pub mod action;
mod connections;
mod devices;
mod gateways;
mod passwords;
mod rotation;
mod twins;

/// The changes since the last call of [`DeviceIndex::take_changes`].
#[derive(Debug, Default)]
pub struct Changes {
    /// Devices that may need an action.
    pub devices: BTreeSet<DeviceKey>,
    /// Gateways whose shards may need a write.
    pub shards: BTreeSet<GatewayKey>,
    /// Gateways whose shards may need a write for Devices that no broker holds yet. This is less urgent.
    pub arrivals: BTreeSet<GatewayKey>,
    /// Gateways whose totals may have changed.
    pub totals: BTreeSet<GatewayKey>,
    /// Devices whose row in the registry may have changed.
    pub registry: BTreeSet<DeviceKey>,
    /// Devices whose desired state the broker may not have yet.
    pub desired: BTreeSet<DeviceKey>,
}

/// The index of all Devices.
#[derive(Debug, Default)]
pub struct DeviceIndex {
    gateways: HashMap<GatewayKey, GatewayState>,
    /// Devices with a user-provided password, by namespace and name of the Secret.
    given: HashMap<(Arc<str>, Box<str>), BTreeSet<DeviceKey>>,
    /// The next time at which something changes without an event, in seconds since 1970.
    deadline: Option<i64>,
    changes: Changes,
    /// Devices whose status reports another connection state than their broker.
    mismatched: BTreeSet<DeviceKey>,
    /// The key of the digests in the status.
    digest_key: Arc<DigestKey>,
    /// Whether all objects have been listed.
    complete: bool,
    /// Whether a Gateway declares an issuer of cert-manager.
    asks_issuers: bool,
}

impl DeviceIndex {
    /// Sets the key of the digests, before the first Device.
    pub fn set_digest_key(&mut self, key: DigestKey) {
        self.digest_key = Arc::new(key);
    }

    /// Returns the changes since the last call.
    pub fn take_changes(&mut self) -> Changes {
        std::mem::take(&mut self.changes)
    }

    /// Records that all objects have been listed, so that the totals are complete.
    pub fn completed(&mut self) {
        self.complete = true;
    }

    fn keys_of(&self, wanted: impl Fn(&DeviceRecord) -> bool) -> Vec<DeviceKey> {
        let mut keys = Vec::new();
        for (gateway, state) in &self.gateways {
            let found = state.devices.iter().filter(|(_, record)| wanted(record));
            keys.extend(found.map(|(name, _)| DeviceKey { gateway: gateway.clone(), name: name.as_ref().into() }));
        }
        keys
    }

    fn records_mut(&mut self) -> impl Iterator<Item = &mut DeviceRecord> {
        self.gateways.values_mut().flat_map(|state| state.devices.values_mut()).map(Box::as_mut)
    }

    /// The registry rows of all Devices of a namespace.
    #[must_use]
    pub fn registry(&self, namespace: &str) -> Vec<DeviceRow> {
        let gateways = self.gateways.iter().filter(|(key, _)| *key.namespace == *namespace);
        gateways.flat_map(|(key, state)| state.devices.iter().map(|(name, record)| registry_device(key, name, record))).collect()
    }

    /// The registry row of a Device, or `None` if the Device does not exist.
    #[must_use]
    pub fn registry_device(&self, key: &DeviceKey) -> Option<DeviceRow> {
        let record = self.gateways.get(&key.gateway)?.devices.get(&*key.name)?;
        Some(registry_device(&key.gateway, &key.name, record))
    }

    fn record_mut(&mut self, key: &DeviceKey) -> Option<&mut DeviceRecord> {
        self.gateways.get_mut(&key.gateway)?.devices.get_mut(&*key.name).map(Box::as_mut)
    }

    fn forget_if_empty(&mut self, key: &GatewayKey) {
        if self.gateways.get(key).is_some_and(GatewayState::is_empty) {
            self.gateways.remove(key);
        }
    }
}

fn registry_device(gateway: &GatewayKey, name: &str, record: &DeviceRecord) -> DeviceRow {
    DeviceRow { name: name.to_owned(), gateway: gateway.name.to_string(), enabled: record.enabled, attributes: record.attributes.clone() }
}

/// The index, shared by the reconcilers. It is locked briefly, never across an await.
#[derive(Clone, Debug, Default)]
pub struct SharedDeviceIndex {
    index: Arc<Mutex<DeviceIndex>>,
    notify: Arc<Notify>,
}

impl SharedDeviceIndex {
    /// Locks the index.
    pub fn lock(&self) -> MutexGuard<'_, DeviceIndex> {
        // A panic ends the process soon. Until then, a partly applied event is no worse than a missed one.
        self.index.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Wakes the driver, after a change by another task.
    pub fn wake(&self) {
        self.notify.notify_one();
    }

    /// Waits for [`Self::wake`].
    pub async fn woken(&self) {
        self.notify.notified().await;
    }
}

#[cfg(test)]
#[path = "index_tests.rs"]
mod tests;
