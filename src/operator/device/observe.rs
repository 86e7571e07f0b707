//! Updates the index from watch events.

use std::collections::{BTreeMap, HashSet};
use std::marker::PhantomData;

use k8s_openapi::api::core::v1::{ConfigMap, Secret};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::OwnerReference;
use k8s_openapi::jiff::Timestamp;
use kube::core::PartialObjectMeta;
use kube::runtime::watcher::Event;
use kube::{Resource, ResourceExt};
use tracing::warn;

use super::certificate_request::CertificateRequest;
use super::index::DeviceIndex;
use super::key::{DeviceKey, GatewayKey};
use super::rotation::Lifetime;
use super::secret::{self, Role};
use super::watch::{GatewayKind, Observation};
use crate::api::name::GATEWAY_LABEL;
use crate::api::{Device, Gateway};
use crate::configuration::agent::{AgentReport, REPORT_KEY};
use crate::operator::kubernetes::apply::owner_reference;

/// Updates the index from watch events, and reports when all objects have been listed. Acting on an incomplete view would create
/// Secrets that exist, and remove devices whose Secrets have not been read yet.
#[allow(clippy::struct_excessive_bools, reason = "each says of one kind that it has been listed")]
#[derive(Debug, Default)]
pub struct Observer {
    devices_listed: bool,
    gateways: HashSet<GatewayKey>,
    gateways_listed: bool,
    shards: HashSet<(GatewayKey, usize)>,
    shards_listed: bool,
    secrets_listed: bool,
    reports_listed: bool,
}

impl Observer {
    /// Whether all kinds have been listed once.
    #[must_use]
    pub fn is_complete(&self) -> bool {
        self.devices_listed && self.gateways_listed && self.shards_listed && self.secrets_listed && self.reports_listed
    }

    /// Whether all Devices have been listed.
    #[must_use]
    pub fn has_devices(&self) -> bool {
        self.devices_listed
    }

    /// Updates the index. Events of Secrets may only come once [`Self::has_devices`] is true.
    pub fn observe(&mut self, index: &mut DeviceIndex, observation: Observation) {
        match observation {
            Observation::Device(event) => self.device(index, *event),
            Observation::Gateway(event) => self.gateway(index, event),
            Observation::Secret(event) => self.secret(index, event),
            Observation::Shard(event) => self.shard(index, event),
            Observation::Report(event) => self.report(index, event),
            Observation::CertificateRequest(event) => certificate_request(index, event),
        }
    }

    fn device(&mut self, index: &mut DeviceIndex, event: Event<Device>) {
        match event {
            Event::Init => index.listing_devices(),
            Event::InitDone => {
                index.devices_listed();
                self.devices_listed = true;
            }
            Event::InitApply(device) | Event::Apply(device) => index.device_applied(&device),
            Event::Delete(device) => index.device_deleted(&device),
        }
    }

    fn gateway(&mut self, index: &mut DeviceIndex, event: Event<GatewayKind>) {
        let key = |gateway: &GatewayKind| GatewayKey::new(&gateway.namespace().unwrap_or_default(), &gateway.name_any());
        let apply = |index: &mut DeviceIndex, gateway: &GatewayKind| {
            index.kind_observed(&key(gateway), gateway.spec.external.is_some());
            let owner = gateway.metadata.deletion_timestamp.is_none().then(|| owner(gateway));
            index.gateway_observed(&key(gateway), owner);
        };
        match event {
            Event::Init => self.gateways.clear(),
            Event::InitApply(gateway) => {
                self.gateways.insert(key(&gateway));
                apply(index, &gateway);
            }
            Event::InitDone => {
                index.gateways_listed(&std::mem::take(&mut self.gateways));
                self.gateways_listed = true;
            }
            Event::Apply(gateway) => apply(index, &gateway),
            Event::Delete(gateway) => index.gateway_observed(&key(&gateway), None),
        }
    }

    fn secret(&mut self, index: &mut DeviceIndex, event: Event<Secret>) {
        match event {
            Event::Init => index.listing_secrets(),
            Event::InitDone => {
                index.generated_secrets_listed();
                self.secrets_listed = true;
            }
            Event::InitApply(secret) | Event::Apply(secret) => apply_secret(index, &secret),
            Event::Delete(secret) => delete_secret(index, &secret),
        }
    }

    fn shard(&mut self, index: &mut DeviceIndex, event: Event<Secret>) {
        match event {
            Event::Init => self.shards.clear(),
            Event::InitApply(secret) => {
                if let Role::Shard(key, number) = secret::role(&secret) {
                    self.shards.insert((key, number));
                }
                apply_secret(index, &secret);
            }
            Event::InitDone => {
                index.shards_listed(&std::mem::take(&mut self.shards));
                self.shards_listed = true;
            }
            Event::Apply(secret) => apply_secret(index, &secret),
            Event::Delete(secret) => delete_secret(index, &secret),
        }
    }

    fn report(&mut self, index: &mut DeviceIndex, event: Event<ConfigMap>) {
        match event {
            Event::Init => {}
            Event::InitDone => self.reports_listed = true,
            Event::InitApply(report) | Event::Apply(report) => observe_report(index, &report, read_report(&report)),
            Event::Delete(report) => observe_report(index, &report, BTreeMap::new()),
        }
    }
}

fn owner(gateway: &GatewayKind) -> OwnerReference {
    owner_reference(&PartialObjectMeta::<Gateway> { types: None, metadata: gateway.metadata.clone(), _phantom: PhantomData })
}

fn apply_secret(index: &mut DeviceIndex, secret: &Secret) {
    let namespace = secret.namespace().unwrap_or_default();
    match secret::role(secret) {
        Role::Generated(key, uid) => {
            let password = secret::read_generated(&key, &uid, secret);
            index.generated_observed(&key, &uid, password, Lifetime::of(secret), Timestamp::now().as_second());
        }
        Role::Shard(key, number) => index.shard_observed(&key, number, secret.data.as_ref()),
        Role::Workers => match secret::read_workers(secret) {
            Ok(users) => index.workers_observed(&namespace, &secret.name_any(), &users),
            Err(cause) => warn!(namespace, name = secret.name_any(), cause, "failed to read the credential of a Pipeline's workers"),
        },
        Role::Link(gateway) => match secret::read_link(secret) {
            Ok(user) => index.workers_observed(&namespace, &secret.name_any(), &BTreeMap::from([(gateway.name.to_string(), vec![user])])),
            Err(cause) => warn!(namespace, name = secret.name_any(), cause, "failed to read the operator's credential for a Gateway"),
        },
        Role::Other => index.given_secret_changed(&namespace, &secret.name_any()),
    }
}

fn delete_secret(index: &mut DeviceIndex, secret: &Secret) {
    let namespace = secret.namespace().unwrap_or_default();
    match secret::role(secret) {
        Role::Generated(key, uid) => index.generated_secret_deleted(&key, &uid),
        Role::Shard(key, number) => index.shard_observed(&key, number, None),
        Role::Workers | Role::Link(_) => index.workers_observed(&namespace, &secret.name_any(), &BTreeMap::new()),
        Role::Other => index.given_secret_changed(&namespace, &secret.name_any()),
    }
}

fn certificate_request(index: &mut DeviceIndex, event: Event<PartialObjectMeta<CertificateRequest>>) {
    let (request, exists) = match event {
        Event::Init => return,
        Event::InitDone => return index.certificate_requests_listed(),
        Event::InitApply(request) | Event::Apply(request) => (request, true),
        // A user deletes a request to have it created again.
        Event::Delete(request) => (request, false),
    };
    let device = request.owner_references().iter().find(|owner| owner.kind == Device::kind(&()));
    if let (Some(gateway), Some(device)) = (request.labels().get(GATEWAY_LABEL), device) {
        let gateway = GatewayKey::new(&request.namespace().unwrap_or_default(), gateway);
        index.certificate_request_observed(&DeviceKey { gateway, name: device.name.as_str().into() }, &device.uid, exists);
    }
}

fn observe_report(index: &mut DeviceIndex, report: &ConfigMap, proven: BTreeMap<usize, String>) {
    if let Some(gateway) = report.labels().get(GATEWAY_LABEL) {
        index.proof_observed(&GatewayKey::new(&report.namespace().unwrap_or_default(), gateway), proven);
    }
}

fn read_report(report: &ConfigMap) -> BTreeMap<usize, String> {
    let Some(text) = report.data.as_ref().and_then(|data| data.get(REPORT_KEY)) else {
        return BTreeMap::new();
    };
    match serde_json::from_str::<AgentReport>(text) {
        Ok(report) => report.shards,
        Err(error) => {
            warn!(name = report.name_any(), %error, "failed to read the report of an agent: ignoring it");
            BTreeMap::new()
        }
    }
}
