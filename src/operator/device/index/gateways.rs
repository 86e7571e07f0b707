//! Changes of Gateways: existence, shards, and proofs of their brokers.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::sync::Arc;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::OwnerReference;

use super::DeviceIndex;
use crate::broker::credential::entry::Entry;
use crate::broker::credential::shard::Data;
use crate::operator::device::certificate::Authority;
use crate::operator::device::endpoint::Endpoint;
use crate::operator::device::gateway::{GatewayState, ShardPlan};
use crate::operator::device::key::{DeviceKey, GatewayKey};

impl DeviceIndex {
    /// A Gateway exists (`owner`), or does not.
    pub fn gateway_observed(&mut self, key: &GatewayKey, owner: Option<OwnerReference>) {
        let state = self.gateways.entry(key.clone()).or_default();
        if state.owner != owner {
            let before = std::mem::replace(&mut state.owner, owner);
            // The successor of that name may have reported before.
            let before = before.map(|before| before.uid);
            state.endpoint.take_if(|(uid, _)| Some(&**uid) == before.as_deref());
            state.authority.take_if(|(uid, _)| Some(&**uid) == before.as_deref());
            let keys: Vec<DeviceKey> =
                state.devices.keys().map(|name| DeviceKey { gateway: key.clone(), name: name.as_ref().into() }).collect();
            self.changes.devices.extend(keys);
            self.changes.shards.insert(key.clone());
            self.changes.totals.insert(key.clone());
        }
        self.forget_if_empty(key);
    }

    /// Whether the broker of a Gateway is external. This is known before the Gateway and does not change.
    pub fn kind_observed(&mut self, key: &GatewayKey, external: bool) {
        if self.gateways.get(key).is_some_and(|state| state.external) != external {
            self.gateways.entry(key.clone()).or_default().external = external;
        }
    }

    /// The address of the broker of a Gateway with this uid. Secrets with another address are updated.
    pub fn endpoint_observed(&mut self, key: &GatewayKey, uid: &str, endpoint: Endpoint) {
        let state = self.gateways.entry(key.clone()).or_default();
        if state.endpoint.as_ref().is_some_and(|(known, before)| **known == *uid && **before == endpoint) {
            return;
        }
        let digest = endpoint.digest();
        state.endpoint = Some((uid.into(), Arc::new(endpoint)));
        let otherwise = state.devices.iter().filter(|(_, record)| record.rotation.endpoint() != Some(digest));
        let keys: Vec<DeviceKey> = otherwise.map(|(name, _)| DeviceKey { gateway: key.clone(), name: name.as_ref().into() }).collect();
        self.changes.devices.extend(keys);
    }

    /// The authority of a Gateway with this uid. Devices with a signing request are checked again.
    pub fn authority_observed(&mut self, key: &GatewayKey, uid: &str, authority: Authority) {
        let state = self.gateways.entry(key.clone()).or_default();
        let same = state.authority.as_ref().is_some_and(|(known, before)| **known == *uid && !before.differs(&authority));
        if same {
            return;
        }
        self.asks_issuers |= matches!(&authority, Authority::Usable(signer) if signer.issuer().is_some());
        state.authority = Some((uid.into(), authority));
        for (name, record) in &mut state.devices {
            if let Some(certificate) = record.certificate_mut() {
                certificate.requeue();
                self.changes.devices.insert(DeviceKey { gateway: key.clone(), name: name.as_ref().into() });
            }
        }
    }

    /// Whether a Gateway declares an issuer of cert-manager.
    #[must_use]
    pub fn asks_issuers(&self) -> bool {
        self.asks_issuers
    }

    /// The list of Gateways is complete: those that it does not contain were deleted.
    pub fn gateways_listed(&mut self, seen: &HashSet<GatewayKey>) {
        let gone: Vec<GatewayKey> =
            self.gateways.iter().filter(|(key, state)| state.owner.is_some() && !seen.contains(key)).map(|(key, _)| key.clone()).collect();
        for key in gone {
            self.gateway_observed(&key, None);
        }
    }

    /// The users of a Pipeline's workers by Gateway, from the Secret with this name.
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

    /// The list of shards is complete: those that it does not contain were deleted.
    pub fn shards_listed(&mut self, seen: &HashSet<(GatewayKey, usize)>) {
        let known = self.gateways.iter().flat_map(|(key, state)| state.shards().map(|number| (key.clone(), number)));
        let gone: Vec<(GatewayKey, usize)> = known.filter(|shard| !seen.contains(shard)).collect();
        for (key, number) in gone {
            self.shard_observed(&key, number, None);
        }
    }

    /// A shard as read from the API server, or its absence.
    pub fn shard_observed(&mut self, key: &GatewayKey, number: usize, data: Option<&Data>) {
        // The operator's own write comes back as an event.
        if self.gateways.entry(key.clone()).or_default().observe_shard(number, data) {
            self.changes.shards.insert(key.clone());
        }
        self.forget_if_empty(key);
    }

    /// The revisions that were verified at the broker of a Gateway.
    pub fn proof_observed(&mut self, key: &GatewayKey, proven: BTreeMap<usize, String>) {
        let state = self.gateways.entry(key.clone()).or_default();
        if state.observe_proof(proven) {
            let changed = self.with_changed_revision(key);
            self.changes.devices.extend(changed);
        }
        self.forget_if_empty(key);
    }

    /// Devices whose status contains another revision than their present one.
    fn with_changed_revision(&self, key: &GatewayKey) -> Vec<DeviceKey> {
        let Some(state) = self.gateways.get(key) else { return Vec::new() };
        let changed = state.devices.iter().filter(|(_, record)| record.last_written.revision.as_deref() != record.revision());
        changed.map(|(name, _)| DeviceKey { gateway: key.clone(), name: name.as_ref().into() }).collect()
    }

    /// The plan for the shards of a Gateway with its number, if a write is needed.
    pub fn plan(&mut self, key: &GatewayKey) -> Option<(u64, ShardPlan)> {
        let state = self.gateways.get_mut(key)?;
        let plan = state.plan(&key.namespace, &key.name);
        let number = state.last_plan();
        let changed = state.take_excluded_or_admitted();
        self.changes.devices.extend(changed.into_iter().map(|device| DeviceKey { gateway: key.clone(), name: device.into() }));
        if plan.is_none() {
            // The proof may have come before the plan.
            let waiting = self.with_changed_revision(key);
            self.changes.devices.extend(waiting);
        }
        Some((number, plan?))
    }

    /// A plan has been written.
    pub fn plan_applied(&mut self, key: &GatewayKey, number: u64, plan: ShardPlan) {
        if let Some(state) = self.gateways.get_mut(key) {
            state.completed(plan, number);
        }
        let waiting = self.with_changed_revision(key);
        self.changes.devices.extend(waiting);
    }

    /// Number of declared devices, and of those whose credentials were verified at the broker.
    #[must_use]
    pub fn totals(&self, key: &GatewayKey) -> Option<(usize, usize)> {
        self.complete.then(|| self.gateways.get(key).map_or((0, 0), GatewayState::totals))
    }
}
