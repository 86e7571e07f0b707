//! The operator's requests to the API server, and its handling of responses that are rare in a healthy cluster.

use std::collections::BTreeMap;
use std::time::Duration;

use futures::{StreamExt, TryStreamExt};
use hyper::{Request, Response};
use k8s_controller::LeaderElection;
use k8s_openapi::api::core::v1::{ConfigMap, Secret};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, OwnerReference};
use kube::client::Body;
use kube::core::DeserializeGuard;
use kube::runtime::WatchStreamExt;
use kube::runtime::controller::Action;
use kube::runtime::watcher::{self, Event, watcher};
use kube::{Api, Client, ResourceExt};
use prometheus::Registry;
use serde_json::{Value, json};
use tokio::sync::{mpsc, oneshot};
use tokio::time::timeout;
use tower::service_fn;

use super::apply::{Applied, WriteMetrics, Writer, prepare};
use super::watch::readable;
use crate::api::reason::Reason;
use crate::operator::context::unless_terminating;
use crate::operator::startup::{self, DIGEST_KEY_SECRET, StartupError};

/// A call that is missing or one too many fails a test after this long.
const TEST_TIMEOUT: Duration = Duration::from_secs(10);

const MAPS: &str = "/api/v1/namespaces/plant/configmaps";

type Call = (Request<Body>, oneshot::Sender<Response<Body>>);

/// The requests of a client, in their order.
struct ApiServer(mpsc::UnboundedReceiver<Call>);

impl ApiServer {
    fn start() -> (Client, Writer, Self) {
        let (sender, calls) = mpsc::unbounded_channel::<Call>();
        let service = service_fn(move |request: Request<Body>| {
            let (responder, response) = oneshot::channel();
            let sent = sender.send((request, responder));
            async move {
                sent.map_err(|_| std::io::Error::other("the server ended"))?;
                response.await.map_err(std::io::Error::other)
            }
        });
        let client = Client::new(service, "plant");
        let writer = Writer::new(client.clone(), "fleetwright/test", &WriteMetrics::register(&Registry::new()).unwrap());
        (client, writer, Self(calls))
    }

    /// Takes the next request, which must be this one, and answers it. Returns the request's query and body.
    async fn answer(&mut self, method: &str, path: &str, code: u16, answer: &Value) -> (String, Value) {
        self.answer_bytes(method, path, code, answer.to_string().into_bytes()).await
    }

    async fn answer_bytes(&mut self, method: &str, path: &str, code: u16, answer: Vec<u8>) -> (String, Value) {
        let (request, responder) = self.0.recv().await.expect("another request");
        assert_eq!((request.method().as_str(), request.uri().path()), (method, path));
        let query = request.uri().query().unwrap_or_default().to_owned();
        let body = request.into_body().collect_bytes().await.unwrap();
        responder.send(Response::builder().status(code).body(Body::from(answer)).unwrap()).unwrap();
        (query, if body.is_empty() { Value::Null } else { serde_json::from_slice(&body).unwrap() })
    }

    /// Fails if a request is still to come. All clients have to be dropped before.
    async fn end(mut self) {
        assert!(self.0.recv().await.is_none(), "one request too many");
    }
}

fn failure(code: u16, reason: &str) -> Value {
    json!({"kind": "Status", "apiVersion": "v1", "status": "Failure", "code": code, "reason": reason, "message": reason})
}

fn owner() -> OwnerReference {
    let (api_version, kind) = ("fleetwright.io/v1alpha1".to_owned(), "Gateway".to_owned());
    OwnerReference { api_version, kind, name: "g".to_owned(), uid: "uid-g".to_owned(), controller: Some(true), ..OwnerReference::default() }
}

fn map() -> ConfigMap {
    let metadata = ObjectMeta { name: Some("m".to_owned()), namespace: Some("plant".to_owned()), ..ObjectMeta::default() };
    ConfigMap { metadata, data: Some(BTreeMap::from([("k".to_owned(), "v".to_owned())])), ..ConfigMap::default() }
}

/// Runs the operator's side and the API server's side of a case.
async fn both<T>(operator: impl Future<Output = T>, server: impl Future<Output = ()>) -> T {
    timeout(TEST_TIMEOUT, futures::future::join(operator, server)).await.expect("a call is missing or has no answer").0
}

#[tokio::test]
async fn an_object_of_another_owner_is_a_name_conflict_and_stays_untouched() {
    let (client, writer, mut server) = ApiServer::start();
    drop(client);
    let error = both(async move { writer.apply(&owner(), &map()).await.unwrap_err() }, async move {
        let foreign = json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "m", "namespace": "plant"}});
        server.answer("GET", &format!("{MAPS}/m"), 200, &foreign).await;
        server.end().await;
    })
    .await;
    assert_eq!(error.reason(), Reason::NameConflict);
}

#[tokio::test]
async fn a_live_object_with_the_desired_content_is_not_written() {
    let (client, writer, mut server) = ApiServer::start();
    drop(client);
    let applied = both(async move { writer.apply(&owner(), &map()).await.unwrap() }, async move {
        server.answer("GET", &format!("{MAPS}/m"), 200, &prepare(&owner(), &map()).unwrap()).await;
        server.end().await;
    })
    .await;
    assert!(matches!(applied, Applied::Unchanged(_)));
}

#[tokio::test]
async fn a_missing_object_is_applied_with_the_field_manager_and_a_conflict_is_an_error() {
    let (client, writer, mut server) = ApiServer::start();
    drop(client);
    let error = both(async move { writer.apply(&owner(), &map()).await.unwrap_err() }, async move {
        server.answer("GET", &format!("{MAPS}/m"), 404, &failure(404, "NotFound")).await;
        let (query, body) = server.answer("PATCH", &format!("{MAPS}/m"), 409, &failure(409, "Conflict")).await;
        assert!(query.contains("fieldManager=fleetwright%2Ftest") && query.contains("force=true"), "{query}");
        assert_eq!(body["metadata"]["ownerReferences"][0]["uid"], "uid-g");
        server.end().await;
    })
    .await;
    assert_eq!((error.reason(), error.status().unwrap().code), (Reason::ApplyFailed, 409));
}

#[tokio::test]
async fn a_terminating_namespace_is_waited_for_and_any_other_refusal_is_an_error() {
    for (cause, waits) in [("NamespaceTerminating", true), ("QuotaExceeded", false)] {
        let (client, writer, mut server) = ApiServer::start();
        drop(client);
        let outcome = both(async move { writer.create(&map()).await.map(|_| None) }, async move {
            let mut refused = failure(403, "Forbidden");
            refused["details"] = json!({"causes": [{"reason": cause, "message": cause}]});
            server.answer("POST", MAPS, 403, &refused).await;
            server.end().await;
        })
        .await;
        match unless_terminating(outcome) {
            Ok(action) => assert!(waits && action == Some(Action::await_change()), "{cause}"),
            Err(error) => assert!(!waits && !error.is_namespace_terminating(), "{cause}: {error}"),
        }
    }
}

#[tokio::test]
async fn missing_objects_are_no_errors_of_deletion_and_status() {
    let (client, writer, mut server) = ApiServer::start();
    drop(client);
    both(
        async move {
            writer.delete::<ConfigMap>("plant", "m").await.unwrap();
            assert!(writer.patch_status::<crate::api::Gateway>("plant", "g", &json!({})).await.unwrap().is_none());
            assert!(writer.create(&map()).await.unwrap_err().is_already_exists());
        },
        async move {
            server.answer("DELETE", &format!("{MAPS}/m"), 404, &failure(404, "NotFound")).await;
            let path = "/apis/fleetwright.io/v1alpha1/namespaces/plant/gateways/g/status";
            server.answer("PATCH", path, 404, &failure(404, "NotFound")).await;
            server.answer("POST", MAPS, 409, &failure(409, "AlreadyExists")).await;
            server.end().await;
        },
    )
    .await;
}

#[tokio::test]
async fn pruning_deletes_only_own_objects_that_are_no_longer_desired() {
    let (client, writer, mut server) = ApiServer::start();
    drop(client);
    let secret = |name: &str, owner: &str, uid: &str| {
        let owners = json!([{"apiVersion": "v1", "kind": "Gateway", "name": "g", "uid": owner}]);
        json!({"metadata": {"name": name, "namespace": "plant", "uid": uid, "ownerReferences": owners}})
    };
    both(async move { writer.prune::<Secret>(&owner(), "plant", "a=b", &["g-link".to_owned()]).await.unwrap() }, async move {
        let items = [secret("g-tls", "uid-g", "1"), secret("g-link", "uid-g", "2"), secret("foreign", "uid-h", "3")];
        let list = json!({"kind": "PartialObjectMetadataList", "apiVersion": "meta.k8s.io/v1", "metadata": {}, "items": items});
        let (query, _) = server.answer("GET", "/api/v1/namespaces/plant/secrets", 200, &list).await;
        assert!(query.contains("labelSelector=a%3Db"), "{query}");
        let done = json!({"kind": "Status", "apiVersion": "v1", "status": "Success"});
        let (_, body) = server.answer("DELETE", "/api/v1/namespaces/plant/secrets/g-tls", 200, &done).await;
        assert_eq!(body["preconditions"]["uid"], "1", "an object that replaced it must stay");
        server.end().await;
    })
    .await;
}

#[tokio::test]
async fn a_watch_that_lags_behind_lists_again_and_removes_deleted_objects() {
    let (client, writer, mut server) = ApiServer::start();
    drop(writer);
    let list = |names: &[&str]| {
        let items: Vec<Value> = names
            .iter()
            .map(|name| {
                json!({"apiVersion": "fleetwright.io/v1alpha1", "kind": "Gateway", "metadata": {"name": name, "namespace": "plant"}, "spec": {}})
            })
            .collect();
        json!({"kind": "GatewayList", "apiVersion": "fleetwright.io/v1alpha1", "metadata": {"resourceVersion": "7"}, "items": items})
    };
    let (first, second) = (list(&["a", "b"]), list(&["a"]));
    let path = "/apis/fleetwright.io/v1alpha1/gateways";
    let operator = async move {
        let api = Api::<DeserializeGuard<crate::api::Gateway>>::all(client);
        let events = readable(watcher(api, watcher::Config::default()).default_backoff());
        let events = events.filter_map(|event| async { event.ok() }).take(7).map(|event| match event {
            Event::Init => "init".to_owned(),
            Event::InitDone => "done".to_owned(),
            Event::InitApply(gateway) | Event::Apply(gateway) => gateway.name_any(),
            Event::Delete(gateway) => format!("-{}", gateway.name_any()),
        });
        events.map(Ok::<_, ()>).try_collect::<Vec<_>>().await.unwrap()
    };
    let seen = both(operator, async move {
        server.answer("GET", path, 200, &first).await;
        let gone = json!({"type": "ERROR", "object": failure(410, "Expired")});
        let (query, _) = server.answer("GET", path, 200, &gone).await;
        assert!(query.contains("watch=true") && query.contains("resourceVersion=7"), "{query}");
        server.answer("GET", path, 200, &second).await;
    })
    .await;
    assert_eq!(seen, ["init", "a", "b", "done", "init", "a", "done"]);
}

#[tokio::test]
async fn the_work_ends_when_another_instance_takes_the_lease() {
    let (client, writer, mut server) = ApiServer::start();
    drop(writer);
    let path = "/apis/coordination.k8s.io/v1/namespaces/plant/leases";
    let election = LeaderElection::new(client, "plant", "fleetwright-operator", "first")
        .with_lease_duration(Duration::from_secs(3))
        .with_renew_deadline(Duration::from_secs(2))
        .with_retry_period(Duration::from_millis(100));
    let server = async move {
        let mut lease = Value::Null;
        while let Some((request, responder)) = server.0.recv().await {
            let (method, target) = (request.method().to_string(), request.uri().path().to_owned());
            assert!(target.starts_with(path), "{target}");
            let body = request.into_body().collect_bytes().await.unwrap();
            let (code, answer) = match method.as_str() {
                "GET" if lease.is_null() => (404, failure(404, "NotFound")),
                "GET" => (200, lease.clone()),
                _ if lease.is_null() => {
                    lease = serde_json::from_slice(&body).unwrap();
                    lease["metadata"]["resourceVersion"] = json!("1");
                    let answer = lease.clone();
                    // Another instance acquires it.
                    lease["spec"]["holderIdentity"] = json!("second");
                    lease["metadata"]["resourceVersion"] = json!("2");
                    (201, answer)
                }
                _ => (409, failure(409, "Conflict")),
            };
            // A renewal after the end is not an error.
            let _ = responder.send(Response::builder().status(code).body(Body::from(answer.to_string().into_bytes())).unwrap());
        }
    };
    let operator = async move { election.with_lease(std::future::pending::<()>()).await };
    assert!(both(operator, server).await.is_none(), "the work was not ended");
}

/// The answers to the first reads of an operator.
async fn answer_start(server: &mut ApiServer) {
    let namespace = json!({"kind": "Namespace", "apiVersion": "v1", "metadata": {"name": "kube-system", "uid": "uid-c"}});
    server.answer("GET", "/api/v1/namespaces/kube-system", 200, &namespace).await;
    let service = json!({
        "kind": "Service", "apiVersion": "v1", "metadata": {"name": "kubernetes", "namespace": "default"},
        "spec": {"clusterIP": "10.96.0.1", "clusterIPs": ["10.96.0.1", "fd00:96::1"]},
    });
    server.answer("GET", "/api/v1/namespaces/default/services/kubernetes", 200, &service).await;
}

#[tokio::test]
async fn the_digest_key_is_created_once_and_then_read() {
    const SECRETS: &str = "/api/v1/namespaces/system/secrets";
    let secret = format!("{SECRETS}/{DIGEST_KEY_SECRET}");
    // An empty cluster; another instance is faster; a later start; a damaged Secret.
    for (existing, created) in [(None, 201), (None, 409), (Some("AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8="), 0), (Some("c2hvcnQ="), 0)]
    {
        let (client, writer, mut server) = ApiServer::start();
        drop(client);
        let object =
            |key: &str| json!({"kind": "Secret", "apiVersion": "v1", "metadata": {"name": DIGEST_KEY_SECRET}, "data": {"key": key}});
        let known = "AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8=";
        let started = both(async move { startup::attempt(&writer, "system").await }, async {
            answer_start(&mut server).await;
            match existing {
                Some(key) => drop(server.answer("GET", &secret, 200, &object(key)).await),
                None => {
                    server.answer("GET", &secret, 404, &failure(404, "NotFound")).await;
                    let answer = if created == 201 { object(known) } else { failure(409, "AlreadyExists") };
                    let (_, body) = server.answer("POST", SECRETS, created, &answer).await;
                    assert_ne!(body["data"]["key"], known, "it is random");
                    if created == 409 {
                        server.answer("GET", &secret, 200, &object(known)).await;
                    }
                }
            }
            server.end().await;
        })
        .await;
        match existing {
            Some("c2hvcnQ=") => assert!(matches!(started, Err(StartupError::ReadKey { .. })), "{started:?}"),
            _ => {
                let started = started.unwrap();
                assert_eq!(started.digest_key.expose()[..4], [0, 1, 2, 3]);
                assert_eq!(started.cluster, "uid-c");
                assert!(started.api_server.contains(&"fd00:96::1".parse().unwrap()), "{:?}", started.api_server);
            }
        }
    }
}

#[tokio::test]
async fn a_service_that_may_not_be_read_does_not_stop_the_start() {
    let (client, writer, mut server) = ApiServer::start();
    drop(client);
    let started = both(async move { startup::attempt(&writer, "system").await }, async move {
        let namespace = json!({"kind": "Namespace", "apiVersion": "v1", "metadata": {"name": "kube-system", "uid": "uid-c"}});
        server.answer("GET", "/api/v1/namespaces/kube-system", 200, &namespace).await;
        server.answer("GET", "/api/v1/namespaces/default/services/kubernetes", 403, &failure(403, "Forbidden")).await;
        let key =
            json!({"kind": "Secret", "apiVersion": "v1", "metadata": {}, "data": {"key": "AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8="}});
        server.answer("GET", &format!("/api/v1/namespaces/system/secrets/{DIGEST_KEY_SECRET}"), 200, &key).await;
        server.end().await;
    })
    .await;
    assert_eq!(started.unwrap().cluster, "uid-c");
}
