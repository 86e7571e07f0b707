//! `Pipeline`: the source of telemetry, its decoding and validation, and its sink.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, LabelSelector};
use kube::{CustomResource, KubeSchema};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

pub use super::dead_letter::{DeadLetterStatus, DeadLetters, Replay, ReplayStatus};
pub use super::decode::{Decode, Field, FieldType, Format, Protobuf, TimeField, TimeUnit};
use super::reference::ConnectionSecretReference;
use super::resources::ComputeResources;
use super::unobserved;

/// The specification of a Pipeline.
#[derive(Clone, CustomResource, Debug, Deserialize, KubeSchema, PartialEq, Serialize)]
#[kube(
    group = "fleetwright.io",
    version = "v1alpha1",
    kind = "Pipeline",
    plural = "pipelines",
    shortname = "fwp",
    category = "fleet",
    namespaced,
    status = "PipelineStatus",
    scale(
        spec_replicas_path = ".spec.workers.replicas",
        status_replicas_path = ".status.replicas",
        label_selector_path = ".status.selector"
    ),
    derive = "PartialEq",
    validation = ("size(self.metadata.name) <= 40", "a Pipeline's name has at most 40 characters, since the names of its workers derive from it"),
    validation = ("!self.metadata.name.contains('.')", "a Pipeline's name has no dots, since it is part of the name of the workers' Service"),
    validation = ("self.spec.decode.format != 'SparkplugB' || self.spec.source.topic.matches('^spBv1[.]0/[^/]+/[+]/[^/]+(/[^/]+)?$')", "with the format SparkplugB the topic is spBv1.0/{group}/+/{node}/{device}, or spBv1.0/{group}/+/{device} for the metrics of nodes"),
    printcolumn(name = "Ready", type_ = "string", json_path = ".status.conditions[?(@.type==\"Ready\")].status"),
    printcolumn(name = "Table", type_ = "string", json_path = ".status.table"),
    printcolumn(name = "Gateways", type_ = "integer", json_path = ".status.gateways"),
    printcolumn(name = "Workers", type_ = "string", json_path = ".status.workers"),
    printcolumn(name = "Refused", type_ = "integer", json_path = ".status.deadLetters.lastDay"),
    printcolumn(name = "Reason", type_ = "string", json_path = ".status.conditions[?(@.type==\"Ready\")].reason"),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp"),
    doc = "A Pipeline reads telemetry from Gateways, decodes and validates it, and writes it into a TimescaleDB hypertable that the operator creates. A message is acknowledged to the broker only after its rows are committed. A message that is refused is kept as a dead letter with the reason."
)]
#[serde(rename_all = "camelCase")]
pub struct PipelineSpec {
    /// The messages to read.
    pub source: Source,

    /// How messages are decoded into rows.
    pub decode: Decode,

    /// The destination of the rows.
    pub sink: Sink,

    /// Storage of refused messages.
    #[serde(default)]
    pub dead_letters: DeadLetters,

    /// Processes refused messages again, after the cause of the refusal has been fixed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub replay: Option<Replay>,

    /// The worker processes.
    #[serde(default)]
    pub workers: Workers,

    /// Stops the workers. The broker queues messages within the Gateway's limits.
    #[serde(default)]
    pub paused: bool,

    /// Whether the table is kept or dropped when this object is deleted.
    #[serde(default)]
    pub deletion_policy: DeletionPolicy,
}

/// The messages that a Pipeline reads.
#[derive(Clone, Debug, Deserialize, KubeSchema, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Source {
    /// The Gateways to read, by their labels. Default: every Gateway of the namespace.
    #[serde(default)]
    pub gateway_selector: LabelSelector,

    /// Topic of the messages. `{name}` captures one level. `{device}` is required exactly once and captures the device; any other
    /// capture becomes a text column of that name. `+` matches one level that is not stored.
    #[schemars(
        length(min = 8, max = 256),
        regex(
            pattern = r"^(([^+#/{}$\x00-\x1f\x7f]+|\+|\{[a-z_][a-z0-9_]{0,62}\})/)*([^+#/{}$\x00-\x1f\x7f]+|\+|\{[a-z_][a-z0-9_]{0,62}\})$"
        )
    )]
    #[x_kube(validation = ("self.split('/').exists_one(level, level == '{device}')", "the topic must name {device} exactly once, as in devices/{device}/telemetry"))]
    #[x_kube(validation = ("!self.split('/').exists(level, level in ['{time}', '{device_id}'])", "a capture may not be called time or device_id: those columns are Fleetwright's"))]
    pub topic: String,
}

/// The destination of the rows.
#[derive(Clone, Debug, Deserialize, Eq, JsonSchema, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Sink {
    /// A table in a TimescaleDB database.
    pub timescale: TimescaleSink,
}

/// A table in a TimescaleDB database.
#[derive(Clone, Debug, Deserialize, Eq, KubeSchema, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct TimescaleSink {
    /// Secret in this namespace with the connection URI of the database. The user in the URI must be allowed to create tables. The Secret must
    /// have the type `kubernetes.io/basic-auth`, as those of CloudNativePG, or the label `fleetwright.io/credentials: "true"`.
    ///
    /// The key `ca.crt`, if it exists, has the certificates (PEM) of the authorities that sign the certificate of the database server. The URI
    /// decides with `sslmode` (`disable`, `prefer`, `require` or `verify-full`) how the connection is encrypted. Without `sslmode` it is
    /// `verify-full` if the Secret has `ca.crt` or if the host has a public name (at least three labels, such as `db.example.com`; not
    /// `db.namespace.svc`), and `prefer` otherwise: encrypted if the server supports it, without verification. `verify-full` verifies
    /// certificate and host name, by `ca.crt` or else by the public authorities.
    pub connection_secret: ConnectionSecretReference,

    /// Name of the hypertable in the schema `public`. The operator creates the table if it does not exist. Cannot be changed.
    #[schemars(length(min = 1, max = 48), regex(pattern = r"^[a-z_][a-z0-9_]*$"))]
    #[x_kube(validation = ("self == oldSelf", "table cannot be changed: create another Pipeline for another table"))]
    pub table: String,

    /// What happens to a reading whose row exists with other values. Readings with the same time, device, captures and `key` fields are one row:
    /// values that the row does not have yet are added to it, so that a device may send one reading in several messages.
    #[serde(default)]
    pub on_conflict: OnConflict,

    /// Time range of one chunk of the hypertable: a duration such as `1h30m`, `7d` or `2w`. A change applies to new chunks.
    #[serde(default = "default_chunk_interval")]
    #[schemars(length(min = 2, max = 32), regex(pattern = super::duration::MINUTES_PATTERN))]
    pub chunk_interval: String,
}

/// What happens to a reading whose row exists with other values.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, JsonSchema, PartialEq, Serialize)]
pub enum OnConflict {
    /// The message becomes a dead letter with the reason `Conflict`. The row does not change.
    #[default]
    DeadLetter,
    /// The row keeps its values.
    Keep,
    /// The values of the later message replace those of the row.
    Replace,
}

/// A day.
#[must_use]
pub fn default_chunk_interval() -> String {
    "1d".to_owned()
}

/// The processes of a Pipeline.
#[derive(Clone, Debug, Deserialize, Eq, JsonSchema, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Workers {
    /// Number of workers that share the Gateways. One worker reads each Gateway, so that its messages keep their order. An external
    /// broker with a `sharedSubscription` can be read by as many workers as it has sessions. Workers beyond that number would have
    /// nothing to read, and are not started. `kubectl scale fwp/<name> --replicas 3` and a HorizontalPodAutoscaler change this field;
    /// a worker that takes over a Gateway continues where the previous worker stopped. Use `paused` to stop reading.
    #[serde(default = "default_replicas")]
    #[schemars(range(min = 1, max = 1000))]
    pub replicas: i32,

    /// Compute resources of each worker.
    #[serde(default = "default_worker_resources")]
    pub resources: ComputeResources,
}

impl Default for Workers {
    fn default() -> Self {
        Self { replicas: default_replicas(), resources: default_worker_resources() }
    }
}

const fn default_replicas() -> i32 {
    1
}

fn default_worker_resources() -> ComputeResources {
    ComputeResources {
        limits: [("memory".to_owned(), "128Mi".into())].into(),
        requests: [("cpu".to_owned(), "50m".into()), ("memory".to_owned(), "32Mi".into())].into(),
    }
}

/// Whether a table is kept or dropped when its Pipeline is deleted.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, JsonSchema, PartialEq, Serialize)]
pub enum DeletionPolicy {
    /// The table and its rows are kept; dead letters are kept for `deadLetters.retention`.
    #[default]
    Retain,
    /// The table is dropped, and its dead letters are deleted.
    Delete,
}

/// The observed state of a Pipeline.
#[derive(Clone, Debug, Deserialize, JsonSchema, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct PipelineStatus {
    /// The generation of the spec that this status describes; -1 before the first reconciliation.
    #[serde(default = "unobserved")]
    pub observed_generation: i64,

    /// The hypertable, with its schema.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub table: Option<String>,

    /// How many Gateways the Pipeline reads.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gateways: Option<i64>,

    /// Ready workers and desired workers, as `1/1`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub workers: Option<String>,

    /// Number of existing workers, for the scale subresource.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub replicas: Option<i32>,

    /// Selects the workers' pods, for the scale subresource.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub selector: Option<String>,

    /// Number of rejected messages.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub dead_letters: Option<DeadLetterStatus>,

    /// Progress of the replay in `spec.replay`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub replay: Option<ReplayStatus>,

    /// `Accepted`: the spec is valid. `TableReady`: the hypertable matches the spec. `WorkersAvailable`: the workers have their
    /// sessions with every Gateway, have verified that they can write, and no batch of messages fails repeatedly. `Ready`: all of
    /// these. `Reconciling` or `Stalled`: why the Pipeline is not ready. `DeadLettersDiscarded`, present for 24 hours: more messages were
    /// rejected than `deadLetters.maxBytesPerHour` keeps. `Replayed`, present with `spec.replay`: whether the replay is complete.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["type"]))]
    pub conditions: Vec<Condition>,
}

impl Default for PipelineStatus {
    fn default() -> Self {
        Self {
            observed_generation: unobserved(),
            table: None,
            gateways: None,
            workers: None,
            replicas: None,
            selector: None,
            dead_letters: None,
            replay: None,
            conditions: Vec::new(),
        }
    }
}
