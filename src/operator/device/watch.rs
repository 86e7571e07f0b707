//! The watches of the Devices' reconciler as one stream of observations.

use futures::stream::{self, BoxStream, SelectAll, select_all};
use futures::{Stream, StreamExt};
use k8s_openapi::api::core::v1::{ConfigMap, Secret};
use kube::Api;
use kube::api::ListParams;
use kube::core::{ApiResource, DeserializeGuard, NotUsed, Object, PartialObjectMeta};
use kube::runtime::WatchStreamExt;
use kube::runtime::watcher::{self, Config, Event};
use serde::Deserialize;
use serde::de::IgnoredAny;
use tracing::warn;

use super::certificate_request::CertificateRequest;
use crate::api::name::{ROLE_AGENT_REPORT, ROLE_AUTH_SHARD, ROLE_CERTIFICATE_REQUEST, ROLE_LABEL};
use crate::api::{Device, Gateway};
use crate::operator::kubernetes::namespaces::{WatchedNamespaces, watch};
use crate::operator::kubernetes::watch::readable;

/// Page size of a list: a compromise between the number of calls and memory.
const PAGE_SIZE: u32 = 500;

/// Page size for shards, which have some 100 KB of JSON each in a large fleet. Measured with 100,000 Devices: a page of 500 took 60
/// MB.
const SHARDS_PAGE_SIZE: u32 = 20;

/// Secrets that cannot hold a password or shard, and that may be many or large.
const OTHER_SECRETS: &str = "type!=kubernetes.io/service-account-token,type!=helm.sh/release.v1,\
                             type!=kubernetes.io/dockerconfigjson,type!=kubernetes.io/tls,type!=bootstrap.kubernetes.io/token";

/// A Gateway with the fields that the Devices' reconciler needs.
pub type GatewayKind = Object<BrokerKind, NotUsed>;

/// The part of a Gateway's spec that the Devices' reconciler needs.
#[derive(Clone, Debug, Deserialize)]
pub struct BrokerKind {
    /// Present if the broker is external.
    #[serde(default)]
    pub external: Option<IgnoredAny>,
}

/// A watch event.
#[derive(Debug)]
pub enum Observation {
    /// Event of a Device.
    Device(Box<Event<Device>>),
    /// Event of a Gateway.
    Gateway(Event<GatewayKind>),
    /// Event of a Secret other than a shard.
    Secret(Event<Secret>),
    /// Event of a shard.
    Shard(Event<Secret>),
    /// Event of an agent's report.
    Report(Event<ConfigMap>),
    /// Event of a CertificateRequest, without its content.
    CertificateRequest(Event<PartialObjectMeta<CertificateRequest>>),
}

/// All observations except those of Secrets other than shards. The stream does not end: a failed watch restarts with a backoff.
pub fn observations(namespaces: &WatchedNamespaces) -> SelectAll<BoxStream<'static, Observation>> {
    let devices = readable(namespaces.watch::<DeserializeGuard<Device>>(&config()));
    let gateway = ApiResource::erase::<Gateway>(&());
    let gateways = namespaces.apis_with(|client, namespace| match namespace {
        None => Api::<GatewayKind>::all_with(client, &gateway),
        Some(namespace) => Api::namespaced_with(client, namespace, &gateway),
    });
    let gateways = watch(gateways, &config());
    let reports = namespaces.watch::<ConfigMap>(&config().labels(&format!("{ROLE_LABEL}={ROLE_AGENT_REPORT}")));
    let shards = Config::default().page_size(SHARDS_PAGE_SIZE).labels(&format!("{ROLE_LABEL}={ROLE_AUTH_SHARD}"));
    let shards = namespaces.watch::<Secret>(&shards);
    select_all([
        steady("Device", devices).map(|event| Observation::Device(Box::new(event))).boxed(),
        steady("Gateway", gateways).map(Observation::Gateway).boxed(),
        steady("ConfigMap", reports).map(Observation::Report).boxed(),
        steady("Secret", shards).map(Observation::Shard).boxed(),
    ])
}

/// The observations of Secrets other than shards. The index keeps only a hash with the Device, so this stream starts once all
/// Devices have been listed.
pub fn secrets(namespaces: &WatchedNamespaces) -> BoxStream<'static, Observation> {
    let config = config().fields(OTHER_SECRETS).labels(&format!("{ROLE_LABEL}!={ROLE_AUTH_SHARD}"));
    steady("Secret", namespaces.watch(&config)).map(Observation::Secret).boxed()
}

/// The observations of CertificateRequests. It requires cert-manager.
pub fn certificate_requests(namespaces: &WatchedNamespaces) -> BoxStream<'static, Observation> {
    let config = config().labels(&format!("{ROLE_LABEL}={ROLE_CERTIFICATE_REQUEST}"));
    let requests = namespaces.watch::<PartialObjectMeta<CertificateRequest>>(&config);
    steady("CertificateRequest", requests).map(Observation::CertificateRequest).boxed()
}

/// The CertificateRequests that an earlier run of the operator created, listed once. They are watched only while a Gateway declares
/// an issuer, because cert-manager may not be installed. This list finds those that are no longer needed.
pub fn left_certificate_requests(namespaces: &WatchedNamespaces) -> BoxStream<'static, Observation> {
    let listed = |api: Api<CertificateRequest>| async move {
        let parameters = ListParams::default().labels(&format!("{ROLE_LABEL}={ROLE_CERTIFICATE_REQUEST}"));
        match api.list_metadata(&parameters).await {
            Ok(found) => found.items,
            // cert-manager is not installed.
            Err(kube::Error::Api(status)) if status.code == 404 => Vec::new(),
            Err(error) => {
                warn!(error = %crate::runtime::error::chain(&error), "failed to list CertificateRequests: requests of an earlier run remain");
                Vec::new()
            }
        }
    };
    let requests = stream::iter(namespaces.apis()).then(listed).flat_map(stream::iter);
    requests.map(|request| Observation::CertificateRequest(Event::Apply(request))).boxed()
}

fn config() -> Config {
    Config::default().page_size(PAGE_SIZE)
}

/// Logs errors and restarts the watch with a backoff.
fn steady<K: Send + 'static>(
    kind: &'static str,
    stream: impl Stream<Item = watcher::Result<Event<K>>> + Send + 'static,
) -> impl Stream<Item = Event<K>> + Send {
    stream.default_backoff().filter_map(move |event| async move {
        event.inspect_err(|error| warn!(kind, error = %crate::runtime::error::chain(error), "the watch failed: restarting")).ok()
    })
}
