//! The state of one Gateway in the index: its devices, workers, shards, and their verified revisions.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;

use k8s_openapi::api::core::v1::Secret;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, OwnerReference};

use super::certificate::Authority;
use super::endpoint::Endpoint;
use super::record::{DeviceRecord, PasswordSource, PasswordState};
use crate::api::name::{self, GATEWAY_LABEL, ROLE_AUTH_SHARD, ROLE_LABEL};
use crate::broker::credential::entry::Entry;
use crate::broker::credential::shard::{self, Data, Shard};
use crate::operator::kubernetes::apply::standard_labels;

/// Number of plans that are kept, so that the proof of an older plan counts. An agent is at most a few plans behind.
const MAX_PLANS: u64 = 64;

/// The state of one Gateway.
#[derive(Debug, Default)]
pub struct GatewayState {
    /// The Gateway as owner of its shards, or `None` if it does not exist.
    pub owner: Option<OwnerReference>,

    /// Whether the broker is external: the operator writes no credentials for it, and verifies none.
    pub external: bool,

    /// The address of the broker, with the uid of the Gateway that reported it.
    pub endpoint: Option<(Box<str>, Arc<Endpoint>)>,

    /// The authority for client certificates, with the uid of the Gateway that reported it.
    pub authority: Option<(Box<str>, Authority)>,

    /// The Devices by name. Boxed, because up to half of the slots of a map are empty.
    pub devices: HashMap<Box<str>, Box<DeviceRecord>>,

    /// Users of the workers that read from the broker, by the Secret with their credentials.
    pub workers: BTreeMap<Box<str>, Vec<Entry>>,

    /// Whether a Device was added since the agent last reported all clients.
    pub appeared: bool,

    /// Whether the operator is connected to the broker.
    pub broker_connected: bool,

    /// Devices whose [`DeviceRecord::excluded`] has changed.
    excluded_or_admitted: Vec<Box<str>>,

    /// Number of the last plan.
    plan: u64,

    /// Number of shards, as shard 0 at the API server states; 0 if there is none.
    count: usize,

    /// Revisions of the shards at the API server.
    live: BTreeMap<usize, String>,

    /// Revisions of the shards that were verified at the broker.
    proven: BTreeMap<usize, String>,

    /// The plan that each revision of a shard belongs to.
    plans: HashMap<(usize, String), u64>,
}

/// The shards of a Gateway that have to be written.
#[derive(Debug)]
pub struct ShardPlan {
    /// Owner of the Secrets.
    pub owner: OwnerReference,

    /// Secrets to write, in this order.
    pub writes: Vec<Secret>,

    /// Names of the existing ones. They are written without a read.
    pub present: BTreeSet<String>,

    /// Names of the Secrets to delete afterwards.
    pub deletes: Vec<String>,

    /// Whether the number of shards is unchanged. Then the order of the writes does not matter.
    pub unordered: bool,

    count: usize,
    revisions: BTreeMap<usize, String>,
}

impl GatewayState {
    /// Whether the state is empty.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.owner.is_none()
            && self.endpoint.is_none()
            && self.authority.is_none()
            && self.devices.is_empty()
            && self.workers.is_empty()
            && self.live.is_empty()
            && self.proven.is_empty()
    }

    /// The address of the broker, if the present Gateway has reported it.
    #[must_use]
    pub fn endpoint(&self) -> Option<&Arc<Endpoint>> {
        let owner = self.owner.as_ref()?;
        self.endpoint.as_ref().filter(|(uid, _)| **uid == *owner.uid).map(|(_, endpoint)| endpoint)
    }

    /// The authority for client certificates, if the present Gateway has reported it.
    #[must_use]
    pub fn authority(&self) -> &Authority {
        const UNKNOWN: &Authority = &Authority::Unknown;
        let owner = self.owner.as_ref().map(|owner| owner.uid.as_str());
        self.authority.as_ref().filter(|(uid, _)| Some(&**uid) == owner).map_or(UNKNOWN, |(_, authority)| authority)
    }

    /// Stores a shard as read from the API server, or its absence. Returns whether it changed.
    pub fn observe_shard(&mut self, number: usize, data: Option<&Data>) -> bool {
        let revision = data.map(shard::revision);
        if self.live.get(&number) == revision.as_ref() {
            return false;
        }
        if number == 0 {
            // A malformed shard counts as absent and is written again.
            self.count = data.and_then(|data| Shard::parse(data).ok()).map_or(0, |shard| shard.count());
        }
        match revision {
            Some(revision) => self.live.insert(number, revision),
            None => self.live.remove(&number),
        };
        true
    }

    /// Numbers of the shards at the API server.
    pub fn shards(&self) -> impl Iterator<Item = usize> {
        self.live.keys().copied()
    }

    /// Stores the verified revisions. Returns whether they changed.
    pub fn observe_proof(&mut self, proven: BTreeMap<usize, String>) -> bool {
        let has_changed = proven != self.proven;
        self.proven = proven;
        has_changed
    }

    /// Whether the current state of the device was verified at the broker.
    #[must_use]
    pub fn has_proven(&self, device: &str, record: &DeviceRecord) -> bool {
        let number = shard::shard_of(device, self.count.max(1));
        let proven = self.proven.get(&number).and_then(|revision| self.plans.get(&(number, revision.clone())));
        matches!((record.planned, proven), (Some(planned), Some(proven)) if *proven >= planned && !record.excluded)
    }

    /// The number of declared devices, and of those whose credentials were verified at the broker.
    #[must_use]
    pub fn totals(&self) -> (usize, usize) {
        let proven = |record: &&DeviceRecord| !self.external && record.enabled && record.last_written.ready;
        (self.devices.len(), self.devices.values().map(Box::as_ref).filter(proven).count())
    }

    /// The writes that bring the shards to the desired state. `None` if there are none, or if a password has not been read yet.
    /// Each Device in the plan stores the plan's number.
    pub fn plan(&mut self, namespace: &str, gateway: &str) -> Option<ShardPlan> {
        let owner = self.owner.clone().filter(|_| !self.external)?;
        // Without the password that has not been read yet, the plan would remove the device from the broker.
        let unread = |record: &DeviceRecord| {
            record.enabled && *record.password() == PasswordState::Unknown && matches!(record.source, PasswordSource::Given { .. })
        };
        if self.devices.values().any(|record| unread(record)) {
            return None;
        }
        self.plan += 1;
        let number = self.plan;
        let mut entries: Vec<Entry> = self.workers.values().flatten().cloned().collect();
        for (device, record) in &mut self.devices {
            entries.extend(record.entry(device).ok().flatten());
            record.planned.get_or_insert(number);
        }
        let count = shard::shard_count(entries.len(), entries.iter().map(Entry::bytes).sum(), self.count);
        let mut shards = Shard::divide(count, entries);
        let excess = shards.iter_mut().flat_map(Shard::take_excess).collect();
        self.exclude(&excess, number);
        let data: Vec<Data> = shards.iter().map(Shard::render).collect();
        let revisions: BTreeMap<usize, String> = data.iter().map(shard::revision).enumerate().collect();
        for (shard, revision) in revisions.iter().filter(|(shard, revision)| self.live.get(shard) == Some(revision)) {
            self.plans.insert((*shard, revision.clone()), number);
        }
        let writes: Vec<Secret> = shard::write_order(self.count, count)
            .into_iter()
            .filter(|shard| self.live.get(shard) != revisions.get(shard))
            .map(|shard| secret(namespace, gateway, shard, data[shard].clone()))
            .collect();
        let deletes: Vec<String> =
            self.live.keys().filter(|shard| **shard >= count).map(|shard| name::auth_shard(gateway, *shard)).collect();
        let present = self.live.keys().map(|shard| name::auth_shard(gateway, *shard)).collect();
        let unordered = count == self.count;
        (!writes.is_empty() || !deletes.is_empty()).then_some(ShardPlan { owner, writes, present, deletes, unordered, count, revisions })
    }

    /// Marks the devices for which the shards of this plan have no room.
    fn exclude(&mut self, excess: &BTreeSet<String>, plan: u64) {
        for (device, record) in &mut self.devices {
            let excluded = excess.contains(&**device);
            if std::mem::replace(&mut record.excluded, excluded) != excluded {
                record.planned = Some(plan);
                self.excluded_or_admitted.push(device.clone());
            }
        }
    }

    /// Devices that were excluded since the last call, or for which there is room again.
    pub fn take_excluded_or_admitted(&mut self) -> Vec<Box<str>> {
        std::mem::take(&mut self.excluded_or_admitted)
    }

    /// A plan has been written.
    pub fn completed(&mut self, plan: ShardPlan, number: u64) {
        self.count = plan.count;
        for (shard, revision) in &plan.revisions {
            self.plans.insert((*shard, revision.clone()), number);
        }
        self.plans.retain(|_, plan| *plan + MAX_PLANS > number);
        self.live = plan.revisions;
    }

    /// Number of the last plan.
    #[must_use]
    pub fn last_plan(&self) -> u64 {
        self.plan
    }
}

fn secret(namespace: &str, gateway: &str, shard: usize, data: Data) -> Secret {
    let mut labels = standard_labels("broker", gateway);
    labels.insert(GATEWAY_LABEL.to_owned(), gateway.to_owned());
    labels.insert(ROLE_LABEL.to_owned(), ROLE_AUTH_SHARD.to_owned());
    Secret {
        metadata: ObjectMeta {
            name: Some(name::auth_shard(gateway, shard)),
            namespace: Some(namespace.to_owned()),
            labels: Some(labels),
            ..ObjectMeta::default()
        },
        data: Some(data),
        ..Secret::default()
    }
}
