//! From observations of the cluster to the fleet.

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
use super::fleet::Fleet;
use super::key::{DeviceKey, GatewayKey};
use super::rotation::Lifetime;
use super::secret::{self, Role};
use super::watch::{GatewayKind, Observation};
use crate::api::name::GATEWAY_LABEL;
use crate::api::{Device, Gateway};
use crate::configuration::agent::{AgentReport, REPORT_KEY};
use crate::operator::kubernetes::apply::owner_reference;

/// Takes observations over into the fleet, and tells when enough has been seen to act: acting on half a view would create
/// Secrets that are there, and throw devices out whose Secrets have not been read yet.
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
    /// Whether every kind has been listed once.
    #[must_use]
    pub fn is_complete(&self) -> bool {
        self.devices_listed && self.gateways_listed && self.shards_listed && self.secrets_listed && self.reports_listed
    }

    /// Whether all Devices have been listed, so that Secrets find theirs.
    #[must_use]
    pub fn has_devices(&self) -> bool {
        self.devices_listed
    }

    /// Takes an observation over into the fleet. Those of Secrets are to come once [`Self::has_devices`] holds.
    pub fn observe(&mut self, fleet: &mut Fleet, observation: Observation) {
        match observation {
            Observation::Device(event) => self.device(fleet, *event),
            Observation::Gateway(event) => self.gateway(fleet, event),
            Observation::Secret(event) => self.secret(fleet, event),
            Observation::Shard(event) => self.shard(fleet, event),
            Observation::Report(event) => self.report(fleet, event),
            Observation::CertificateRequest(event) => certificate_request(fleet, event),
        }
    }

    fn device(&mut self, fleet: &mut Fleet, event: Event<Device>) {
        match event {
            Event::Init => fleet.listing_devices(),
            Event::InitDone => {
                fleet.devices_listed();
                self.devices_listed = true;
            }
            Event::InitApply(device) | Event::Apply(device) => fleet.device_applied(&device),
            Event::Delete(device) => fleet.device_deleted(&device),
        }
    }

    fn gateway(&mut self, fleet: &mut Fleet, event: Event<GatewayKind>) {
        let key = |gateway: &GatewayKind| GatewayKey::new(&gateway.namespace().unwrap_or_default(), &gateway.name_any());
        let apply = |fleet: &mut Fleet, gateway: &GatewayKind| {
            fleet.kind_observed(&key(gateway), gateway.spec.external.is_some());
            let owner = gateway.metadata.deletion_timestamp.is_none().then(|| owner(gateway));
            fleet.gateway_observed(&key(gateway), owner);
        };
        match event {
            Event::Init => self.gateways.clear(),
            Event::InitApply(gateway) => {
                self.gateways.insert(key(&gateway));
                apply(fleet, &gateway);
            }
            Event::InitDone => {
                fleet.gateways_listed(&std::mem::take(&mut self.gateways));
                self.gateways_listed = true;
            }
            Event::Apply(gateway) => apply(fleet, &gateway),
            Event::Delete(gateway) => fleet.gateway_observed(&key(&gateway), None),
        }
    }

    fn secret(&mut self, fleet: &mut Fleet, event: Event<Secret>) {
        match event {
            Event::Init => fleet.listing_secrets(),
            Event::InitDone => {
                fleet.generated_secrets_listed();
                self.secrets_listed = true;
            }
            Event::InitApply(secret) | Event::Apply(secret) => apply_secret(fleet, &secret),
            Event::Delete(secret) => delete_secret(fleet, &secret),
        }
    }

    fn shard(&mut self, fleet: &mut Fleet, event: Event<Secret>) {
        match event {
            Event::Init => self.shards.clear(),
            Event::InitApply(secret) => {
                if let Role::Shard(key, number) = secret::role(&secret) {
                    self.shards.insert((key, number));
                }
                apply_secret(fleet, &secret);
            }
            Event::InitDone => {
                fleet.shards_listed(&std::mem::take(&mut self.shards));
                self.shards_listed = true;
            }
            Event::Apply(secret) => apply_secret(fleet, &secret),
            Event::Delete(secret) => delete_secret(fleet, &secret),
        }
    }

    fn report(&mut self, fleet: &mut Fleet, event: Event<ConfigMap>) {
        match event {
            Event::Init => {}
            Event::InitDone => self.reports_listed = true,
            Event::InitApply(report) | Event::Apply(report) => observe_report(fleet, &report, read_report(&report)),
            Event::Delete(report) => observe_report(fleet, &report, BTreeMap::new()),
        }
    }
}

fn owner(gateway: &GatewayKind) -> OwnerReference {
    owner_reference(&PartialObjectMeta::<Gateway> { types: None, metadata: gateway.metadata.clone(), _phantom: PhantomData })
}

fn apply_secret(fleet: &mut Fleet, secret: &Secret) {
    let namespace = secret.namespace().unwrap_or_default();
    match secret::role(secret) {
        Role::Generated(key, uid) => {
            let password = secret::read_generated(&key, &uid, secret);
            fleet.generated_observed(&key, &uid, password, Lifetime::of(secret), Timestamp::now().as_second());
        }
        Role::Shard(key, number) => fleet.shard_observed(&key, number, secret.data.as_ref()),
        Role::Workers => match secret::read_workers(secret) {
            Ok(users) => fleet.workers_observed(&namespace, &secret.name_any(), &users),
            Err(cause) => warn!(namespace, name = secret.name_any(), cause, "failed to read the credential of a Pipeline's workers"),
        },
        Role::Link(gateway) => match secret::read_link(secret) {
            Ok(user) => fleet.workers_observed(&namespace, &secret.name_any(), &BTreeMap::from([(gateway.name.to_string(), vec![user])])),
            Err(cause) => warn!(namespace, name = secret.name_any(), cause, "failed to read the operator's credential for a Gateway"),
        },
        Role::Other => fleet.given_secret_changed(&namespace, &secret.name_any()),
    }
}

fn delete_secret(fleet: &mut Fleet, secret: &Secret) {
    let namespace = secret.namespace().unwrap_or_default();
    match secret::role(secret) {
        Role::Generated(key, uid) => fleet.generated_secret_deleted(&key, &uid),
        Role::Shard(key, number) => fleet.shard_observed(&key, number, None),
        Role::Workers | Role::Link(_) => fleet.workers_observed(&namespace, &secret.name_any(), &BTreeMap::new()),
        Role::Other => fleet.given_secret_changed(&namespace, &secret.name_any()),
    }
}

/// That it is gone is news as well: it may have been deleted so that it is made anew.
fn certificate_request(fleet: &mut Fleet, event: Event<PartialObjectMeta<CertificateRequest>>) {
    let request = match event {
        Event::Init => return,
        Event::InitDone => return fleet.certificate_requests_listed(),
        Event::InitApply(request) | Event::Apply(request) | Event::Delete(request) => request,
    };
    let device = request.owner_references().iter().find(|owner| owner.kind == Device::kind(&()));
    if let (Some(gateway), Some(device)) = (request.labels().get(GATEWAY_LABEL), device) {
        let gateway = GatewayKey::new(&request.namespace().unwrap_or_default(), gateway);
        fleet.certificate_request_changed(&DeviceKey { gateway, name: device.name.as_str().into() });
    }
}

fn observe_report(fleet: &mut Fleet, report: &ConfigMap, proven: BTreeMap<usize, String>) {
    if let Some(gateway) = report.labels().get(GATEWAY_LABEL) {
        fleet.proof_observed(&GatewayKey::new(&report.namespace().unwrap_or_default(), gateway), proven);
    }
}

fn read_report(report: &ConfigMap) -> BTreeMap<usize, String> {
    let Some(text) = report.data.as_ref().and_then(|data| data.get(REPORT_KEY)) else {
        return BTreeMap::new();
    };
    match serde_json::from_str::<AgentReport>(text) {
        Ok(report) => report.shards,
        Err(error) => {
            warn!(name = report.name_any(), %error, "failed to read the report of an agent: taken for none");
            BTreeMap::new()
        }
    }
}
