//! The desired and the reported state of a Device: what the broker retains, what the device reported, and whether the two match.
//! Pure. A Device with neither costs one empty pointer.

use std::fmt::Write;

use serde_json::{Map, Value};

pub use super::report::{MAX_REPORT_BYTES, ReportError, parse_report};
use crate::api::condition::{Cause, Finding, SYNCED};
use crate::api::device::{DesiredStatus, DeviceStatus, ReportedStatus};
use crate::api::reason::Reason;
use crate::api::{Device, is_reconciliation_paused, name};

/// Upper limit of `spec.desired` in bytes of compact JSON: a small device can receive it in one message.
pub const MAX_DESIRED_BYTES: usize = 16 * 1024;

/// Upper limit of the differences in a condition's message.
const MAX_NAMED_DIFFERENCES: usize = 3;

/// Upper limit of the length of a value in a condition's message, in characters.
const MAX_VALUE_CHARACTERS: usize = 40;

/// The desired and the reported state of a Device.
#[derive(Clone, Debug, Default)]
pub struct Twin {
    desired: Desired,
    /// Whether reconciliation is paused.
    paused: bool,
    /// The last report, if the status does not contain it yet.
    pending: Option<ReportedStatus>,
    /// Why the last report was rejected.
    fault: Option<Box<Cause>>,
    /// The states in the status.
    written: Written,
}

/// The desired state.
#[derive(Clone, Debug, Default)]
enum Desired {
    /// None.
    #[default]
    Nothing,
    /// Larger than [`MAX_DESIRED_BYTES`], with its size.
    TooLarge(usize),
    /// The state in compact JSON.
    State { json: Box<str>, revision: Box<str>, generation: i64, published: bool },
}

#[derive(Clone, Debug, Default)]
struct Written {
    desired: Option<DesiredStatus>,
    /// Generation and compact JSON.
    reported: Option<(Option<i64>, Box<str>)>,
}

/// The message that a broker has to retain for a device.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Wanted {
    /// None: a retained message is cleared.
    Nothing,
    /// Unchanged.
    LeaveAlone,
    /// This message.
    State {
        /// The generation in the payload.
        generation: i64,
        /// Payload of the message.
        payload: Box<str>,
    },
}

impl Twin {
    /// Updates the desired state from the spec. The status must have been observed before. Returns whether the message for the
    /// broker may have changed.
    pub fn update(&mut self, device: &Device) -> bool {
        let next = self.desired(device);
        let paused = is_reconciliation_paused(device);
        let changed = match (&self.desired, &next) {
            (Desired::State { revision: before, .. }, Desired::State { revision: after, .. }) => before != after,
            (Desired::Nothing, Desired::Nothing) | (Desired::TooLarge(_), Desired::TooLarge(_)) => false,
            _ => true,
        } || paused != self.paused;
        self.desired = next;
        self.paused = paused;
        changed
    }

    fn desired(&self, device: &Device) -> Desired {
        let Some(wanted) = &device.spec.desired else { return Desired::Nothing };
        // An object that was read from JSON can be serialized.
        let json = serde_json::to_string(wanted).unwrap_or_default();
        if json.len() > MAX_DESIRED_BYTES {
            return Desired::TooLarge(json.len());
        }
        let revision = name::revision([json.as_bytes()]);
        match (&self.desired, &self.written.desired) {
            (Desired::State { revision: known, generation, published, .. }, _) if **known == *revision => {
                Desired::State { json: json.into(), revision: revision.into(), generation: *generation, published: *published }
            }
            // An earlier run of the operator published it.
            (Desired::Nothing | Desired::TooLarge(_), Some(written)) if written.revision == revision => {
                Desired::State { json: json.into(), revision: revision.into(), generation: written.generation, published: true }
            }
            _ => Desired::State {
                json: json.into(),
                revision: revision.into(),
                generation: device.metadata.generation.unwrap_or_default(),
                published: false,
            },
        }
    }

    /// Updates the states from the status of the Device.
    pub fn observe(&mut self, status: &DeviceStatus) {
        let reported = status.reported.as_ref().map(|reported| (reported.generation, encode(&reported.state)));
        self.written = Written { desired: status.desired.clone(), reported };
        let said = status.conditions.iter().find(|condition| condition.type_ == SYNCED);
        let reason =
            said.and_then(|said| Reason::of(said).filter(|reason| matches!(reason, Reason::ReportTooLarge | Reason::InvalidReport)));
        // After a restart the message is lost unless it is retained.
        if let (Some(reason), Some(said), None, None) = (reason, said, &self.fault, &self.pending) {
            self.fault = Some(Box::new(Cause::new(reason, said.message.clone())));
        }
    }

    /// Whether there is no state.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        let Self { desired, pending, fault, written, paused: _ } = self;
        matches!(desired, Desired::Nothing)
            && pending.is_none()
            && fault.is_none()
            && written.desired.is_none()
            && written.reported.is_none()
    }

    /// Why the desired state is not accepted.
    #[must_use]
    pub fn refusal(&self) -> Option<Cause> {
        let Desired::TooLarge(bytes) = self.desired else { return None };
        let message = format!(
            "spec.desired has {bytes} bytes as compact JSON: at most {MAX_DESIRED_BYTES} are sent to a device; reduce it, or use a \
             reference. The broker retains the previous state"
        );
        Some(Cause::new(Reason::DesiredTooLarge, message))
    }

    /// The message that the broker has to retain.
    #[must_use]
    pub fn wanted(&self) -> Wanted {
        match &self.desired {
            Desired::Nothing => Wanted::Nothing,
            _ if self.paused => Wanted::LeaveAlone,
            Desired::TooLarge(_) => Wanted::LeaveAlone,
            Desired::State { json, generation, .. } => {
                Wanted::State { generation: *generation, payload: format!("{{\"generation\":{generation},\"desired\":{json}}}").into() }
            }
        }
    }

    /// The broker retains the state of this generation. Returns whether this is a change.
    pub fn published(&mut self, proven: i64) -> bool {
        match &mut self.desired {
            Desired::State { generation, published, .. } if *generation == proven && !*published => {
                *published = true;
                true
            }
            _ => false,
        }
    }

    /// Whether the broker has not confirmed the desired state yet.
    #[must_use]
    pub fn awaits_broker(&self) -> bool {
        matches!(self.desired, Desired::State { published: false, .. })
    }

    /// Whether a report differs from the last one.
    #[must_use]
    pub fn is_news(&self, report: &Result<ReportedStatus, Cause>) -> bool {
        match (report, &self.fault) {
            (Err(cause), fault) => fault.as_deref() != Some(cause),
            (Ok(_), Some(_)) => true,
            (Ok(report), None) => match self.reported() {
                Some(known) => known.generation != report.generation || !equal_objects(&known.state, &report.state),
                None => true,
            },
        }
    }

    /// Stores a report, or why it was rejected.
    pub fn report(&mut self, report: Result<ReportedStatus, Cause>) {
        match report {
            Ok(report) => {
                self.fault = None;
                self.pending = Some(report);
            }
            Err(cause) => self.fault = Some(Box::new(cause)),
        }
    }

    /// The status was written with this report.
    pub fn written(&mut self, report: Option<&ReportedStatus>) {
        if self.pending.as_ref() == report {
            self.pending = None;
        }
    }

    fn reported(&self) -> Option<ReportedStatus> {
        self.pending.clone().or_else(|| self.written_report())
    }

    /// The report in the status.
    #[must_use]
    pub fn written_report(&self) -> Option<ReportedStatus> {
        let (generation, json) = self.written.reported.as_ref()?;
        // It was serialized by this module.
        let state = serde_json::from_str(json).unwrap_or_default();
        Some(ReportedStatus { generation: *generation, state })
    }

    /// Desired and reported state for the status.
    #[must_use]
    pub fn status(&self) -> (Option<DesiredStatus>, Option<ReportedStatus>) {
        let desired = match &self.desired {
            Desired::State { revision, generation, published: true, .. } => {
                Some(DesiredStatus { generation: *generation, revision: revision.to_string() })
            }
            // The broker retains the previous state.
            Desired::State { published: false, .. } | Desired::TooLarge(_) => self.written.desired.clone(),
            Desired::Nothing => None,
        };
        (desired, self.reported())
    }

    /// The condition `Synced`, if there is a desired state.
    #[must_use]
    pub fn synced(&self, device: &str, gateway: &str) -> Option<Finding> {
        let fails = |reason, message| Some(Finding::fails(SYNCED, Cause::new(reason, message)));
        let Desired::State { json, generation, published, .. } = &self.desired else {
            return self.refusal().map(|cause| Finding::fails(SYNCED, cause));
        };
        if !published {
            let message = format!("the broker of Gateway {gateway} does not retain the desired state yet: see the Gateway's conditions");
            return fails(Reason::NotPublished, message);
        }
        if let Some(cause) = &self.fault {
            return Some(Finding::fails(SYNCED, cause.as_ref().clone()));
        }
        let topic = name::reported_topic(device);
        match self.reported() {
            None => {
                fails(Reason::AwaitingReport, format!("the broker retains the desired state; the device has not reported at {topic} yet"))
            }
            Some(ReportedStatus { generation: Some(reported), .. }) if reported == *generation => {
                Some(Finding::holds(SYNCED, Reason::Synced, format!("the device reports generation {generation}, as desired")))
            }
            Some(ReportedStatus { generation: Some(reported), .. }) => fails(
                Reason::AwaitingReport,
                format!("the device reports generation {reported} at {topic}; desired is generation {generation}"),
            ),
            Some(ReportedStatus { generation: None, state }) => {
                // It was serialized by this module.
                let desired: Map<String, Value> = serde_json::from_str(json).unwrap_or_default();
                match differences(&desired, &state) {
                    None => Some(Finding::holds(SYNCED, Reason::Synced, "the device reports each member of the desired state")),
                    Some(text) => fails(Reason::Diverged, format!("the device reports another state than the desired one: {text}")),
                }
            }
        }
    }
}

fn encode(state: &Map<String, Value>) -> Box<str> {
    serde_json::to_string(state).unwrap_or_default().into()
}

/// A description of the first members of `desired` that differ in `reported`.
fn differences(desired: &Map<String, Value>, reported: &Map<String, Value>) -> Option<String> {
    let mut found = Vec::new();
    collect(&mut found, "", desired, reported);
    let more = found.len().saturating_sub(MAX_NAMED_DIFFERENCES);
    let mut text = found.into_iter().take(MAX_NAMED_DIFFERENCES).collect::<Vec<_>>().join("; ");
    if more > 0 {
        // Writing to a String cannot fail.
        let _ = write!(text, "; and {more} more");
    }
    (!text.is_empty()).then_some(text)
}

fn collect(found: &mut Vec<String>, path: &str, desired: &Map<String, Value>, reported: &Map<String, Value>) {
    for (key, wanted) in desired {
        let path = format!("{path}/{key}");
        match (wanted, reported.get(key)) {
            (Value::Object(wanted), Some(Value::Object(there))) => collect(found, &path, wanted, there),
            (Value::Null, None) => {}
            (wanted, Some(there)) if equal(wanted, there) => {}
            (wanted, there) => {
                let there = there.map_or_else(|| "missing".to_owned(), shortened);
                found.push(format!("{} is {there}, desired is {}", shorten(&path), shortened(wanted)));
            }
        }
    }
}

fn shortened(value: &Value) -> String {
    shorten(&value.to_string())
}

fn shorten(text: &str) -> String {
    match text.char_indices().nth(MAX_VALUE_CHARACTERS) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text.to_owned(),
    }
}

/// Whether two values are equal. Numbers are compared by value, because the API server returns 1.0 as 1.
fn equal(left: &Value, right: &Value) -> bool {
    match (left, right) {
        (Value::Number(left), Value::Number(right)) => left == right || left.as_f64() == right.as_f64(),
        (Value::Array(left), Value::Array(right)) => {
            left.len() == right.len() && left.iter().zip(right).all(|(left, right)| equal(left, right))
        }
        (Value::Object(left), Value::Object(right)) => equal_objects(left, right),
        (left, right) => left == right,
    }
}

fn equal_objects(left: &Map<String, Value>, right: &Map<String, Value>) -> bool {
    left.len() == right.len() && left.iter().all(|(key, value)| right.get(key).is_some_and(|other| equal(value, other)))
}

#[cfg(test)]
#[path = "twin_tests.rs"]
mod tests;
