//! What the operator reads once, before it reconciles: the identity of the cluster, the addresses of the API server, and its own key.

use std::net::IpAddr;
use std::time::Duration;

use k8s_openapi::ByteString;
use k8s_openapi::api::core::v1::{Namespace, Secret, Service};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::Api;
use thiserror::Error;
use tokio::time::timeout;
use tracing::{info, warn};

use super::device::digest_key::{DigestKey, KEY_BYTES};
use super::kubernetes::apply::{WriteError, Writer, read, standard_labels};
use super::kubernetes::secret::value;
use crate::runtime::backoff::Backoff;
use crate::runtime::error::chain;

/// The namespace whose UID identifies a cluster.
const CLUSTER_NAMESPACE: &str = "kube-system";

/// Secret with the key of the digests in the status of Devices, in the operator's namespace.
pub const DIGEST_KEY_SECRET: &str = "fleetwright-digest-key";

/// Key of that Secret.
const DIGEST_KEY: &str = "key";

/// Host of the API server in the environment of every pod.
const SERVICE_HOST: &str = "KUBERNETES_SERVICE_HOST";

/// Timeout of a call to the API server.
const TIMEOUT: Duration = Duration::from_secs(15);

/// The delay after the first failed attempt; it doubles up to [`MAX_RETRY_DELAY`].
const INITIAL_RETRY_DELAY: Duration = Duration::from_millis(500);

/// The longest delay between attempts.
const MAX_RETRY_DELAY: Duration = Duration::from_secs(10);

/// What the operator knows from its start on.
#[derive(Clone, Debug)]
pub struct Startup {
    /// Identity of the cluster: the UID of its namespace `kube-system`.
    pub cluster: String,
    /// Addresses of the API server.
    pub api_server: Vec<IpAddr>,
    /// The key of the digests in the status of Devices.
    pub digest_key: DigestKey,
}

/// Why the operator cannot start to reconcile.
#[derive(Debug, Error)]
pub enum StartupError {
    /// The namespace could not be read.
    #[error("failed to read the namespace {CLUSTER_NAMESPACE}, whose UID identifies the cluster in databases: expected the permission get")]
    ReadCluster(#[source] Box<kube::Error>),

    /// No answer in time.
    #[error("failed to read the namespace {CLUSTER_NAMESPACE}: no answer from the API server in {} s", TIMEOUT.as_secs())]
    AwaitCluster,

    /// A namespace without UID.
    #[error("failed to identify the cluster: the namespace {CLUSTER_NAMESPACE} has no UID")]
    FindCluster,

    /// An object could not be read or created.
    #[error(transparent)]
    Call(#[from] WriteError),

    /// The Secret has another content.
    #[error(
        "failed to read the key in Secret {DIGEST_KEY_SECRET} of the namespace {namespace}: expected {KEY_BYTES} bytes under the key {DIGEST_KEY}; \
         delete the Secret, and the operator creates it again and writes the status of each Device once"
    )]
    ReadKey {
        /// Namespace of the operator.
        namespace: String,
    },
}

/// Reads until it succeeds. `report` receives each failure.
pub async fn start(writer: &Writer, namespace: &str, report: impl Fn(&str)) -> Startup {
    let mut backoff = Backoff::new(INITIAL_RETRY_DELAY, MAX_RETRY_DELAY);
    loop {
        match attempt(writer, namespace).await {
            Ok(startup) => return startup,
            Err(error) => {
                let failure = chain(&error);
                warn!(failure, "failed to start, retrying");
                report(&failure);
            }
        }
        backoff.wait().await;
    }
}

/// Reads once.
///
/// # Errors
/// If the API server refuses or is away, or an object has another content.
pub async fn attempt(writer: &Writer, namespace: &str) -> Result<Startup, StartupError> {
    let namespaces = Api::<Namespace>::all(writer.client().clone());
    let cluster = timeout(TIMEOUT, namespaces.get(CLUSTER_NAMESPACE)).await.map_err(|_| StartupError::AwaitCluster)?;
    let cluster = cluster.map_err(|error| StartupError::ReadCluster(Box::new(error)))?;
    let cluster = cluster.metadata.uid.filter(|uid| !uid.is_empty()).ok_or(StartupError::FindCluster)?;
    let mut api_server = api_service(writer).await?;
    api_server.extend(std::env::var(SERVICE_HOST).ok().and_then(|host| host.parse::<IpAddr>().ok()));
    Ok(Startup { cluster, api_server, digest_key: digest_key(writer, namespace).await? })
}

/// The cluster IPs of the Service `kubernetes`. Without the permission to read it, the environment has to be sufficient.
async fn api_service(writer: &Writer) -> Result<Vec<IpAddr>, WriteError> {
    let service = match read::<Service>(writer.client(), "default", "kubernetes").await {
        Err(error) if error.status().is_some_and(|status| status.code == 403) => {
            info!("no permission to read the Service kubernetes of the namespace default: using {SERVICE_HOST} alone");
            None
        }
        read => read?,
    };
    let spec = service.and_then(|service| service.spec).unwrap_or_default();
    let addresses = spec.cluster_ips.into_iter().flatten().chain(spec.cluster_ip);
    Ok(addresses.filter_map(|address| address.parse().ok()).collect())
}

/// The key in the Secret, which is created by the first operator of the cluster and then stays: with another key the status of every Device
/// would change.
async fn digest_key(writer: &Writer, namespace: &str) -> Result<DigestKey, StartupError> {
    let found = match read::<Secret>(writer.client(), namespace, DIGEST_KEY_SECRET).await? {
        Some(secret) => secret,
        None => match writer.create(&secret(namespace, &DigestKey::default())).await {
            Ok(created) => created,
            // Another instance was faster.
            Err(error) if error.is_already_exists() => read(writer.client(), namespace, DIGEST_KEY_SECRET).await?.unwrap_or_default(),
            Err(error) => return Err(error.into()),
        },
    };
    let key = value(&found, DIGEST_KEY).and_then(DigestKey::given);
    key.ok_or_else(|| StartupError::ReadKey { namespace: namespace.to_owned() })
}

fn secret(namespace: &str, key: &DigestKey) -> Secret {
    Secret {
        metadata: ObjectMeta {
            name: Some(DIGEST_KEY_SECRET.to_owned()),
            namespace: Some(namespace.to_owned()),
            labels: Some(standard_labels("operator", "fleetwright")),
            ..ObjectMeta::default()
        },
        data: Some([(DIGEST_KEY.to_owned(), ByteString(key.expose().to_vec()))].into()),
        ..Secret::default()
    }
}
