//! Watches that skip objects that cannot be read: another version of this program may have written them.

use futures::{Stream, StreamExt};
use kube::core::DeserializeGuard;
use kube::runtime::controller::Controller;
use kube::runtime::reflector::{self, reflector};
use kube::runtime::watcher::{self, Config, Event};
use kube::runtime::{PredicateConfig, WatchStreamExt};
use kube::{Resource, ResourceExt};
use tracing::warn;

use super::apply::Kind;
use super::namespaces::WatchedNamespaces;

/// A controller of the readable objects of a kind in these namespaces. An object is reconciled when its `digest` changes; without a digest, at each change.
#[must_use]
pub fn controller<K: Kind + Send + Sync + 'static>(
    namespaces: &WatchedNamespaces,
    digest: impl Fn(&K) -> Option<u64> + Send + Sync + 'static,
) -> Controller<K> {
    let (store, writer) = reflector::store();
    let events = readable(namespaces.watch::<DeserializeGuard<K>>(&Config::default()));
    let changes = reflector(writer, events).applied_objects().predicate_filter(digest, PredicateConfig::default());
    Controller::for_stream(changes, store)
}

/// The events of readable objects. An unreadable object is logged and ignored.
pub fn readable<K: Resource<DynamicType = ()> + Send>(
    events: impl Stream<Item = watcher::Result<Event<DeserializeGuard<K>>>> + Send,
) -> impl Stream<Item = watcher::Result<Event<K>>> + Send {
    events.filter_map(|event| std::future::ready(event.map(open_event).transpose()))
}

fn open_event<K: Resource<DynamicType = ()>>(event: Event<DeserializeGuard<K>>) -> Option<Event<K>> {
    Some(match event {
        Event::Init => Event::Init,
        Event::InitDone => Event::InitDone,
        Event::InitApply(guard) => Event::InitApply(open(guard)?),
        Event::Apply(guard) => Event::Apply(open(guard)?),
        Event::Delete(guard) => Event::Delete(open(guard)?),
    })
}

fn open<K: Resource<DynamicType = ()>>(guard: DeserializeGuard<K>) -> Option<K> {
    let (namespace, name) = (guard.namespace(), guard.name_any());
    let log = |error: &kube::core::error_boundary::InvalidObject| {
        warn!(kind = %K::kind(&()), namespace, name, error = error.error, "failed to read an object: ignoring it");
    };
    guard.0.inspect_err(log).ok()
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;
    use crate::api::Gateway;

    fn gateway(name: &str, spec: &Value) -> DeserializeGuard<Gateway> {
        let object = json!({"apiVersion": "fleetwright.io/v1alpha1", "kind": "Gateway", "metadata": {"name": name}, "spec": spec});
        serde_json::from_value(object).unwrap()
    }

    #[tokio::test]
    async fn an_object_that_cannot_be_read_hides_no_other() {
        let events = [
            Event::Init,
            Event::InitApply(gateway("broken", &json!({"listeners": "none"}))),
            Event::InitApply(gateway("a", &json!({}))),
            Event::InitDone,
            Event::Apply(gateway("broken", &json!({"durability": 7}))),
            Event::Apply(gateway("b", &json!({}))),
            Event::Delete(gateway("a", &json!({}))),
        ];
        let read: Vec<String> = readable(futures::stream::iter(events.map(Ok)))
            .map(|event| match event.unwrap() {
                Event::Init => "init".to_owned(),
                Event::InitDone => "done".to_owned(),
                Event::InitApply(gateway) | Event::Apply(gateway) => gateway.name_any(),
                Event::Delete(gateway) => format!("-{}", gateway.name_any()),
            })
            .collect()
            .await;
        assert_eq!(read, ["init", "a", "done", "b", "-a"]);
    }
}
