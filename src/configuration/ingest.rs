//! The configuration of a Pipeline's workers.

use serde::{Deserialize, Serialize};

use crate::api::pipeline::Decode;

/// Key of the workers' ConfigMap, and file name under which it is mounted.
pub const FILE: &str = "ingest.json";

/// What a worker does. Secrets are not in it: they are files of their own.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct IngestConfiguration {
    /// Namespace of the Pipeline.
    pub namespace: String,

    /// Name of the Pipeline.
    pub pipeline: String,

    /// Gateways to read, by name.
    pub gateways: Vec<IngestGateway>,

    /// Topic with captures, as in `spec.source.topic`.
    pub topic: String,

    /// As in `spec.decode`.
    pub decode: Decode,

    /// The FileDescriptorSet that `decode.protobuf` names, in base64.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub descriptor: Option<String>,

    /// Hypertable in the schema `public`.
    pub table: String,
}

/// A Gateway that a worker reads.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct IngestGateway {
    /// Name of the Gateway.
    pub name: String,

    /// Host name of the broker's internal listener.
    pub host: String,

    /// Port of the broker's internal listener.
    pub port: u16,
}
