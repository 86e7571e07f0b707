//! The namespaces that the operator watches: all, or a list. With a list it needs no permission outside these namespaces.

use std::pin::pin;
use std::sync::Arc;

use futures::stream::{self, BoxStream, SelectAll, select_all};
use futures::{Stream, StreamExt};
use kube::core::NamespaceResourceScope;
use kube::runtime::WatchStreamExt;
use kube::runtime::controller::Controller;
use kube::runtime::watcher::{self, Config, Event, watcher};
use kube::{Api, Client, Resource};
use serde::de::DeserializeOwned;

/// The namespaces whose objects the operator reconciles, with the client for their watches.
#[derive(Clone)]
pub struct WatchedNamespaces {
    client: Client,
    /// `None`: all.
    list: Option<Arc<[String]>>,
}

impl WatchedNamespaces {
    /// These namespaces, or all if the list is empty.
    #[must_use]
    pub fn new(client: Client, list: &[String]) -> Self {
        let mut list = list.to_vec();
        list.sort_unstable();
        list.dedup();
        Self { client, list: (!list.is_empty()).then(|| list.into()) }
    }

    /// The objects of a kind: one API for all namespaces, or one for each namespace of the list.
    #[must_use]
    pub fn apis<K>(&self) -> Vec<Api<K>>
    where
        K: Resource<Scope = NamespaceResourceScope, DynamicType: Default>,
    {
        self.apis_with(|client, namespace| match namespace {
            None => Api::all(client),
            Some(namespace) => Api::namespaced(client, namespace),
        })
    }

    /// The APIs that `api` makes: one for all namespaces (`None`), or one for each namespace of the list.
    pub fn apis_with<K>(&self, api: impl Fn(Client, Option<&str>) -> Api<K>) -> Vec<Api<K>> {
        match &self.list {
            None => vec![api(self.client.clone(), None)],
            Some(list) => list.iter().map(|namespace| api(self.client.clone(), Some(namespace))).collect(),
        }
    }

    /// Watches the objects of a kind, as [`watch`].
    #[must_use]
    pub fn watch<K>(&self, config: &Config) -> BoxStream<'static, watcher::Result<Event<K>>>
    where
        K: Watched + Resource<Scope = NamespaceResourceScope, DynamicType: Default>,
    {
        watch(self.apis(), config)
    }

    /// The objects of a kind that were created, changed or deleted, to trigger the reconciliation of others.
    #[must_use]
    pub fn changes<K>(&self, config: &Config) -> BoxStream<'static, watcher::Result<K>>
    where
        K: Watched + Resource<Scope = NamespaceResourceScope, DynamicType: Default>,
    {
        self.watch(config).touched_objects().boxed()
    }

    /// Lets a change of an owned object trigger the reconciliation of its owner.
    pub fn own<K, Child>(&self, controller: Controller<K>, config: &Config) -> Controller<K>
    where
        K: Watched + Sync + Resource<DynamicType = ()>,
        Child: Watched + Resource<Scope = NamespaceResourceScope, DynamicType = ()>,
    {
        self.apis::<Child>().into_iter().fold(controller, |controller, api| controller.owns(api, config.clone()))
    }
}

/// An object that can be watched.
pub trait Watched: Resource + Clone + DeserializeOwned + std::fmt::Debug + Send + 'static {}

impl<K: Resource + Clone + DeserializeOwned + std::fmt::Debug + Send + 'static> Watched for K {}

/// Watches the objects of all these APIs as one: `InitDone` follows when every API has been listed. Until then nothing is complete, because
/// an object that is missing in a list counts as deleted. If one of several watches begins again, all do.
#[must_use]
pub fn watch<K: Watched>(apis: Vec<Api<K>>, config: &Config) -> BoxStream<'static, watcher::Result<Event<K>>> {
    if let [api] = &apis[..] {
        return watcher(api.clone(), config.clone()).boxed();
    }
    let config = config.clone();
    // Each watch waits after its own failure.
    merged(move || apis.iter().map(|api| watcher(api.clone(), config.clone()).default_backoff().boxed()).collect()).boxed()
}

type Events<K> = BoxStream<'static, watcher::Result<Event<K>>>;

/// The state of several watches that are merged.
enum Merged<K> {
    /// They are to be started.
    Begin,
    /// Those that are not listed yet, the current one last, and those that are. A listed watch is not polled, since its changes are not part
    /// of the list. `partial`: whether the current one has returned an object.
    Listing { left: Vec<Events<K>>, listed: Vec<Events<K>>, partial: bool },
    /// All are listed.
    Listed(SelectAll<Events<K>>),
}

/// Merges the watches that `start` returns, as [`watch`].
fn merged<K: Send + 'static>(
    start: impl Fn() -> Vec<Events<K>> + Send + Sync + 'static,
) -> impl Stream<Item = watcher::Result<Event<K>>> + Send + 'static {
    stream::unfold((Merged::Begin, start), |(mut state, start)| async move {
        loop {
            let (next, event) = advance(state, &start).await?;
            state = next;
            if let Some(event) = event {
                return Some((event, (state, start)));
            }
        }
    })
}

/// The next state, and the event to pass on, if any. `None` if a watch has ended, which does not happen.
async fn advance<K: Send + 'static>(
    state: Merged<K>,
    start: &(impl Fn() -> Vec<Events<K>> + Sync),
) -> Option<(Merged<K>, Option<watcher::Result<Event<K>>>)> {
    Some(match state {
        Merged::Begin => (Merged::Listing { left: start(), listed: Vec::new(), partial: false }, Some(Ok(Event::Init))),
        Merged::Listing { mut left, mut listed, partial } => {
            let Some(current) = left.last_mut() else {
                return Some((Merged::Listed(select_all(listed)), Some(Ok(Event::InitDone))));
            };
            match pin!(current).next().await? {
                // The list failed between two pages: the objects so far may be deleted when the next list arrives.
                Ok(Event::Init) if partial => (Merged::Begin, None),
                Ok(Event::Init) => (Merged::Listing { left, listed, partial }, None),
                Ok(Event::InitDone) => {
                    listed.extend(left.pop());
                    (Merged::Listing { left, listed, partial: false }, None)
                }
                Ok(event) => (Merged::Listing { left, listed, partial: true }, Some(Ok(event))),
                Err(error) => (Merged::Listing { left, listed, partial }, Some(Err(error))),
            }
        }
        Merged::Listed(mut streams) => match streams.next().await? {
            Ok(Event::Init) => (Merged::Begin, None),
            event => (Merged::Listed(streams), Some(event)),
        },
    })
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use futures::future::ready;
    use k8s_openapi::api::core::v1::ConfigMap;

    use super::*;

    /// The events of one start of a watch; it stays open after them.
    type Script = Vec<watcher::Result<Event<&'static str>>>;

    /// The merged events, as text, of watches that are started with one script after another each.
    fn texts(watches: Vec<Vec<Script>>, count: usize) -> Vec<String> {
        let watches: Mutex<Vec<_>> = Mutex::new(watches.into_iter().map(Vec::into_iter).collect());
        let start = move || {
            let mut watches = watches.lock().unwrap();
            let next = |scripts: &mut std::vec::IntoIter<Script>| {
                stream::iter(scripts.next().unwrap_or_default()).chain(stream::pending()).boxed()
            };
            watches.iter_mut().map(next).collect()
        };
        let events = merged(start).take(count).map(|event| match event {
            Ok(Event::Init) => "init".to_owned(),
            Ok(Event::InitDone) => "done".to_owned(),
            Ok(Event::InitApply(name)) => format!("list {name}"),
            Ok(Event::Apply(name)) => format!("apply {name}"),
            Ok(Event::Delete(name)) => format!("delete {name}"),
            Err(_) => "error".to_owned(),
        });
        futures::executor::block_on(async {
            let mut events = pin!(events);
            let mut texts = Vec::new();
            // A watch that has nothing to say would wait forever.
            while let futures::future::Either::Left((Some(text), _)) = futures::future::select(events.next(), ready(())).await {
                texts.push(text);
            }
            texts
        })
    }

    fn listed(names: &[&'static str]) -> Script {
        let objects = names.iter().map(|name| Ok(Event::InitApply(*name)));
        [Ok(Event::Init)].into_iter().chain(objects).chain([Ok(Event::InitDone)]).collect()
    }

    fn with(mut script: Script, more: Script) -> Script {
        script.extend(more);
        script
    }

    fn failure() -> watcher::Result<Event<&'static str>> {
        Err(watcher::Error::NoResourceVersion)
    }

    #[test]
    fn the_list_is_complete_when_every_namespace_is_listed() {
        let a = with(listed(&["a1", "a2"]), vec![Ok(Event::Apply("a3"))]);
        let b = with(listed(&["b1"]), vec![Ok(Event::Delete("b1"))]);
        let found = texts(vec![vec![a], vec![b]], 9);
        assert_eq!(found[..5], ["init", "list b1", "list a1", "list a2", "done"]);
        let mut later = found[5..].to_vec();
        later.sort();
        assert_eq!(later, ["apply a3", "delete b1"]);
        assert_eq!(texts(vec![vec![listed(&[])], vec![listed(&[])]], 9), ["init", "done"]);
    }

    #[test]
    fn a_namespace_that_cannot_be_listed_leaves_the_list_incomplete() {
        let forbidden = vec![Ok(Event::Init), failure(), Ok(Event::Init), failure()];
        let found = texts(vec![vec![forbidden], vec![listed(&["b1"])]], 9);
        assert_eq!(found, ["init", "list b1", "error", "error"], "no deletion follows from what was not listed");
        // It is listed later.
        let late = with(vec![Ok(Event::Init), failure()], listed(&["a1"]));
        assert_eq!(texts(vec![vec![late], vec![listed(&["b1"])]], 9), ["init", "list b1", "error", "list a1", "done"]);
    }

    #[test]
    fn all_lists_begin_again_after_one_was_interrupted() {
        // Between two pages.
        let interrupted = vec![Ok(Event::Init), Ok(Event::InitApply("a1")), failure(), Ok(Event::Init)];
        let found = texts(vec![vec![interrupted, listed(&["a2"])], vec![listed(&["b1"]), listed(&["b2"])]], 9);
        assert_eq!(found, ["init", "list b1", "list a1", "error", "init", "list b2", "list a2", "done"]);
        // After the lists: the API server no longer has the version from which the watch continues.
        let expired = with(listed(&["a1"]), vec![Ok(Event::Init)]);
        let found = texts(vec![vec![expired, listed(&["a2"])], vec![listed(&["b1"]), listed(&["b1"])]], 9);
        assert_eq!(found, ["init", "list b1", "list a1", "done", "init", "list b1", "list a2", "done"]);
    }

    #[tokio::test]
    async fn an_empty_list_means_all_namespaces() {
        let service = tower::service_fn(|_: axum::http::Request<kube::client::Body>| {
            ready(Err::<axum::http::Response<kube::client::Body>, _>("unused"))
        });
        let urls = |list: &[&str]| {
            let list: Vec<String> = list.iter().map(|name| (*name).to_owned()).collect();
            let watched = WatchedNamespaces::new(Client::new(service, "default"), &list);
            watched.apis::<ConfigMap>().iter().map(|api| api.resource_url().to_owned()).collect::<Vec<_>>()
        };
        assert_eq!(urls(&[]), ["/api/v1/configmaps"]);
        assert_eq!(urls(&["b", "a", "b"]), ["/api/v1/namespaces/a/configmaps", "/api/v1/namespaces/b/configmaps"]);
    }
}
