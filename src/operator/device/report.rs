//! Parses the reported state of a device. Pure.

use serde_json::{Map, Value};
use thiserror::Error;

use crate::api::device::ReportedStatus;
use crate::api::reason::Reason;

/// Upper limit of a report in bytes. It is stored in an object of the API server, and there may be 100,000.
pub const MAX_REPORT_BYTES: usize = 4 * 1024;

/// Why a report is rejected.
#[derive(Debug, Error)]
pub enum ReportError {
    /// Too long.
    #[error("the device's last report has {bytes} bytes: at most {MAX_REPORT_BYTES} are accepted; reduce the report")]
    TooLarge {
        /// Length in bytes.
        bytes: usize,
    },

    /// Not JSON.
    #[error("the device's last report is not JSON: expected {{\"generation\": 3, \"reported\": {{…}}}} or an object")]
    NotJson(#[source] serde_json::Error),

    /// JSON, but not an object.
    #[error("the device's last report is {found}: expected {{\"generation\": 3, \"reported\": {{…}}}} or an object")]
    NotAnObject {
        /// Type of the value.
        found: &'static str,
    },

    /// The generation is not an integer.
    #[error("the device's last report has a generation that is not an integer: expected the generation that the device received")]
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

/// Parses a message at `devices/<name>/reported`. `None` for an empty message, which clears the retained one.
///
/// # Errors
/// When the message is not a valid report.
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
        // The device only acknowledges a generation.
        None if only_generation => (object.remove("generation"), Map::new()),
        // The bare state, which may have a member of that name.
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

/// A merge patch (RFC 7386) cannot set a member to null. Without the member, the meaning is the same.
fn drop_nulls(object: &mut Map<String, Value>) {
    object.retain(|_, value| !value.is_null());
    for value in object.values_mut() {
        if let Value::Object(inner) = value {
            drop_nulls(inner);
        }
    }
}
