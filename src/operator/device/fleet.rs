//! The devices of all Gateways, as the operator knows them: what events change, and what follows from it. Pure.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use k8s_openapi::apimachinery::pkg::apis::meta::v1::OwnerReference;

use super::gateway::{GatewayState, ShardPlan};
use super::key::{DeviceKey, GatewayKey, key_of};
use super::record::{PasswordSource, PasswordState, Record};
use super::status::{Surroundings, status};
use crate::api::condition::Cause;
use crate::api::{Device, DeviceStatus};
use crate::credential::entry::Entry;
use crate::credential::shard::Data;
use crate::operator::apply::WriteError;
use crate::registry::DeviceRow;
use crate::runtime::error::chain;

/// A step that fails this often in a row is worth a status: some three seconds of trying.
const WORTH_TELLING: u32 = 4;

/// What is to be done for a Device next.
#[derive(Debug)]
pub enum Step {
    /// Create the Secret with a generated password. With the uid of the Device, which owns it.
    CreateSecret {
        /// `metadata.uid` of the Device.
        uid: Box<str>,
    },

    /// Read the password from the user's Secret.
    ReadSecret {
        /// Name of the Secret.
        secret: Box<str>,
        /// Key of the Secret.
        key: Box<str>,
    },

    /// Write this status.
    WriteStatus(Box<DeviceStatus>),

    /// Look again when the wait for the broker has been long enough to be worth a status.
    AwaitBroker,

    /// Nothing.
    Rest,
}

/// What has changed since the last look.
#[derive(Debug, Default)]
pub struct Changes {
    /// Devices that may need a step.
    pub devices: BTreeSet<DeviceKey>,
    /// Gateways whose shards may need a write.
    pub shards: BTreeSet<GatewayKey>,
    /// Gateways whose totals may have changed.
    pub totals: BTreeSet<GatewayKey>,
    /// Devices whose row in the registry may have changed.
    pub registry: BTreeSet<DeviceKey>,
}

/// The devices of all Gateways.
#[derive(Debug, Default)]
pub struct Fleet {
    gateways: HashMap<GatewayKey, GatewayState>,
    /// Devices whose password is in a Secret of the user, by namespace and name of the Secret.
    given: HashMap<(Arc<str>, Box<str>), BTreeSet<DeviceKey>>,
    changes: Changes,
}

impl Fleet {
    /// What has changed since the last call.
    pub fn take_changes(&mut self) -> Changes {
        std::mem::take(&mut self.changes)
    }

    /// A Device was created or changed.
    pub fn device_applied(&mut self, device: &Device) {
        let Some(key) = key_of(device) else { return };
        if device.metadata.deletion_timestamp.is_some() {
            return self.device_gone(&key);
        }
        let state = self.gateways.entry(key.gateway.clone()).or_default();
        let uid = device.metadata.uid.as_deref().unwrap_or_default();
        let (shards, registry) = match state.devices.get_mut(&*key.name).filter(|record| *record.uid == *uid) {
            Some(record) => {
                let registry = record.enabled != device.spec.enabled || record.attributes != device.spec.attributes;
                (record.update(device), registry)
            }
            None => {
                state.devices.insert(key.name.as_ref().into(), Record::new(device));
                (true, true)
            }
        };
        if let Some(PasswordSource::Given { secret, .. }) = state.devices.get(&*key.name).map(|record| record.source.clone()) {
            self.given.entry((key.gateway.namespace.clone(), secret)).or_default().insert(key.clone());
        }
        if shards {
            self.changes.shards.insert(key.gateway.clone());
            self.changes.totals.insert(key.gateway.clone());
        }
        if registry {
            self.changes.registry.insert(key.clone());
        }
        self.changes.devices.insert(key);
    }

    /// A Device is gone.
    pub fn device_deleted(&mut self, device: &Device) {
        if let Some(key) = key_of(device) {
            self.device_gone(&key);
        }
    }

    fn device_gone(&mut self, key: &DeviceKey) {
        let Some(state) = self.gateways.get_mut(&key.gateway) else { return };
        let Some(record) = state.devices.remove(&*key.name) else { return };
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

    /// All Devices have been listed: those that were not among them are gone.
    pub fn devices_listed(&mut self, seen: &HashSet<DeviceKey>) {
        let gone: Vec<DeviceKey> = self.keys().filter(|key| !seen.contains(key)).collect();
        for key in gone {
            self.device_gone(&key);
        }
    }

    fn keys(&self) -> impl Iterator<Item = DeviceKey> {
        let of = |(gateway, state): (&GatewayKey, &GatewayState)| -> Vec<DeviceKey> {
            state.devices.keys().map(|name| DeviceKey { gateway: gateway.clone(), name: name.as_ref().into() }).collect()
        };
        self.gateways.iter().flat_map(of)
    }

    /// A Gateway exists (`owner`), or does not.
    pub fn gateway_observed(&mut self, key: &GatewayKey, owner: Option<OwnerReference>) {
        let state = self.gateways.entry(key.clone()).or_default();
        if state.owner != owner {
            state.owner = owner;
            let keys: Vec<DeviceKey> =
                state.devices.keys().map(|name| DeviceKey { gateway: key.clone(), name: name.as_ref().into() }).collect();
            self.changes.devices.extend(keys);
            self.changes.shards.insert(key.clone());
            self.changes.totals.insert(key.clone());
        }
        self.forget_if_empty(key);
    }

    /// All Gateways have been listed: those that were not among them are gone.
    pub fn gateways_listed(&mut self, seen: &HashSet<GatewayKey>) {
        let gone: Vec<GatewayKey> =
            self.gateways.iter().filter(|(key, state)| state.owner.is_some() && !seen.contains(key)).map(|(key, _)| key.clone()).collect();
        for key in gone {
            self.gateway_observed(&key, None);
        }
    }

    /// The password of a Device has been read, or could not be.
    pub fn password_observed(&mut self, key: &DeviceKey, uid: &str, password: PasswordState) {
        let Some(record) = self.record_mut(key).filter(|record| *record.uid == *uid) else { return };
        if record.set_password(&key.name, password) {
            self.changes.shards.insert(key.gateway.clone());
        }
        self.changes.devices.insert(key.clone());
    }

    /// The Secret with a Device's generated password is gone: there will be another.
    pub fn generated_secret_deleted(&mut self, key: &DeviceKey, uid: &str) {
        let source = self.record_mut(key).map(|record| record.source.clone());
        if source == Some(PasswordSource::Generated) {
            self.password_observed(key, uid, PasswordState::Unknown);
        }
    }

    /// All Secrets with generated passwords have been listed: those that were not among them are gone.
    pub fn generated_secrets_listed(&mut self, seen: &HashSet<DeviceKey>) {
        let missing: Vec<(DeviceKey, Box<str>)> =
            self.keys().filter(|key| !seen.contains(key)).filter_map(|key| self.uid(&key).map(|uid| (key, uid))).collect();
        for (key, uid) in missing {
            self.generated_secret_deleted(&key, &uid);
        }
    }

    /// All shards have been listed: those that were not among them are gone.
    pub fn shards_listed(&mut self, seen: &HashSet<(GatewayKey, usize)>) {
        let known = self.gateways.iter().flat_map(|(key, state)| state.shards().map(|number| (key.clone(), number)));
        let gone: Vec<(GatewayKey, usize)> = known.filter(|shard| !seen.contains(shard)).collect();
        for (key, number) in gone {
            self.shard_observed(&key, number, None);
        }
    }

    /// A Secret changed that Devices may name: their passwords have to be read again.
    pub fn given_secret_changed(&mut self, namespace: &str, secret: &str) {
        let devices = self.given.get(&(namespace.into(), secret.into())).cloned().unwrap_or_default();
        for key in devices {
            let Some(record) = self.record_mut(&key) else { continue };
            let named = matches!(&record.source, PasswordSource::Given { secret: name, .. } if **name == *secret);
            if named {
                // Until it is read, the hash that is known goes on.
                let stale = record.password().hash().map_or(PasswordState::Unknown, |hash| PasswordState::Stale(hash.into()));
                record.set_password(&key.name, stale);
                self.changes.devices.insert(key);
            }
        }
    }

    /// The users of a Pipeline's workers at the Gateways they read; from the Secret of this name.
    pub fn workers_observed(&mut self, namespace: &str, secret: &str, users: &BTreeMap<String, Vec<Entry>>) {
        let known: Vec<GatewayKey> = self.gateways.keys().filter(|key| *key.namespace == *namespace).cloned().collect();
        let named = users.keys().map(|gateway| GatewayKey::new(namespace, gateway));
        for key in known.into_iter().chain(named).collect::<BTreeSet<_>>() {
            let state = self.gateways.entry(key.clone()).or_default();
            let before = match users.get(&*key.name) {
                Some(entries) => state.workers.insert(secret.into(), entries.clone()),
                None => state.workers.remove(secret),
            };
            if before.as_ref() != users.get(&*key.name) {
                self.changes.shards.insert(key.clone());
            }
            self.forget_if_empty(&key);
        }
    }

    /// A shard as it stands at the API server, or its absence.
    pub fn shard_observed(&mut self, key: &GatewayKey, number: usize, data: Option<&Data>) {
        self.gateways.entry(key.clone()).or_default().observe_shard(number, data);
        self.changes.shards.insert(key.clone());
        self.forget_if_empty(key);
    }

    /// What the broker of a Gateway has proven.
    pub fn proof_observed(&mut self, key: &GatewayKey, proven: BTreeMap<usize, String>) {
        let state = self.gateways.entry(key.clone()).or_default();
        if state.observe_proof(proven) {
            let changed = self.with_changed_revision(key);
            self.changes.devices.extend(changed);
        }
        self.forget_if_empty(key);
    }

    /// Devices whose status speaks of another revision than the one they have.
    fn with_changed_revision(&self, key: &GatewayKey) -> Vec<DeviceKey> {
        let Some(state) = self.gateways.get(key) else { return Vec::new() };
        let changed = state.devices.iter().filter(|(_, record)| record.written.revision.as_deref() != record.revision());
        changed.map(|(name, _)| DeviceKey { gateway: key.clone(), name: name.as_ref().into() }).collect()
    }

    /// What is to be done for a Device next. `waited`: whether it has been waiting for the broker long enough.
    #[must_use]
    pub fn step(&self, key: &DeviceKey, waited: bool) -> Step {
        let Some((state, record)) = self.gateways.get(&key.gateway).and_then(|state| Some((state, state.devices.get(&*key.name)?))) else {
            return Step::Rest;
        };
        if record.paused {
            return Step::Rest;
        }
        match (&record.source, record.password()) {
            (PasswordSource::Generated, PasswordState::Unknown | PasswordState::Stale(_)) => {
                return Step::CreateSecret { uid: record.uid.clone() };
            }
            (PasswordSource::Given { secret, key }, PasswordState::Unknown | PasswordState::Stale(_)) => {
                return Step::ReadSecret { secret: secret.clone(), key: key.clone() };
            }
            (_, PasswordState::Hashed(_) | PasswordState::Missing(..) | PasswordState::Failing(_)) => {}
        }
        let proven = state.has_proven(&key.name, record);
        let around = Surroundings { gateway: &key.gateway.name, gateway_exists: state.owner.is_some(), proven, waited };
        match status(&key.name, record, around) {
            Some(status) if record.written.equals(&status) => match record.password() {
                PasswordState::Failing(_) => Step::CreateSecret { uid: record.uid.clone() },
                _ => Step::Rest,
            },
            Some(status) => Step::WriteStatus(Box::new(status)),
            None => Step::AwaitBroker,
        }
    }

    /// The uid of a Device, where it is there.
    #[must_use]
    pub fn uid(&self, key: &DeviceKey) -> Option<Box<str>> {
        self.gateways.get(&key.gateway)?.devices.get(&*key.name).map(|record| record.uid.clone())
    }

    /// The uid of a Device and the hash of its password that is known, where the Device is there.
    #[must_use]
    pub fn password(&self, key: &DeviceKey) -> Option<(Box<str>, Option<Box<str>>)> {
        let record = self.gateways.get(&key.gateway)?.devices.get(&*key.name)?;
        Some((record.uid.clone(), record.password().hash().map(Into::into)))
    }

    /// A step of a Device failed for the n-th time. When it keeps failing before there is a password, the status says why.
    pub fn step_failed(&mut self, key: &DeviceKey, failures: u32, error: &WriteError) {
        let Some(record) = self.record_mut(key).filter(|_| failures == WORTH_TELLING) else { return };
        if *record.password() == PasswordState::Unknown && record.source == PasswordSource::Generated {
            record.set_password(&key.name, PasswordState::Failing(Box::new(Cause::new(error.reason(), chain(error)))));
        }
    }

    /// The shards of a Gateway as they should be, where they are not; with the number of the plan.
    pub fn plan(&mut self, key: &GatewayKey) -> Option<(u64, ShardPlan)> {
        let state = self.gateways.get_mut(key)?;
        let plan = state.plan(&key.namespace, &key.name);
        let number = state.last_plan();
        if plan.is_none() {
            // Nothing to write may mean that the proof was there before the plan.
            let waiting = self.with_changed_revision(key);
            self.changes.devices.extend(waiting);
        }
        Some((number, plan?))
    }

    /// A plan has been carried out.
    pub fn plan_carried_out(&mut self, key: &GatewayKey, number: u64, plan: ShardPlan) {
        if let Some(state) = self.gateways.get_mut(key) {
            state.carried_out(plan, number);
        }
        let waiting = self.with_changed_revision(key);
        self.changes.devices.extend(waiting);
    }

    /// A status has been written, and this is the Device since.
    pub fn status_written(&mut self, key: &DeviceKey, device: &Device) {
        if let Some(record) = self.record_mut(key).filter(|record| Some(&*record.uid) == device.metadata.uid.as_deref()) {
            record.written.observe(device);
            self.changes.totals.insert(key.gateway.clone());
            self.changes.devices.insert(key.clone());
        }
    }

    /// Devices declared for a Gateway, and those among them that the broker has proven to accept.
    #[must_use]
    pub fn totals(&self, key: &GatewayKey) -> (usize, usize) {
        self.gateways.get(key).map_or((0, 0), GatewayState::totals)
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

    fn record_mut(&mut self, key: &DeviceKey) -> Option<&mut Record> {
        self.gateways.get_mut(&key.gateway)?.devices.get_mut(&*key.name)
    }

    fn forget_if_empty(&mut self, key: &GatewayKey) {
        if self.gateways.get(key).is_some_and(GatewayState::is_empty) {
            self.gateways.remove(key);
        }
    }
}

fn registry_device(gateway: &GatewayKey, name: &str, record: &Record) -> DeviceRow {
    DeviceRow { name: name.to_owned(), gateway: gateway.name.to_string(), enabled: record.enabled, attributes: record.attributes.clone() }
}

/// The devices, shared by the reconcilers. Locked for moments only, never across an await.
#[derive(Clone, Debug, Default)]
pub struct SharedFleet(Arc<Mutex<Fleet>>);

impl SharedFleet {
    /// The devices.
    pub fn lock(&self) -> MutexGuard<'_, Fleet> {
        // A panic elsewhere ends the process soon; until then a partly applied event is no worse than a missed one.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
#[path = "fleet_tests.rs"]
mod tests;
