//! The configuration of a broker's agent, and its report to the operator.

use std::collections::BTreeMap;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use serde::{Deserialize, Serialize};

/// Key of the broker's ConfigMap, and file name under which it is mounted.
pub const FILE: &str = "agent.json";

/// Key of the report in the agent's ConfigMap.
pub const REPORT_KEY: &str = "report.json";

/// File name of Mosquitto's configuration, beside [`FILE`].
pub const MOSQUITTO_FILE: &str = "mosquitto.conf";

/// Folder of the broker's pod in which the ConfigMap with both is mounted.
pub const CONFIGURATION_FOLDER: &str = "/etc/fleetwright";

/// Folder in memory for the files that the agent writes and Mosquitto reads.
pub const RUNTIME_FOLDER: &str = "/run/fleetwright";

/// Folder of the broker's volume.
pub const DATA_FOLDER: &str = "/var/lib/mosquitto";

/// Folder in an `emptyDir` volume, where Mosquitto writes its log for the agent.
pub const LOG_FOLDER: &str = "/var/log/fleetwright";

/// Mosquitto's log, in [`LOG_FOLDER`].
pub const LOG_FILE: &str = "mosquitto.log";

/// Folder where the Secrets are mounted (each optional): the agent starts with them if the API server is unavailable.
pub const SECRETS_FOLDER: &str = "/mnt/fleetwright";

/// Mosquitto's `password_file`, in [`RUNTIME_FOLDER`].
pub const PASSWORD_FILE: &str = "passwords";

/// File of the plugin `previous_password.so` of the broker's image, in [`RUNTIME_FOLDER`]: passwords that are accepted in addition to
/// those of [`PASSWORD_FILE`].
pub const PREVIOUS_PASSWORD_FILE: &str = "previous-passwords";

/// File of the plugin `certificate.so` of the broker's image, in [`RUNTIME_FOLDER`]: the accepted public keys of each user.
pub const CERTIFICATE_KEYS_FILE: &str = "certificate-keys";

/// Certificates of the authorities that sign the certificates of devices, in [`CONFIGURATION_FOLDER`].
pub const CLIENT_AUTHORITIES_FILE: &str = "client-ca.crt";

/// Mosquitto's `acl_file`, in [`RUNTIME_FOLDER`].
pub const ACL_FILE: &str = "acls";

/// Key of a TLS Secret with the chain of certificates, and its file name.
pub const TLS_CERTIFICATE: &str = "tls.crt";

/// Key of a TLS Secret with the private key, and its file name.
pub const TLS_KEY: &str = "tls.key";

/// Key of a TLS Secret with the certificates of the authorities that clients should trust; as cert-manager writes it.
pub const TLS_AUTHORITIES: &str = "ca.crt";

/// The folder of a TLS Secret's content, in [`RUNTIME_FOLDER`] and in [`SECRETS_FOLDER`].
#[must_use]
pub fn tls_folder(secret: &str) -> String {
    format!("tls/{secret}")
}

/// The folder of a shard's content, in [`SECRETS_FOLDER`].
#[must_use]
pub fn shard_folder(shard: usize) -> String {
    format!("shards/{shard}")
}

/// The configuration of an agent.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct AgentConfiguration {
    /// Namespace of the Gateway.
    pub namespace: String,

    /// Name of the Gateway.
    pub gateway: String,

    /// The internal listener. The agent presents its certificate too, to the operator.
    pub internal: TlsListener,

    /// The listeners for devices with TLS.
    #[serde(default)]
    pub tls_listeners: Vec<TlsListener>,
}

/// A listener with TLS.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct TlsListener {
    /// Its port.
    pub port: u16,

    /// Secret with its certificate.
    pub secret: String,

    /// Host names and addresses under which clients reach it: the certificate must contain each of them.
    #[serde(default)]
    pub host_names: Vec<String>,
}

impl AgentConfiguration {
    /// All listeners with TLS.
    pub fn listeners(&self) -> impl Iterator<Item = &TlsListener> {
        std::iter::once(&self.internal).chain(&self.tls_listeners)
    }

    /// Secrets with the certificates of the listeners, each with the host names that it must contain.
    #[must_use]
    pub fn tls_secrets(&self) -> BTreeMap<String, Vec<String>> {
        self.listeners().map(|listener| (listener.secret.clone(), listener.host_names.clone())).collect()
    }
}

/// A certificate that the agent has seen on every listener that names its Secret.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct PresentedCertificate {
    /// SHA-256 of the leaf (see `certificate::fingerprint`).
    pub fingerprint: String,

    /// The end of its validity.
    pub not_after: Time,

    /// The end of validity of another certificate, if the broker also presents it to clients that accept another kind of key.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub former_not_after: Option<Time>,
}

/// The limit at which a broker refuses messages.
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub enum Fullness {
    /// No limit is reached.
    #[default]
    Nothing,

    /// The queue of a session is full; the broker refuses only messages for this session.
    Queue {
        /// Client identifier of the session.
        session: String,
    },

    /// The broker has reached its memory limit.
    Memory,

    /// The broker's volume is full.
    Disk,

    /// Nothing is, but devices exceed their own limits and are refused.
    Clients {
        /// Devices, each with the limit that it exceeds: `press-1: retained, press-2: rate`.
        clients: String,
    },
}

impl Fullness {
    /// Whether no limit is reached.
    #[must_use]
    pub fn is_nothing(&self) -> bool {
        *self == Self::Nothing
    }
}

/// The agent's report on its broker. Written only when it changes. Its existence means that the broker has accepted a login.
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct AgentReport {
    /// For each shard, by number, the revision (see `credential::shard`) that the broker has loaded.
    #[serde(default)]
    pub shards: BTreeMap<usize, String>,

    /// The certificates that the broker presents, by the name of their Secret.
    #[serde(default)]
    pub certificates: BTreeMap<String, PresentedCertificate>,

    /// Whether the broker has dropped messages because of a limit since its start.
    #[serde(default)]
    pub messages_dropped: bool,

    /// The limit that the broker has reached.
    #[serde(default, skip_serializing_if = "Fullness::is_nothing")]
    pub fullness: Fullness,
}
