//! `Pipeline`: which telemetry to take, how to decode and check it, and where it goes.

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
    validation = ("!self.metadata.name.contains('.')", "a Pipeline's name has no dots, since the Service of its workers carries it"),
    validation = ("self.spec.decode.format != 'SparkplugB' || self.spec.source.topic.matches('^spBv1[.]0/[^/]+/[+]/[^/]+(/[^/]+)?$')", "with the format SparkplugB the topic is spBv1.0/{group}/+/{node}/{device}, or spBv1.0/{group}/+/{device} for the metrics of nodes"),
    printcolumn(name = "Ready", type_ = "string", json_path = ".status.conditions[?(@.type==\"Ready\")].status"),
    printcolumn(name = "Table", type_ = "string", json_path = ".status.table"),
    printcolumn(name = "Gateways", type_ = "integer", json_path = ".status.gateways"),
    printcolumn(name = "Workers", type_ = "string", json_path = ".status.workers"),
    printcolumn(name = "Refused", type_ = "integer", json_path = ".status.deadLetters.lastDay"),
    printcolumn(name = "Reason", type_ = "string", json_path = ".status.conditions[?(@.type==\"Ready\")].reason"),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp"),
    doc = "A Pipeline takes telemetry from Gateways, decodes and checks it, and writes it into a TimescaleDB hypertable that it creates. A message is acknowledged to the broker only after its rows are committed; what is refused is kept as a dead letter with the reason."
)]
#[serde(rename_all = "camelCase")]
pub struct PipelineSpec {
    /// Which messages to take.
    pub source: Source,

    /// How a message becomes rows.
    pub decode: Decode,

    /// Where the rows go.
    pub sink: Sink,

    /// What becomes of messages that are refused.
    #[serde(default)]
    pub dead_letters: DeadLetters,

    /// Puts refused messages through again, after what they were refused for is mended.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub replay: Option<Replay>,

    /// The processes that do it.
    #[serde(default)]
    pub workers: Workers,

    /// Stops the workers. The broker keeps what arrives meanwhile, within the Gateway's limits.
    #[serde(default)]
    pub paused: bool,

    /// What becomes of the table and its rows when this object is deleted.
    #[serde(default)]
    pub deletion_policy: DeletionPolicy,
}

/// Which messages a Pipeline takes.
#[derive(Clone, Debug, Deserialize, KubeSchema, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Source {
    /// The Gateways to read, by their labels. Left out or empty: every Gateway of the namespace.
    #[serde(default)]
    pub gateway_selector: LabelSelector,

    /// Topic of the messages. `{name}` captures one level: `{device}`, which must be there once, is the device; any
    /// other becomes a text column of that name. `+` matches one level that is not stored.
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

/// Where rows go.
#[derive(Clone, Debug, Deserialize, Eq, JsonSchema, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Sink {
    /// A TimescaleDB.
    pub timescale: TimescaleSink,
}

/// A table in a TimescaleDB.
#[derive(Clone, Debug, Deserialize, Eq, KubeSchema, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct TimescaleSink {
    /// Secret in this namespace with the connection URI of the database. Its user must be allowed to create tables. The Secret has to be of
    /// the type `kubernetes.io/basic-auth` (as those of CloudNativePG) or to have the label `fleetwright.io/credentials: "true"`.
    pub connection_secret: ConnectionSecretReference,

    /// Name of the hypertable, in the schema `public`. It is created where it is not there. Cannot be changed.
    #[schemars(length(min = 1, max = 48), regex(pattern = r"^[a-z_][a-z0-9_]*$"))]
    #[x_kube(validation = ("self == oldSelf", "table cannot be changed: create another Pipeline for another table"))]
    pub table: String,

    /// How much time one chunk of the hypertable covers: a duration such as `1h30m`, `7d` or `2w`. A change holds for new chunks.
    #[serde(default = "default_chunk_interval")]
    #[schemars(length(min = 2, max = 32), regex(pattern = super::duration::MINUTES_PATTERN))]
    pub chunk_interval: String,
}

fn default_chunk_interval() -> String {
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

/// What becomes of a table when its Pipeline is deleted.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, JsonSchema, PartialEq, Serialize)]
pub enum DeletionPolicy {
    /// The table stays, with its rows; dead letters stay as long as `deadLetters.retention` says.
    #[default]
    Retain,
    /// The table is dropped, and its rows and dead letters are gone.
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

    /// `Accepted`: the spec is valid. `TableReady`: the hypertable is as the spec says. `WorkersAvailable`: the workers have their
    /// sessions with every Gateway and have verified that they can write. `Ready`: all of these. `Reconciling` or `Stalled`: why the
    /// Pipeline is not ready. `DeadLettersDiscarded`, present for 24 hours: more messages were rejected than
    /// `deadLetters.maxBytesPerHour` keeps. `Replayed`, present with `spec.replay`: whether the replay is complete.
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
