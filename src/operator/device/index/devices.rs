//! Creation, change and deletion of Devices.

use std::sync::Arc;

use super::DeviceIndex;
use crate::api::Device;
use crate::operator::device::key::{DeviceKey, key_of};
use crate::operator::device::record::{DeviceRecord, PasswordSource};

impl DeviceIndex {
    /// A Device was created or changed.
    pub fn device_applied(&mut self, device: &Device) {
        let Some(mut key) = key_of(device) else { return };
        if device.metadata.deletion_timestamp.is_some() {
            return self.device_gone(&key);
        }
        let entry = self.gateways.entry(key.gateway);
        // All queued keys of a Gateway's Devices share one name in memory.
        key.gateway = entry.key().clone();
        let state = entry.or_default();
        let uid = device.metadata.uid.as_deref().unwrap_or_default();
        let (shards, arrived, registry) = match state.devices.get_mut(&*key.name).filter(|record| *record.uid == *uid) {
            Some(record) => {
                let registry = record.enabled != device.spec.enabled || record.attributes != device.spec.attributes;
                (record.update(device), false, registry)
            }
            None => {
                state.devices.insert(key.name.as_ref().into(), Box::new(DeviceRecord::new(device, Arc::clone(&self.digest_key))));
                state.appeared = true;
                (false, true, true)
            }
        };
        if let Some(PasswordSource::Given { secret, .. }) = state.devices.get(&*key.name).map(|record| record.source.clone()) {
            self.given.entry((key.gateway.namespace.clone(), secret)).or_default().insert(key.clone());
        }
        self.desired_applied(&key, device);
        if shards {
            self.changes.shards.insert(key.gateway.clone());
        }
        if arrived {
            self.changes.arrivals.insert(key.gateway.clone());
        }
        if shards || arrived {
            self.changes.totals.insert(key.gateway.clone());
        }
        if registry {
            self.changes.registry.insert(key.clone());
        }
        if self.connection_to_write(&key).is_some() {
            self.mismatched.insert(key.clone());
        }
        self.schedule(&key);
        self.changes.devices.insert(key);
    }

    /// A Device was deleted.
    pub fn device_deleted(&mut self, device: &Device) {
        if let Some(key) = key_of(device) {
            self.device_gone(&key);
        }
    }

    fn device_gone(&mut self, key: &DeviceKey) {
        let Some(state) = self.gateways.get_mut(&key.gateway) else { return };
        let Some(record) = state.devices.remove(&*key.name) else { return };
        if record.twin().is_some() {
            self.changes.desired.insert(key.clone());
        }
        if let PasswordSource::Given { secret, .. } = record.source {
            let named = (key.gateway.namespace.clone(), secret);
            if let Some(devices) = self.given.get_mut(&named) {
                devices.remove(key);
                if devices.is_empty() {
                    self.given.remove(&named);
                }
            }
        }
        self.changes.shards.insert(key.gateway.clone());
        self.changes.totals.insert(key.gateway.clone());
        self.changes.registry.insert(key.clone());
        self.forget_if_empty(&key.gateway);
    }

    /// A list of all Devices begins.
    pub fn listing_devices(&mut self) {
        self.records_mut().for_each(|record| record.listed = false);
    }

    /// The list is complete: Devices that it does not contain were deleted.
    pub fn devices_listed(&mut self) {
        for key in self.keys_of(|record| !record.listed) {
            self.device_gone(&key);
        }
    }

    /// A status was written, with this result.
    pub fn status_written(&mut self, key: &DeviceKey, device: &Device) {
        if let Some(record) = self.record_mut(key).filter(|record| Some(&*record.uid) == device.metadata.uid.as_deref()) {
            record.observe_status(device);
            self.changes.totals.insert(key.gateway.clone());
            self.changes.devices.insert(key.clone());
        }
    }
}
