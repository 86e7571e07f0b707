//! What a device says of its state: pure.

use serde_json::{Map, Value};
use thiserror::Error;

use crate::api::device::ReportedStatus;
use crate::api::reason::Reason;

/// The most bytes of a report. It goes into an object of the API server, and there may be 100,000 of those.
pub const MAX_REPORT_BYTES: usize = 4 * 1024;

/// Why a report is not taken.
#[derive(Debug, Error)]
pub enum ReportError {
    /// Too long.
    #[error("the device's last report has {bytes} bytes: at most {MAX_REPORT_BYTES} are taken; let it report less")]
    TooLarge {
        /// Its length.
        bytes: usize,
    },

    /// No JSON.
    #[error("the device's last report is no JSON: expected {{\"generation\": 3, \"reported\": {{…}}}} or an object")]
    NotJson(#[source] serde_json::Error),

    /// JSON, but no object.
    #[error("the device's last report is {found}: expected {{\"generation\": 3, \"reported\": {{…}}}} or an object")]
    NotAnObject {
        /// What it is.
        found: &'static str,
    },

    /// A generation that is none.
    #[error("the device's last report gives a generation that is no whole number: expected the one it received")]
    InvalidGeneration,
}

impl ReportError {
    /// Reason of the condition.
    #[must_use]
    pub const fn reason(&self) -> Reason {
        match self {
            Self::TooLarge { .. } => Reason::ReportTooLarge,
            Self::NotJson(_) | Self::NotAnObject { .. } | Self::InvalidGeneration => Reason::InvalidReport,
        }
    }
}

/// What a message at `devices/<name>/reported` says; `None` for the empty one that clears what is retained.
///
/// # Errors
/// When it says nothing that could be used.
pub fn parse_report(payload: &[u8]) -> Result<Option<ReportedStatus>, ReportError> {
    if payload.is_empty() {
        return Ok(None);
    }
    if payload.len() > MAX_REPORT_BYTES {
        return Err(ReportError::TooLarge { bytes: payload.len() });
    }
    let mut object = match serde_json::from_slice(payload).map_err(ReportError::NotJson)? {
        Value::Object(object) => object,
        Value::Array(_) => return Err(ReportError::NotAnObject { found: "an array" }),
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => {
            return Err(ReportError::NotAnObject { found: "a bare value" });
        }
    };
    let only_generation = object.len() == 1 && object.contains_key("generation");
    let (generation, mut state) = match object.remove("reported") {
        Some(Value::Object(state)) => (object.remove("generation").filter(|generation| !generation.is_null()), state),
        // A device that only acknowledges what it received.
        None if only_generation => (object.remove("generation"), Map::new()),
        // The bare state, which may well have a member of that name.
        Some(other) => {
            object.insert("reported".to_owned(), other);
            (None, object)
        }
        None => (None, object),
    };
    let generation = generation.map(|generation| generation.as_i64().ok_or(ReportError::InvalidGeneration)).transpose()?;
    drop_nulls(&mut state);
    Ok(Some(ReportedStatus { generation, state }))
}

/// A merge patch (RFC 7386) cannot write a member that is null, and to leave it out means the same.
fn drop_nulls(object: &mut Map<String, Value>) {
    object.retain(|_, value| !value.is_null());
    for value in object.values_mut() {
        if let Value::Object(inner) = value {
            drop_nulls(inner);
        }
    }
}
