//! The watches that trigger the reconciliation of a Gateway: itself, its owned objects, the Secrets it names, its agent's report.

use std::collections::{BTreeMap, HashMap};

use futures::{Stream, StreamExt};
use k8s_openapi::api::apps::v1::StatefulSet;
use k8s_openapi::api::core::v1::{ConfigMap, Secret, Service, ServiceAccount};
use k8s_openapi::api::networking::v1::NetworkPolicy;
use k8s_openapi::api::policy::v1::PodDisruptionBudget;
use k8s_openapi::api::rbac::v1::{Role, RoleBinding};
use kube::ResourceExt;
use kube::core::PartialObjectMeta;
use kube::runtime::controller::Controller;
use kube::runtime::reflector::{ObjectRef, Store};
use kube::runtime::watcher::{self, Config, Event};
use tokio::sync::mpsc::UnboundedReceiver;

use super::observe::parse_report;
use crate::api::Gateway;
use crate::api::name::{
    GATEWAY_LABEL, ROLE_AGENT_REPORT, ROLE_AUTH_SHARD, ROLE_LABEL, ROLE_LINK_CREDENTIALS, internal_authority, internal_certificate,
    server_authority, server_certificate,
};
use crate::configuration::agent::{Fullness, PresentedCertificate};
use crate::operator::device::key::GatewayKey;
use crate::operator::kubernetes::namespaces::WatchedNamespaces;

/// Every owned object has the label of its Gateway; another reconciler owns the shards of its credentials.
fn ours() -> Config {
    Config::default().labels(&format!("{GATEWAY_LABEL},{ROLE_LABEL}!={ROLE_AUTH_SHARD}"))
}

/// Adds all watches. `requests` receives Gateways to reconcile for other reasons.
pub fn subscribe(
    controller: Controller<Gateway>,
    namespaces: &WatchedNamespaces,
    requests: UnboundedReceiver<GatewayKey>,
) -> Controller<Gateway> {
    let (gateways, externals) = (controller.store(), controller.store());
    let configurations = notable(namespaces.watch(&ours()));
    let tls = Config::default().fields("type=kubernetes.io/tls");
    // The operator's own Secrets are many, and no spec names them.
    let others = Config::default().labels(&format!("!{ROLE_LABEL}"));
    let requests = futures::stream::unfold(requests, |mut requests| async { requests.recv().await.map(|key| (key, requests)) })
        .map(|key| ObjectRef::new(&key.name).within(&key.namespace));
    let links = Config::default().labels(&format!("{ROLE_LABEL}={ROLE_LINK_CREDENTIALS}"));
    let ours = ours();
    let controller = namespaces.own::<_, StatefulSet>(controller, &ours);
    let controller = namespaces.own::<_, Service>(controller, &ours);
    let controller = namespaces.own::<_, ServiceAccount>(controller, &ours);
    let controller = namespaces.own::<_, Role>(controller, &ours);
    let controller = namespaces.own::<_, RoleBinding>(controller, &ours);
    let controller = namespaces.own::<_, NetworkPolicy>(controller, &ours);
    let controller = namespaces.own::<_, PodDisruptionBudget>(controller, &ours);
    namespaces
        .own::<_, Secret>(controller, &links)
        .owns_stream(configurations)
        .watches_stream(namespaces.changes::<PartialObjectMeta<Secret>>(&tls), move |secret| naming(&gateways, &secret))
        .watches_stream(namespaces.changes::<PartialObjectMeta<Secret>>(&others), move |secret| logging_in_with(&externals, &secret))
        .reconcile_on(requests)
}

/// Gateways whose listeners, internal ports or authorities use this Secret.
fn naming(gateways: &Store<Gateway>, secret: &PartialObjectMeta<Secret>) -> Vec<ObjectRef<Gateway>> {
    let name = secret.name_any();
    let presents = |gateway: &Gateway| {
        gateway.spec.listeners.iter().filter_map(|listener| listener.tls_secret(&gateway.name_any())).any(|secret| {
            secret == name || (secret == server_certificate(&gateway.name_any()) && name == server_authority(&gateway.name_any()))
        })
    };
    let names = |gateway: &Gateway| {
        let signs = gateway.spec.client_authority.as_ref().is_some_and(|authority| authority.secret_name == name);
        let own = gateway.name_any();
        let internal = gateway.spec.external.is_none() && [internal_authority(&own), internal_certificate(&own)].contains(&name);
        gateway.namespace() == secret.namespace() && (signs || internal || presents(gateway))
    };
    gateways.state().iter().filter(|gateway| names(gateway)).map(|gateway| ObjectRef::from_obj(gateway.as_ref())).collect()
}

/// Gateways whose external broker uses this Secret.
fn logging_in_with(gateways: &Store<Gateway>, secret: &PartialObjectMeta<Secret>) -> Vec<ObjectRef<Gateway>> {
    let name = secret.name_any();
    let names = |gateway: &Gateway| {
        let external = gateway.spec.external.as_ref();
        gateway.namespace() == secret.namespace() && external.is_some_and(|external| external.secrets().any(|secret| secret == name))
    };
    gateways.state().iter().filter(|gateway| names(gateway)).map(|gateway| ObjectRef::from_obj(gateway.as_ref())).collect()
}

/// ConfigMaps of Gateways, without changes of agents' reports that do not affect a Gateway's status: a report changes
/// with every change of a credential.
fn notable(
    events: impl Stream<Item = watcher::Result<Event<ConfigMap>>> + Send + 'static,
) -> impl Stream<Item = watcher::Result<ConfigMap>> + Send + 'static {
    let mut known: HashMap<String, Notable> = HashMap::new();
    events.filter_map(move |event| {
        let notable = match event {
            Ok(Event::Apply(object) | Event::InitApply(object)) => {
                let now = Notable::of(&object);
                let has_changed = now.is_none() || known.get(&key(&object)) != now.as_ref();
                if let Some(now) = now {
                    known.insert(key(&object), now);
                }
                has_changed.then_some(Ok(object))
            }
            Ok(Event::Delete(object)) => {
                known.remove(&key(&object));
                Some(Ok(object))
            }
            Ok(Event::Init | Event::InitDone) => None,
            Err(error) => Some(Err(error)),
        };
        std::future::ready(notable)
    })
}

fn key(object: &ConfigMap) -> String {
    format!("{}/{}", object.namespace().unwrap_or_default(), object.name_any())
}

/// The part of an agent's report that affects a Gateway's status.
#[derive(Debug, Eq, PartialEq)]
struct Notable {
    uid: Option<String>,
    labels: BTreeMap<String, String>,
    messages_dropped: Option<bool>,
    fullness: Option<Fullness>,
    certificates: BTreeMap<String, PresentedCertificate>,
}

impl Notable {
    fn of(object: &ConfigMap) -> Option<Self> {
        let is_report = object.labels().get(ROLE_LABEL).map(String::as_str) == Some(ROLE_AGENT_REPORT);
        is_report.then(|| {
            let report = parse_report(object);
            Self {
                uid: object.uid(),
                labels: object.labels().clone(),
                messages_dropped: report.as_ref().map(|report| report.messages_dropped),
                fullness: report.as_ref().map(|report| report.fullness.clone()),
                certificates: report.map(|report| report.certificates).unwrap_or_default(),
            }
        })
    }
}

#[cfg(test)]
#[path = "watch_tests.rs"]
mod tests;
