//! Why a message, or a reading of it, is not a row.

/// The reason of a dead letter. A bounded set: it is a column of the table and a label of a metric.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub enum Reason {
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
    /// The device belongs to another gateway than the one that the message came by.
    WrongGateway,
    /// The topic is not of the Pipeline's form.
    TopicMismatch,
    /// There is a row with the same time and device, and other values.
    Conflict,
    /// The database refuses the row.
    Rejected,
}

impl Reason {
    /// Every reason.
    pub const ALL: [Self; 14] = [
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
        }
    }
}

/// The most characters of a detail. Enough for the names of a few fields with what was expected and found; a payload may be
/// hundreds of megabytes, and stands in the dead letter anyway.
const DETAIL_CHARACTERS: usize = 500;

/// What is wrong with a message: the reason, and what was expected and found.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Refusal {
    /// Why.
    pub reason: Reason,
    /// What was expected and what was found. Never longer than a few hundred characters, and free of U+0000, which PostgreSQL
    /// does not store.
    pub detail: String,
}

impl Refusal {
    /// A refusal; the detail is cut and cleaned where it must be.
    #[must_use]
    pub fn new(reason: Reason, detail: &str) -> Self {
        let detail =
            detail.chars().take(DETAIL_CHARACTERS).map(|character| if character == '\0' { '\u{fffd}' } else { character }).collect();
        Self { reason, detail }
    }

    /// Adds what else is wrong with the same message: one message is one dead letter. The first reason stays.
    pub fn join(&mut self, other: &Self) {
        *self = Self::new(self.reason, &format!("{}; {}: {}", self.detail, other.reason.name(), other.detail));
    }
}

/// The text, quoted and cut, for a detail.
#[must_use]
pub fn excerpt(text: &str) -> String {
    const CHARACTERS: usize = 40;
    let cut: String = text.chars().take(CHARACTERS).collect();
    if cut.len() < text.len() { format!("{cut:?}…") } else { format!("{cut:?}") }
}
