//! Conditions as Flux, Helm, Argo CD and `kubectl wait` read them: from a verdict to a list of `metav1.Condition`.
//!
//! The rules are those of kstatus (<https://github.com/kubernetes-sigs/cli-utils/blob/master/pkg/kstatus/README.md>): while
//! `Ready` is not True, exactly one of `Reconciling` and `Stalled` is present and True; otherwise neither is present.

use super::reason::Reason;
use k8s_controller::conditions::{self, ConditionStatus, DesiredCondition};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;

/// The sum of all other conditions.
pub const READY: &str = "Ready";

/// The operator works on the object, or waits for something other than a change of the object.
pub const RECONCILING: &str = "Reconciling";

/// The operator waits for a change of the object.
pub const STALLED: &str = "Stalled";

/// The spec is valid.
pub const ACCEPTED: &str = "Accepted";

/// The broker runs and has accepted a login.
pub const BROKER_AVAILABLE: &str = "BrokerAvailable";

/// The broker presents certificates that clients can accept. Present only if a listener has TLS.
pub const CERTIFICATE_VALID: &str = "CertificateValid";

/// The Secret of the Gateway's client authority can sign. Present only if the Gateway has one.
pub const CLIENT_AUTHORITY_VALID: &str = "ClientAuthorityValid";

/// The broker dropped messages because a limit of the Gateway was reached. Present after the first time.
pub const MESSAGES_DROPPED: &str = "MessagesDropped";

/// The broker accepts no messages, because a queue, its memory or its volume is full. Present after the first time.
pub const BROKER_FULL: &str = "BrokerFull";

/// The operator has verified that the broker has the device's credential.
pub const CREDENTIALS_LIVE: &str = "CredentialsLive";

/// The device reports the desired state.
pub const SYNCED: &str = "Synced";

/// The hypertable is as the spec says.
pub const TABLE_READY: &str = "TableReady";

/// The workers have their sessions and have verified that they can write.
pub const WORKERS_AVAILABLE: &str = "WorkersAvailable";

/// More messages were rejected than are kept as dead letters. Present only if this happened in the last 24 hours.
pub const DEAD_LETTERS_DISCARDED: &str = "DeadLettersDiscarded";

/// The replay is complete. Present only with `spec.replay`.
pub const REPLAYED: &str = "Replayed";

/// A machine-readable `CamelCase` reason with a message for people: what was expected, what was found, what to do.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Cause {
    /// Reason.
    pub reason: Reason,

    /// Message. Without times and counters, because each change of it is a write to the API server.
    pub message: String,
}

impl Cause {
    /// A cause from its two parts.
    pub fn new(reason: Reason, message: impl Into<String>) -> Self {
        Self { reason, message: message.into() }
    }
}

/// One condition that is particular to a kind.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Finding {
    /// Type of the condition.
    pub condition: &'static str,

    /// `Some(true)` is True, `Some(false)` False, `None` Unknown.
    pub holds: Option<bool>,

    /// Why.
    pub cause: Cause,
}

impl Finding {
    /// A condition that is True.
    pub fn holds(condition: &'static str, reason: Reason, message: impl Into<String>) -> Self {
        Self { condition, holds: Some(true), cause: Cause::new(reason, message) }
    }

    /// A condition that is False.
    #[must_use]
    pub fn fails(condition: &'static str, cause: Cause) -> Self {
        Self { condition, holds: Some(false), cause }
    }

    /// A condition that is Unknown.
    #[must_use]
    pub fn unknown(condition: &'static str, cause: Cause) -> Self {
        Self { condition, holds: None, cause }
    }
}

/// Whether an object is ready, and if not, what it waits for.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Readiness {
    /// All conditions of the kind are True.
    Ready(Cause),

    /// The operator works on the object, or waits for something other than a change of the object.
    Reconciling(Cause),

    /// Waits for a change of this object.
    Stalled(Cause),
}

/// The conditions of an object at one generation: `previous`, with what was found and how ready that makes it.
///
/// A transition time stays while the status stays, so that the result equals `previous` if nothing changed.
/// Conditions of `previous` that are neither in `findings` nor among the three above are removed.
#[must_use]
pub fn conditions(previous: &[Condition], generation: i64, findings: &[Finding], readiness: &Readiness) -> Vec<Condition> {
    let mut list = previous.to_vec();
    let mut kept = vec![READY];
    for finding in findings {
        let status = match finding.holds {
            Some(true) => ConditionStatus::True,
            Some(false) => ConditionStatus::False,
            None => ConditionStatus::Unknown,
        };
        set(&mut list, generation, finding.condition, status, &finding.cause);
        kept.push(finding.condition);
    }
    match readiness {
        Readiness::Ready(cause) => set(&mut list, generation, READY, ConditionStatus::True, cause),
        Readiness::Reconciling(cause) => {
            set(&mut list, generation, READY, ConditionStatus::False, cause);
            set(&mut list, generation, RECONCILING, ConditionStatus::True, cause);
            kept.push(RECONCILING);
        }
        Readiness::Stalled(cause) => {
            set(&mut list, generation, READY, ConditionStatus::False, cause);
            set(&mut list, generation, STALLED, ConditionStatus::True, cause);
            kept.push(STALLED);
        }
    }
    list.retain(|condition| kept.contains(&condition.type_.as_str()));
    list
}

fn set(list: &mut Vec<Condition>, generation: i64, type_: &str, status: ConditionStatus, cause: &Cause) {
    let desired =
        DesiredCondition::new(type_, status, cause.reason.as_str(), bounded(&cause.message)).observed_generation(Some(generation));
    // Whether anything changed is seen by comparing whole statuses before the write.
    let _ = conditions::set(list, desired);
}

/// `metav1.Condition` allows 32,768 characters; a few lines are what a person reads.
fn bounded(message: &str) -> String {
    const MOST: usize = 1024;
    match message.char_indices().nth(MOST) {
        Some((end, _)) => format!("{}…", &message[..end]),
        None => message.to_owned(),
    }
}

/// Whether the condition of this type is True for this generation.
#[must_use]
pub fn is_true(list: &[Condition], type_: &str, generation: i64) -> bool {
    conditions::find_observed(list, type_, Some(generation)).is_some_and(|condition| condition.status == "True")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reconciling() -> Readiness {
        Readiness::Reconciling(Cause::new(Reason::GatewayNotFound, "no Gateway plant-1"))
    }

    fn types(list: &[Condition]) -> Vec<(&str, &str)> {
        list.iter().map(|c| (c.type_.as_str(), c.status.as_str())).collect()
    }

    #[test]
    fn not_ready_has_exactly_one_of_reconciling_and_stalled() {
        let first = conditions(&[], 1, &[], &reconciling());
        assert_eq!(types(&first), [("Ready", "False"), ("Reconciling", "True")]);
        let second = conditions(&first, 1, &[], &Readiness::Stalled(Cause::new(Reason::InvalidSpec, "")));
        assert_eq!(types(&second), [("Ready", "False"), ("Stalled", "True")]);
    }

    #[test]
    fn ready_has_neither() {
        let first = conditions(&[], 1, &[Finding::fails(ACCEPTED, Cause::new(Reason::NotAccepted, ""))], &reconciling());
        let second =
            conditions(&first, 2, &[Finding::holds(ACCEPTED, Reason::Accepted, "")], &Readiness::Ready(Cause::new(Reason::Ready, "")));
        assert_eq!(types(&second), [("Accepted", "True"), ("Ready", "True")]);
        assert!(second.iter().all(|c| c.observed_generation == Some(2)));
    }

    #[test]
    fn looking_again_changes_nothing() {
        let first = conditions(&[], 1, &[Finding::unknown(ACCEPTED, Cause::new(Reason::NotAccepted, "y"))], &reconciling());
        assert_eq!(conditions(&first, 1, &[Finding::unknown(ACCEPTED, Cause::new(Reason::NotAccepted, "y"))], &reconciling()), first);
    }

    #[test]
    fn a_condition_that_is_no_longer_found_goes() {
        let first = conditions(&[], 1, &[Finding::holds(MESSAGES_DROPPED, Reason::QueueLimitReached, "")], &reconciling());
        assert_eq!(types(&conditions(&first, 1, &[], &reconciling())), [("Ready", "False"), ("Reconciling", "True")]);
    }

    #[test]
    fn long_messages_are_cut_on_a_character() {
        let list = conditions(&[], 1, &[], &Readiness::Stalled(Cause::new(Reason::NotAccepted, "ü".repeat(5000))));
        assert_eq!(list[0].message.chars().count(), 1025);
    }
}
