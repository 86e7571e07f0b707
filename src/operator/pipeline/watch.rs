//! The watches that trigger the reconciliation of a Pipeline: itself, its owned objects, the Secret and the ConfigMap it names, the
//! Gateways of its namespace and the Secrets of their logins, its table.

use std::collections::{BTreeMap, BTreeSet};

use futures::{Stream, StreamExt, stream};
use k8s_openapi::api::apps::v1::StatefulSet;
use k8s_openapi::api::core::v1::{ConfigMap, Secret, Service};
use k8s_openapi::api::networking::v1::NetworkPolicy;
use kube::ResourceExt;
use kube::core::PartialObjectMeta;
use kube::runtime::controller::Controller;
use kube::runtime::reflector::{ObjectRef, Store};
use kube::runtime::watcher::{self, Config, Event};
use tokio::sync::mpsc::UnboundedReceiver;

use crate::api::name::{GATEWAY_LABEL, PIPELINE_LABEL, ROLE_LABEL};
use crate::api::{Gateway, Pipeline};
use crate::operator::kubernetes::namespaces::WatchedNamespaces;
use crate::operator::twin_sync::external::SharedExternals;

/// Adds all watches. `drifted` receives the Pipelines whose table no longer matches the spec.
pub fn subscribe(
    controller: Controller<Pipeline>,
    namespaces: &WatchedNamespaces,
    drifted: UnboundedReceiver<ObjectRef<Pipeline>>,
    externals: SharedExternals,
) -> Controller<Pipeline> {
    let ours = Config::default().labels(PIPELINE_LABEL);
    // The operator's own Secrets are many, and no spec names them.
    let secrets = Config::default().labels(&format!("!{ROLE_LABEL}"));
    let descriptors = Config::default().labels(&format!("!{PIPELINE_LABEL},!{GATEWAY_LABEL}"));
    let (naming, describing, reading) = (controller.store(), controller.store(), controller.store());
    let gateways = relabelled(namespaces.watch(&Config::default()));
    let drifted = stream::unfold(drifted, |mut drifted| async { drifted.recv().await.map(|key| (key, drifted)) });
    let controller = namespaces.own::<_, StatefulSet>(controller, &ours);
    let controller = namespaces.own::<_, Service>(controller, &ours);
    let controller = namespaces.own::<_, ConfigMap>(controller, &ours);
    let controller = namespaces.own::<_, NetworkPolicy>(controller, &ours);
    namespaces
        .own::<_, Secret>(controller, &ours)
        .watches_stream(namespaces.changes::<PartialObjectMeta<Secret>>(&secrets), move |secret| {
            let (namespace, name) = (secret.namespace().unwrap_or_default(), secret.name_any());
            let is_login = externals.log_in_with(&namespace, &name);
            let named = |pipeline: &Pipeline| is_login || pipeline.spec.sink.timescale.connection_secret.name == name;
            of_namespace(&naming, Some(&namespace), named)
        })
        .watches_stream(namespaces.changes::<PartialObjectMeta<ConfigMap>>(&descriptors), move |map| {
            let named = |pipeline: &Pipeline| {
                pipeline.spec.decode.protobuf.as_ref().is_some_and(|protobuf| protobuf.config_map_ref.name == map.name_any())
            };
            of_namespace(&describing, map.namespace().as_deref(), named)
        })
        .watches_stream(gateways, move |gateway| of_namespace(&reading, gateway.namespace().as_deref(), |_| true))
        .reconcile_on(drifted)
}

/// The Pipelines of a namespace that match the predicate.
fn of_namespace(pipelines: &Store<Pipeline>, namespace: Option<&str>, applies: impl Fn(&Pipeline) -> bool) -> Vec<ObjectRef<Pipeline>> {
    let pipelines = pipelines.state().into_iter();
    let pipelines = pipelines.filter(|pipeline| pipeline.metadata.namespace.as_deref() == namespace && applies(pipeline));
    pipelines.map(|pipeline| ObjectRef::from_obj(pipeline.as_ref())).collect()
}

type Metadata = PartialObjectMeta<Gateway>;

/// Gateways that were created or deleted, or whose labels or spec changed. It excludes changes of the status, which every Device causes.
fn relabelled(
    events: impl Stream<Item = watcher::Result<Event<Metadata>>> + Send + 'static,
) -> impl Stream<Item = watcher::Result<Metadata>> + Send + 'static {
    let mut known = Known::default();
    events.flat_map(move |event| {
        stream::iter(match event {
            Ok(event) => known.observe(event).into_iter().map(Ok).collect::<Vec<_>>(),
            Err(error) => vec![Err(error)],
        })
    })
}

/// Gateways by namespace and name, and the Gateways of the list in progress.
#[derive(Default)]
struct Known {
    gateways: BTreeMap<(String, String), Metadata>,
    listed: BTreeSet<(String, String)>,
}

impl Known {
    /// The Gateways whose Pipelines need a reconciliation after this event.
    fn observe(&mut self, event: Event<Metadata>) -> Vec<Metadata> {
        let key = |gateway: &Metadata| (gateway.namespace().unwrap_or_default(), gateway.name_any());
        match event {
            Event::Init => {
                self.listed.clear();
                Vec::new()
            }
            Event::InitApply(gateway) => {
                self.listed.insert(key(&gateway));
                self.applied(key(&gateway), gateway)
            }
            Event::Apply(gateway) => self.applied(key(&gateway), gateway),
            Event::Delete(gateway) => {
                self.gateways.remove(&key(&gateway));
                vec![gateway]
            }
            Event::InitDone => {
                let listed = std::mem::take(&mut self.listed);
                let gone: Vec<_> = self.gateways.keys().filter(|key| !listed.contains(*key)).cloned().collect();
                gone.iter().filter_map(|key| self.gateways.remove(key)).collect()
            }
        }
    }

    fn applied(&mut self, key: (String, String), gateway: Metadata) -> Vec<Metadata> {
        let view = |gateway: &Metadata| {
            let metadata = &gateway.metadata;
            (gateway.labels().clone(), metadata.generation, metadata.deletion_timestamp.is_some())
        };
        let before = self.gateways.insert(key, gateway.clone());
        if before.is_some_and(|before| view(&before) == view(&gateway)) { Vec::new() } else { vec![gateway] }
    }
}

#[cfg(test)]
mod tests {
    use kube::api::ObjectMeta;

    use super::*;

    fn gateway(name: &str, site: &str) -> Metadata {
        let metadata = ObjectMeta {
            name: Some(name.to_owned()),
            namespace: Some("plant".to_owned()),
            labels: Some([("site".to_owned(), site.to_owned())].into()),
            ..ObjectMeta::default()
        };
        PartialObjectMeta { types: None, metadata, _phantom: std::marker::PhantomData }
    }

    fn names(known: &mut Known, event: Event<Metadata>) -> Vec<String> {
        known.observe(event).iter().map(ResourceExt::name_any).collect()
    }

    #[test]
    fn only_changes_of_labels_spec_and_existence_trigger_a_reconciliation() {
        let mut known = Known::default();
        assert_eq!(names(&mut known, Event::Apply(gateway("a", "north"))), ["a"]);
        assert!(names(&mut known, Event::Apply(gateway("a", "north"))).is_empty(), "only its status changed");
        assert_eq!(names(&mut known, Event::Apply(gateway("a", "south"))), ["a"]);
        let mut moved = gateway("a", "south");
        moved.metadata.generation = Some(2);
        assert_eq!(names(&mut known, Event::Apply(moved.clone())), ["a"], "an external broker may have another address");
        let mut leaving = moved;
        leaving.metadata.deletion_timestamp = Some(k8s_openapi::apimachinery::pkg::apis::meta::v1::Time(jiff::Timestamp::UNIX_EPOCH));
        assert_eq!(names(&mut known, Event::Apply(leaving.clone())), ["a"]);
        assert_eq!(names(&mut known, Event::Delete(leaving)), ["a"]);
    }

    #[test]
    fn gateways_missing_from_a_new_list_are_deleted() {
        let mut known = Known::default();
        known.observe(Event::Apply(gateway("a", "north")));
        known.observe(Event::Apply(gateway("b", "north")));
        for expected in [vec!["a"], vec![]] {
            assert!(names(&mut known, Event::Init).is_empty());
            assert!(names(&mut known, Event::InitApply(gateway("b", "north"))).is_empty());
            assert_eq!(names(&mut known, Event::InitDone), expected);
        }
    }
}
