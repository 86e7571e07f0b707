//! The names of all objects that derive from a resource, in one place for the operator, the agent and the workers.

use sha2::{Digest, Sha256};

/// Label with the Gateway that an object belongs to.
pub const GATEWAY_LABEL: &str = "fleetwright.io/gateway";

/// Label with the Pipeline that an object belongs to.
pub const PIPELINE_LABEL: &str = "fleetwright.io/pipeline";

/// Label with the role of an object that a watch selects; one of the `ROLE_` constants.
pub const ROLE_LABEL: &str = "fleetwright.io/role";

/// Label of a Secret whose values may be used as credentials, if it is `"true"`: as a password, or as a login at an address that a Gateway
/// or a Pipeline names.
pub const CREDENTIALS_LABEL: &str = "fleetwright.io/credentials";

/// [`ROLE_LABEL`] of a Secret that holds a Device's generated password.
pub const ROLE_DEVICE_CREDENTIALS: &str = "device-credentials";

/// [`ROLE_LABEL`] of a Secret that holds a shard of a Gateway's credentials.
pub const ROLE_AUTH_SHARD: &str = "auth-shard";

/// [`ROLE_LABEL`] of the ConfigMap in which an agent reports the verified state of its broker.
pub const ROLE_AGENT_REPORT: &str = "agent-report";

/// [`ROLE_LABEL`] of a Secret that holds the credential of a Pipeline's workers.
pub const ROLE_INGEST_CREDENTIALS: &str = "ingest-credentials";

/// [`ROLE_LABEL`] of a Secret that holds a certificate that the operator issued for a broker.
pub const ROLE_SERVER_CERTIFICATE: &str = "server-certificate";

/// [`ROLE_LABEL`] of a Secret that holds an authority that issues the certificates of a Gateway's broker.
pub const ROLE_SERVER_AUTHORITY: &str = "server-authority";

/// [`ROLE_LABEL`] of a CertificateRequest for a Device.
pub const ROLE_CERTIFICATE_REQUEST: &str = "certificate-request";

/// [`ROLE_LABEL`] of a Secret that holds the operator's own credential for a Gateway's broker.
pub const ROLE_LINK_CREDENTIALS: &str = "link-credentials";

/// Port of the broker's internal listener, for workers, the agent and the operator. Not in the public Service.
pub const INTERNAL_MQTT_PORT: i32 = 1884;

/// Port of every role's health and metrics endpoint (`/livez`, `/readyz`, `/metrics`).
pub const HTTP_PORT: i32 = 9090;

/// Port of the agent's HTTPS endpoint for the operator (`/presence`). Not [`HTTP_PORT`], because Prometheus expects plain HTTP there.
pub const PRESENCE_PORT: i32 = 9443;

/// Maximum number of shards of a Gateway's credentials. The broker's pod mounts this many optional Secrets, so that
/// a larger number of shards never restarts a broker. A shard has about 64 KiB with 500 devices and may grow to 1 MiB
/// (the limit of a Secret), which is about 7,000 devices: 64 shards hold 400,000 devices per Gateway.
pub const MAX_SHARDS: usize = 64;

/// StatefulSet, ConfigMap, ServiceAccount, Role, NetworkPolicy and PodDisruptionBudget of a Gateway's broker.
#[must_use]
pub fn broker(gateway: &str) -> String {
    format!("{gateway}-broker")
}

/// Service through which workers reach the broker's internal listener.
#[must_use]
pub fn internal_service(gateway: &str) -> String {
    format!("{gateway}-internal")
}

/// Service through which the operator reaches the broker's agent.
#[must_use]
pub fn agent_service(gateway: &str) -> String {
    format!("{gateway}-agent")
}

/// ConfigMap in which the agent reports the verified state of the broker.
#[must_use]
pub fn agent_report(gateway: &str) -> String {
    format!("{gateway}-agent")
}

/// Secret with one shard of a Gateway's credentials.
#[must_use]
pub fn auth_shard(gateway: &str, shard: usize) -> String {
    format!("{gateway}-auth-{shard}")
}

/// Secret with the certificate that the operator issues for a Gateway's listeners.
#[must_use]
pub fn server_certificate(gateway: &str) -> String {
    format!("{gateway}-tls")
}

/// Secret with the authority that issues it. Only the operator reads it.
#[must_use]
pub fn server_authority(gateway: &str) -> String {
    format!("{gateway}-server-ca")
}

/// Secret with the authority that issues the certificate of the internal ports. Only the operator reads it.
#[must_use]
pub fn internal_authority(gateway: &str) -> String {
    format!("{gateway}-internal-ca")
}

/// Secret with the certificate of the internal ports: the broker's internal listener, and the agent's endpoint for the operator.
#[must_use]
pub fn internal_certificate(gateway: &str) -> String {
    format!("{gateway}-internal-tls")
}

/// Secret with the operator's own credential for a Gateway's broker.
#[must_use]
pub fn link_credentials(gateway: &str) -> String {
    format!("{gateway}-link")
}

/// Secret with a Device's generated password.
#[must_use]
pub fn device_credentials(device: &str) -> String {
    format!("{device}-credentials")
}

/// CertificateRequest of cert-manager for a Device's certificate.
#[must_use]
pub fn certificate_request(device: &str) -> String {
    format!("{device}-certificate")
}

/// StatefulSet, ConfigMap, Secret, Service and NetworkPolicy of a Pipeline's workers.
#[must_use]
pub fn ingest(pipeline: &str) -> String {
    format!("{pipeline}-ingest")
}

/// MQTT user name and client identifier of a Pipeline's workers. All workers share it, so that a worker that takes over a Gateway
/// from another also takes over its session with the queued messages. The underscore prevents a conflict with a device, because a
/// Kubernetes name has none.
#[must_use]
pub fn ingest_username(pipeline: &str) -> String {
    format!("_ingest_{pipeline}")
}

/// Prefix of the names of workers, agent and operator, whose sessions have their own life cycle. No Device has such a name: names of objects
/// begin with a letter or a digit.
pub const SYSTEM_USERNAME_PREFIX: &str = "_";

/// Prefix of every worker's user name.
pub const INGEST_USERNAME_PREFIX: &str = "_ingest_";

/// MQTT user name with which the agent verifies that the broker has read its files.
pub const CANARY_USERNAME: &str = "_agent";

/// MQTT user name and client identifier of the operator at a Gateway's broker.
pub const LINK_USERNAME: &str = "_operator";

/// Topic of the retained message with the desired state of a device.
#[must_use]
pub fn desired_topic(device: &str) -> String {
    format!("devices/{device}/desired")
}

/// Topic to which a device reports its state.
#[must_use]
pub fn reported_topic(device: &str) -> String {
    format!("devices/{device}/reported")
}

/// Topic to which a device of an external broker reports whether it is connected.
#[must_use]
pub fn connection_topic(device: &str) -> String {
    format!("devices/{device}/connection")
}

/// MQTT client identifier of the operator at an external broker. From the Gateway's uid, so that two clusters that use the same
/// broker do not end one another's connections; of digits and letters and at most 23 bytes, as every broker has to accept
/// (MQTT 5.0, section 3.1.3.1).
#[must_use]
pub fn external_link_client(gateway_uid: &str) -> String {
    format!("fwo{}", revision([gateway_uid.as_bytes()]))
}

/// MQTT client identifier of a Pipeline's workers at an external broker; see [`external_link_client`].
#[must_use]
pub fn external_ingest_client(pipeline_uid: &str, gateway: &str) -> String {
    format!("fwi{}", revision([pipeline_uid.as_bytes(), gateway.as_bytes()]))
}

/// MQTT client identifier of one of several sessions of a Pipeline at an external broker: the first has that of
/// [`external_ingest_client`], and so have those that share a subscription with it.
#[must_use]
pub fn external_session_client(first: &str, number: i32) -> String {
    if number == 0 { first.to_owned() } else { format!("fwi{}", revision([first.as_bytes(), &number.to_be_bytes()])) }
}

/// Host name of a Service inside the cluster. Without the cluster's domain, which is not known here; a pod's resolver adds it.
#[must_use]
pub fn service_host(service: &str, namespace: &str) -> String {
    format!("{service}.{namespace}.svc")
}

/// Host names of a Service inside the cluster, the shortest first; the last one has the default domain of clusters.
#[must_use]
pub fn service_host_names(service: &str, namespace: &str) -> [String; 4] {
    let host = service_host(service, namespace);
    [service.to_owned(), format!("{service}.{namespace}"), host.clone(), format!("{host}.cluster.local")]
}

/// The first 16 hexadecimal digits of the SHA-256 of the parts, each preceded by its length: a short revision of content.
#[must_use]
pub fn revision<'a>(parts: impl IntoIterator<Item = &'a [u8]>) -> String {
    let mut hasher = Sha256::new();
    for part in parts {
        hasher.update((part.len() as u64).to_be_bytes());
        hasher.update(part);
    }
    let digest: [u8; 32] = hasher.finalize().into();
    let first: [u8; 8] = std::array::from_fn(|index| digest[index]);
    format!("{:016x}", u64::from_be_bytes(first))
}

/// Annotation of a Device: any text, such as a time. A change of it rotates the generated password. On the Device's
/// Secret: the text of the last rotation.
pub const ROTATE_PASSWORD_ANNOTATION: &str = "fleetwright.io/rotate-password";

/// Annotation of a Device's Secret: time of the last rotation of the password. Absent before the first rotation.
pub const PASSWORD_SINCE_ANNOTATION: &str = "fleetwright.io/password-since";

/// Annotation of a Device's Secret: the time until which the previous password is accepted, a space, and its salted hash.
pub const PREVIOUS_PASSWORD_ANNOTATION: &str = "fleetwright.io/previous-password";

/// Annotation of a Pipeline's ingest Secret: the Gateways that its workers may log in to, separated by commas.
pub const INGEST_GATEWAYS_ANNOTATION: &str = "fleetwright.io/gateways";

/// Annotation of a Pipeline's ingest Secret: the MQTT topic filter that its workers may read.
pub const INGEST_FILTER_ANNOTATION: &str = "fleetwright.io/topic-filter";

/// Annotation of a Pipeline's ingest Secret: the MQTT topic filter that its workers may write. Absent if there is none.
pub const INGEST_COMMANDS_ANNOTATION: &str = "fleetwright.io/command-filter";
