//! The devices of all Gateways, as the operator knows them: what events change, and what follows from it. Pure.

use std::collections::{BTreeSet, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::Notify;

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

/// What has changed since the last look.
#[derive(Debug, Default)]
pub struct Changes {
    /// Devices that may need a step.
    pub devices: BTreeSet<DeviceKey>,
    /// Gateways whose shards may need a write.
    pub shards: BTreeSet<GatewayKey>,
    /// Gateways whose shards may need one because of Devices that no broker has held yet, which is less pressing.
    pub arrivals: BTreeSet<GatewayKey>,
    /// Gateways whose totals may have changed.
    pub totals: BTreeSet<GatewayKey>,
    /// Devices whose row in the registry may have changed.
    pub registry: BTreeSet<DeviceKey>,
    /// Devices whose desired state the broker may have to be given.
    pub desired: BTreeSet<DeviceKey>,
}

/// The devices of all Gateways.
#[derive(Debug, Default)]
pub struct DeviceIndex {
    gateways: HashMap<GatewayKey, GatewayState>,
    /// Devices whose password is in a Secret of the user, by namespace and name of the Secret.
    given: HashMap<(Arc<str>, Box<str>), BTreeSet<DeviceKey>>,
    /// When something follows from the time alone; seconds since 1970.
    deadline: Option<i64>,
    changes: Changes,
    /// Devices whose status says something else of their connection than their brokers, though nothing is new of that.
    mismatched: BTreeSet<DeviceKey>,
    /// Whether all Devices and what belongs to them have been seen once.
    complete: bool,
    /// Whether a Gateway names an issuer that is to be asked.
    asks_issuers: bool,
}

impl DeviceIndex {
    /// What has changed since the last call.
    pub fn take_changes(&mut self) -> Changes {
        std::mem::take(&mut self.changes)
    }

    /// All Devices and what belongs to them have been seen once: from now on totals are totals.
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

    /// All Devices of a namespace, as a registry knows them.
    #[must_use]
    pub fn registry(&self, namespace: &str) -> Vec<DeviceRow> {
        let gateways = self.gateways.iter().filter(|(key, _)| *key.namespace == *namespace);
        gateways.flat_map(|(key, state)| state.devices.iter().map(|(name, record)| registry_device(key, name, record))).collect()
    }

    /// One Device, as a registry knows it; `None` where it is gone.
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

/// The devices, shared by the reconcilers. Locked for moments only, never across an await.
#[derive(Clone, Debug, Default)]
pub struct SharedDeviceIndex {
    index: Arc<Mutex<DeviceIndex>>,
    news: Arc<Notify>,
}

impl SharedDeviceIndex {
    /// The devices.
    pub fn lock(&self) -> MutexGuard<'_, DeviceIndex> {
        // A panic elsewhere ends the process soon; until then a partly applied event is no worse than a missed one.
        self.index.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Has the changes looked at that were made from outside of the loop that drives the Devices.
    pub fn wake(&self) {
        self.news.notify_one();
    }

    /// Returns once [`Self::wake`] was called.
    pub async fn woken(&self) {
        self.news.notified().await;
    }
}

#[cfg(test)]
#[path = "index_tests.rs"]
mod tests;
