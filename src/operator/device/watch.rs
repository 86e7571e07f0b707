//! What the Devices' side sees of the cluster: one stream of observations.

use futures::stream::{self, BoxStream, SelectAll, select_all};
use futures::{Stream, StreamExt};
use k8s_openapi::api::core::v1::{ConfigMap, Secret};
use kube::api::ListParams;
use kube::core::{ApiResource, DeserializeGuard, NotUsed, Object, PartialObjectMeta};
use kube::runtime::WatchStreamExt;
use kube::runtime::watcher::{self, Config, Event, watcher};
use kube::{Api, Client};
use serde::Deserialize;
use serde::de::IgnoredAny;
use tracing::warn;

use super::certificate_request::CertificateRequest;
use crate::api::name::{ROLE_AGENT_REPORT, ROLE_AUTH_SHARD, ROLE_CERTIFICATE_REQUEST, ROLE_LABEL};
use crate::api::{Device, Gateway};
use crate::operator::kubernetes::watch::readable;

/// Objects a page of a list: a compromise of requests and of what is in memory at once.
const PAGE_SIZE: u32 = 500;

/// The same of shards: each is some 100 KB of JSON where devices are many. Measured with 100,000: a page of 500 took 60 MB for a moment.
const SHARDS_PAGE_SIZE: u32 = 20;

/// Secrets that nobody names as a password or shard, and that may be many or large.
const OTHER_SECRETS: &str = "type!=kubernetes.io/service-account-token,type!=helm.sh/release.v1,\
                             type!=kubernetes.io/dockerconfigjson,type!=kubernetes.io/tls,type!=bootstrap.kubernetes.io/token";

/// A Gateway, as far as it matters here: that it is there, and whose broker it is.
pub type GatewayKind = Object<BrokerKind, NotUsed>;

/// The spec of a Gateway, as far as it matters here.
#[derive(Clone, Debug, Deserialize)]
pub struct BrokerKind {
    /// There where the broker runs elsewhere, whatever it says.
    #[serde(default)]
    pub external: Option<IgnoredAny>,
}

/// Something seen of the cluster.
#[derive(Debug)]
pub enum Observation {
    /// Of a Device.
    Device(Box<Event<Device>>),
    /// Of a Gateway.
    Gateway(Event<GatewayKind>),
    /// Of a Secret that is no shard.
    Secret(Event<Secret>),
    /// Of a shard.
    Shard(Event<Secret>),
    /// Of an agent's report.
    Report(Event<ConfigMap>),
    /// Of what an issuer was asked for a Device: that it changed, no more.
    CertificateRequest(Event<PartialObjectMeta<CertificateRequest>>),
}

/// All observations but those of other Secrets than shards, from the first lists on. Never ends; failed watches start again with a
/// growing pause.
pub fn observations(client: &Client) -> SelectAll<BoxStream<'static, Observation>> {
    let devices = readable(watcher(Api::<DeserializeGuard<Device>>::all(client.clone()), config()));
    let gateways = watcher(Api::<GatewayKind>::all_with(client.clone(), &ApiResource::erase::<Gateway>(&())), config());
    let reports = watcher(Api::<ConfigMap>::all(client.clone()), config().labels(&format!("{ROLE_LABEL}={ROLE_AGENT_REPORT}")));
    let shards = Config::default().page_size(SHARDS_PAGE_SIZE).labels(&format!("{ROLE_LABEL}={ROLE_AUTH_SHARD}"));
    let shards = watcher(Api::<Secret>::all(client.clone()), shards);
    select_all([
        steady("Device", devices).map(|event| Observation::Device(Box::new(event))).boxed(),
        steady("Gateway", gateways).map(Observation::Gateway).boxed(),
        steady("ConfigMap", reports).map(Observation::Report).boxed(),
        steady("Secret", shards).map(Observation::Shard).boxed(),
    ])
}

/// As [`observations`], those of Secrets. Of each only a hash is kept, with its Device: so there is no use for them before all
/// Devices have been listed, and they would be held in memory until then.
pub fn secrets(client: &Client) -> BoxStream<'static, Observation> {
    let config = config().fields(OTHER_SECRETS).labels(&format!("{ROLE_LABEL}!={ROLE_AUTH_SHARD}"));
    steady("Secret", watcher(Api::<Secret>::all(client.clone()), config)).map(Observation::Secret).boxed()
}

/// As [`observations`], those of CertificateRequests. Of use where cert-manager is installed.
pub fn certificate_requests(client: &Client) -> BoxStream<'static, Observation> {
    let config = config().labels(&format!("{ROLE_LABEL}={ROLE_CERTIFICATE_REQUEST}"));
    let requests = watcher(Api::<PartialObjectMeta<CertificateRequest>>::all(client.clone()), config);
    steady("CertificateRequest", requests).map(Observation::CertificateRequest).boxed()
}

/// The CertificateRequests that an earlier run of the operator left, listed once. While no Gateway names an issuer there is no watch of
/// them, for cert-manager may not be installed; a request that is no longer needed is found nevertheless.
pub fn left_certificate_requests(client: &Client) -> BoxStream<'static, Observation> {
    let api = Api::<CertificateRequest>::all(client.clone());
    let listed = async move {
        let parameters = ListParams::default().labels(&format!("{ROLE_LABEL}={ROLE_CERTIFICATE_REQUEST}"));
        match api.list_metadata(&parameters).await {
            Ok(found) => found.items,
            // cert-manager is not installed.
            Err(kube::Error::Api(status)) if status.code == 404 => Vec::new(),
            Err(error) => {
                warn!(error = %crate::runtime::error::chain(&error), "failed to list CertificateRequests: those of an earlier run stay");
                Vec::new()
            }
        }
    };
    let requests = stream::once(listed).flat_map(stream::iter);
    requests.map(|request| Observation::CertificateRequest(Event::Apply(request))).boxed()
}

fn config() -> Config {
    Config::default().page_size(PAGE_SIZE)
}

/// Without failures (which are logged), with a growing pause after each.
fn steady<K: Send + 'static>(
    kind: &'static str,
    stream: impl Stream<Item = watcher::Result<Event<K>>> + Send + 'static,
) -> impl Stream<Item = Event<K>> + Send {
    stream.default_backoff().filter_map(move |event| async move {
        event.inspect_err(|error| warn!(kind, error = %crate::runtime::error::chain(error), "the watch failed: starting it again")).ok()
    })
}
