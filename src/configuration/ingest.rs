//! The configuration of a Pipeline's workers.

use serde::{Deserialize, Serialize};

use crate::api::pipeline::{DeadLetters, Decode, OnConflict, Replay, default_chunk_interval};
pub use crate::mqtt::login_files::{AUTHORITIES_FILE, PASSWORD_FILE, USERNAME_FILE};
use crate::state::owner::Owner;

/// Key of the workers' ConfigMap, and file name under which it is mounted.
pub const FILE: &str = "ingest.json";

/// The configuration of a worker. Secrets are separate files.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct IngestConfiguration {
    /// Identity of the cluster: the UID of its namespace `kube-system`.
    pub cluster: String,

    /// Namespace of the Pipeline.
    pub namespace: String,

    /// Name of the Pipeline.
    pub pipeline: String,

    /// Gateways to read, by name.
    pub gateways: Vec<IngestGateway>,

    /// Topic with captures, as in `spec.source.topic`.
    pub topic: String,

    /// The value of `spec.decode`.
    pub decode: Decode,

    /// The FileDescriptorSet that `decode.protobuf` names, in base64.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub descriptor: Option<String>,

    /// Hypertable in the schema `public`.
    pub table: String,

    /// How much time a chunk of the hypertable covers, as in `spec.sink.timescale.chunkInterval`.
    #[serde(default = "default_chunk_interval")]
    pub chunk_interval: String,

    /// What is done with rows that exist with other values, as in `spec.sink.timescale.onConflict`.
    #[serde(default, skip_serializing_if = "is_default")]
    pub on_conflict: OnConflict,

    /// Maximum size in bytes of the dead letters that are kept per hour, as in `spec.deadLetters.maxBytesPerHour`.
    #[serde(default = "default_dead_letter_bytes_per_hour")]
    pub dead_letter_bytes_per_hour: i64,

    /// The value of `spec.replay`. It is part of the configuration and not of the database, so that a replay never uses an old decoder.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub replay: Option<Replay>,
}

impl IngestConfiguration {
    /// The Pipeline, as the owner of its rows in the database.
    #[must_use]
    pub fn owner(&self) -> Owner {
        Owner { cluster: self.cluster.clone(), namespace: self.namespace.clone(), pipeline: self.pipeline.clone() }
    }
}

/// Workers of an earlier version do not know the field.
#[allow(clippy::trivially_copy_pass_by_ref, reason = "serde passes a reference")]
fn is_default(on_conflict: &OnConflict) -> bool {
    *on_conflict == OnConflict::default()
}

fn default_dead_letter_bytes_per_hour() -> i64 {
    DeadLetters::default().bytes_per_hour()
}

/// A Gateway that a worker reads.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct IngestGateway {
    /// Name of the Gateway.
    pub name: String,

    /// Host name of the broker's internal listener, or of an external broker.
    pub host: String,

    /// Its port.
    pub port: u16,

    /// Whether the connection is encrypted. Always for the internal listener of a broker that the operator runs: the worker verifies it
    /// with the file [`AUTHORITIES_FILE`].
    pub tls: bool,

    /// The login, if the broker is external.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub external: Option<ExternalAccess>,
}

/// The login at an external broker. User name and password are files, see [`USERNAME_FILE`] and [`PASSWORD_FILE`].
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct ExternalAccess {
    /// Client identifier of the first session; those of the others follow from it.
    pub client_id: String,

    /// Whether the trusted authorities come from a file; otherwise the public authorities are trusted.
    pub authorities: bool,

    /// Number of sessions that share the subscription; absent if one session has an unshared subscription.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub shared_by: Option<i32>,
}

/// Prefix of the filter of a shared subscription (MQTT 5.0, section 4.8.2).
pub const SHARED: &str = "$share/";

impl IngestGateway {
    /// Number of sessions that read the Gateway.
    #[must_use]
    pub fn sessions(&self) -> i32 {
        self.external.as_ref().and_then(|external| external.shared_by).unwrap_or(1)
    }

    /// The filter to subscribe to for messages that match `filter`. The group is unique to the Pipeline at this broker, and does not
    /// depend on the number of sessions.
    #[must_use]
    pub fn subscription(&self, filter: &str) -> String {
        match &self.external {
            Some(ExternalAccess { client_id, shared_by: Some(_), .. }) => format!("{SHARED}{client_id}/{filter}"),
            _ => filter.to_owned(),
        }
    }
}
