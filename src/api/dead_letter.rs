//! Dead letters: storage and replay of the messages that a Pipeline refuses.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use kube::KubeSchema;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::resources::ResourceQuantity;

/// Why a message, or a reading of it, was refused. A bounded set, because it is the label of a metric.
#[derive(Clone, Copy, Debug, Deserialize, Eq, Hash, JsonSchema, PartialEq, Serialize)]
pub enum DeadLetterReason {
    /// The payload does not have the Pipeline's format.
    Malformed,
    /// A required field is absent or null.
    MissingField,
    /// The Pipeline reads the time from the payload, and it is absent or null.
    MissingTime,
    /// A value has another type than the field in the spec.
    WrongType,
    /// A value is below `min`, above `max`, or outside the range of its column.
    OutOfRange,
    /// The time is before the year 2000, older than `maxAge` or further in the future than `maxAhead`.
    TimeOutOfRange,
    /// A value has another unit than the field in the spec.
    WrongUnit,
    /// No birth message of Sparkplug B has declared the metric or its type.
    UnknownMetric,
    /// The topic names a device that is not in the registry.
    UnknownDevice,
    /// The device is disabled.
    DisabledDevice,
    /// The device belongs to another Gateway than the one that received the message.
    WrongGateway,
    /// The topic does not match the Pipeline's topic.
    TopicMismatch,
    /// A row with the same time and device has other values.
    Conflict,
    /// The database refused the row, or the message.
    Rejected,
    /// The message has more readings, larger rows or longer captures, or spans more chunks of the table, than a worker takes at once.
    TooLarge,
}

impl DeadLetterReason {
    /// Every reason, in the order of their declaration.
    pub const ALL: [Self; 15] = [
        Self::Malformed,
        Self::MissingField,
        Self::MissingTime,
        Self::WrongType,
        Self::OutOfRange,
        Self::TimeOutOfRange,
        Self::WrongUnit,
        Self::UnknownMetric,
        Self::UnknownDevice,
        Self::DisabledDevice,
        Self::WrongGateway,
        Self::TopicMismatch,
        Self::Conflict,
        Self::Rejected,
        Self::TooLarge,
    ];

    /// The name of the reason in the table and in metrics.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Malformed => "Malformed",
            Self::MissingField => "MissingField",
            Self::MissingTime => "MissingTime",
            Self::WrongType => "WrongType",
            Self::OutOfRange => "OutOfRange",
            Self::TimeOutOfRange => "TimeOutOfRange",
            Self::WrongUnit => "WrongUnit",
            Self::UnknownMetric => "UnknownMetric",
            Self::UnknownDevice => "UnknownDevice",
            Self::DisabledDevice => "DisabledDevice",
            Self::WrongGateway => "WrongGateway",
            Self::TopicMismatch => "TopicMismatch",
            Self::Conflict => "Conflict",
            Self::Rejected => "Rejected",
            Self::TooLarge => "TooLarge",
        }
    }
}

/// Retention and quota of refused messages.
#[derive(Clone, Debug, Deserialize, Eq, JsonSchema, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct DeadLetters {
    /// How long refused messages are kept: a duration such as `1h30m`, `7d` or `2w`. The operator deletes older ones with a delay of
    /// a few minutes. The same applies after the Pipeline is deleted, unless its deletion policy is `Delete`.
    #[serde(default = "default_retention")]
    #[schemars(length(min = 2, max = 32), regex(pattern = super::duration::MINUTES_PATTERN))]
    pub retention: String,

    /// Maximum size of the refused messages that all workers together keep per hour, in bytes, including the database's overhead for
    /// each message. Messages beyond the limit are counted by reason in `fleetwright.dead_letter_count`, acknowledged, and not kept,
    /// so that many invalid messages cannot fill the disk. A hundredth of the limit is reserved for each reason, so that messages
    /// with one reason do not use up the whole limit. 0 keeps none.
    #[serde(default = "default_max_bytes_per_hour")]
    pub max_bytes_per_hour: ResourceQuantity,
}

impl DeadLetters {
    /// [`Self::max_bytes_per_hour`] in bytes. A number that exceeds the range is treated as no limit.
    #[must_use]
    pub fn bytes_per_hour(&self) -> i64 {
        self.max_bytes_per_hour.to_units().unwrap_or(i64::MAX)
    }
}

impl Default for DeadLetters {
    fn default() -> Self {
        Self { retention: default_retention(), max_bytes_per_hour: default_max_bytes_per_hour() }
    }
}

fn default_retention() -> String {
    "30d".to_owned()
}

/// About 80,000 messages of 200 bytes. Less than a gigabyte per day, and 24 GB in the default retention of 30 days.
fn default_max_bytes_per_hour() -> ResourceQuantity {
    "32Mi".into()
}

/// A request to process dead letters again with the current spec of the Pipeline. An accepted message becomes rows, and its dead
/// letter is removed. A message that is rejected again stays a dead letter, with the new reason.
#[derive(Clone, Debug, Deserialize, KubeSchema, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = ("!has(self.since) || !has(self.until) || self.since < self.until", "since must be before until"))]
pub struct Replay {
    /// Any text, for instance a date or a ticket number. A new token starts a replay of the dead letters that exist at that moment. The
    /// first worker runs it beside its other work, and resumes it after a restart. A token that was used before starts no replay.
    #[schemars(length(min = 1, max = 63), regex(pattern = r"^[A-Za-z0-9]([A-Za-z0-9._:-]*[A-Za-z0-9])?$"))]
    pub token: String,

    /// Replays only messages that were rejected for one of these reasons. Default: for any reason.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 15))]
    pub reasons: Vec<DeadLetterReason>,

    /// Replays only messages that arrived at this time or later.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub since: Option<Time>,

    /// Replays only messages that arrived before this time.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub until: Option<Time>,

    /// Replays only messages whose topic matches this MQTT topic filter, such as `plants/+/press/#`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 256))]
    pub topic: Option<String>,
}

/// State of a replay.
#[derive(Clone, Copy, Debug, Deserialize, Eq, JsonSchema, PartialEq, Serialize)]
pub enum ReplayState {
    /// No worker has started the replay.
    Waiting,
    /// The replay is in progress.
    Running,
    /// The replay is complete.
    Finished,
}

/// The progress of a replay. While it runs, the numbers are updated after each tenth of the messages.
#[derive(Clone, Debug, Deserialize, Eq, JsonSchema, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct ReplayStatus {
    /// The token of the spec.
    pub token: String,

    /// State of the replay.
    pub state: ReplayState,

    /// Number of messages that were stored as rows and removed from the dead letters.
    #[serde(default)]
    pub stored: i64,

    /// Number of messages that were refused again.
    #[serde(default)]
    pub refused: i64,

    /// Number of messages that were skipped, because some of their readings are already rows with the time of arrival, and a replay
    /// would duplicate these rows.
    #[serde(default)]
    pub left_alone: i64,

    /// Number of messages that have not been processed yet.
    #[serde(default)]
    pub remaining: i64,
}

/// Number of refused messages.
#[derive(Clone, Copy, Debug, Deserialize, Eq, JsonSchema, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct DeadLetterStatus {
    /// Approximate number of messages that were refused in the last 24 hours. A change of a quarter or less is not written, so that a
    /// steady fleet causes no writes. The metrics of the workers are exact.
    pub last_day: i64,

    /// Approximate number of these messages that exceeded `maxBytesPerHour` and were not kept.
    pub discarded_last_day: i64,
}
