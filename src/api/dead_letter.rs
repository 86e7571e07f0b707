//! What becomes of the messages that a Pipeline refuses.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use kube::KubeSchema;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::resources::ResourceQuantity;

/// Why a message, or a reading of it, is not a row. A bounded set: it is a column of the table and a label of a metric.
#[derive(Clone, Copy, Debug, Deserialize, Eq, Hash, JsonSchema, PartialEq, Serialize)]
pub enum DeadLetterReason {
    /// The payload is not of the Pipeline's format.
    Malformed,
    /// A required field is not there, or null.
    MissingField,
    /// The Pipeline takes the time from the payload, and it is not there, or null.
    MissingTime,
    /// A value is of another type than the Pipeline says.
    WrongType,
    /// A value is below `min`, above `max`, or beyond what its column holds.
    OutOfRange,
    /// The time is further from the arrival than the Pipeline believes; never before the year 2000.
    TimeOutOfRange,
    /// A value is given in another unit than the Pipeline says.
    WrongUnit,
    /// A metric of Sparkplug B that no birth has named or typed.
    UnknownMetric,
    /// The topic names a device that is not in the registry.
    UnknownDevice,
    /// The device is disabled.
    DisabledDevice,
    /// The device belongs to another Gateway than the one that received the message.
    WrongGateway,
    /// The topic is not of the Pipeline's form.
    TopicMismatch,
    /// There is a row with the same time and device, and other values.
    Conflict,
    /// The database refuses the row, or the message.
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

    /// The name, as it stands in the table and in metrics.
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

/// What becomes of messages that are refused: how long they are kept, and how many.
#[derive(Clone, Debug, Deserialize, Eq, JsonSchema, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct DeadLetters {
    /// How long a refused message is kept: a duration such as `1h30m`, `7d` or `2w`. The operator deletes what is older, some minutes
    /// late at most. What a deleted Pipeline leaves is kept as long; with the deletion policy `Delete` it goes with the table.
    #[serde(default = "default_retention")]
    #[schemars(length(min = 2, max = 32), regex(pattern = super::duration::MINUTES_PATTERN))]
    pub retention: String,

    /// The most bytes of refused messages that are kept in an hour, in all workers together, what the database needs for each
    /// beside its payload included. What is beyond it is counted by reason in `fleetwright.dead_letter_count`, acknowledged, and not
    /// kept: a storm of bad messages must not fill the disk. A hundredth of it is set aside for each reason, so that a storm of one does
    /// not hide another. 0 keeps none.
    #[serde(default = "default_max_bytes_per_hour")]
    pub max_bytes_per_hour: ResourceQuantity,
}

impl DeadLetters {
    /// [`Self::max_bytes_per_hour`] in bytes; an absurdly large number is no bound.
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

/// Some 80,000 messages of 200 bytes. Less than a gigabyte a day, and 24 in the retention's 30 days.
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

    /// Only what arrived then or later.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub since: Option<Time>,

    /// Only what arrived before then.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub until: Option<Time>,

    /// Only messages with a topic that this MQTT filter matches, as in `plants/+/press/#`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 256))]
    pub topic: Option<String>,
}

/// How far a replay is.
#[derive(Clone, Copy, Debug, Deserialize, Eq, JsonSchema, PartialEq, Serialize)]
pub enum ReplayState {
    /// No worker has begun it.
    Waiting,
    /// It is under way.
    Running,
    /// It is done.
    Finished,
}

/// The progress of a replay. While it runs, the numbers are updated at each tenth of the whole.
#[derive(Clone, Debug, Deserialize, Eq, JsonSchema, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct ReplayStatus {
    /// The token of the spec.
    pub token: String,

    /// How far it is.
    pub state: ReplayState,

    /// Messages that have become rows, and are no dead letters any more.
    #[serde(default)]
    pub stored: i64,

    /// Messages that were refused again.
    #[serde(default)]
    pub refused: i64,

    /// Messages that were left as they are: some of their readings are rows by the time of their arrival, and would be doubled.
    #[serde(default)]
    pub left_alone: i64,

    /// Messages that are still to be put through.
    #[serde(default)]
    pub remaining: i64,
}

/// How many messages were refused.
#[derive(Clone, Copy, Debug, Deserialize, Eq, JsonSchema, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct DeadLetterStatus {
    /// Messages that were refused in the last 24 hours, about: a number that differs by a quarter or less stays, so that a steady
    /// fleet causes no writes. The metrics of the workers are exact.
    pub last_day: i64,

    /// Those of them that were too many to be kept, about.
    pub discarded_last_day: i64,
}
