//! Events: published when a condition changes, so that `kubectl describe` shows the cause.

use k8s_controller::events::{Event, EventRecorder, PublishError};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;
use kube::runtime::events::EventType;
use kube::{Resource, ResourceExt};
use tracing::{debug, info, warn};

use super::apply::is_namespace_terminating;
use crate::api::condition::READY;
use crate::api::reason::{Reason, Severity};
use crate::runtime::error::chain;

/// Reasons that every new object has for a short time. On an object that was ready in the same generation they are failures.
const STARTUP_REASONS: [Reason; 6] = [
    Reason::BrokerNotReady,
    Reason::CertificateNotProven,
    Reason::CredentialsNotProven,
    Reason::RegistryNotFilled,
    Reason::TableNotReady,
    Reason::WorkersNotReady,
];

/// Publishes an Event if the condition `Ready` changed, see [`publish_change_of`].
pub async fn publish_change<K: Resource<DynamicType = ()>>(
    recorder: &EventRecorder,
    object: &K,
    before: &[Condition],
    after: &[Condition],
) {
    publish_change_of(READY, recorder, object, before, after).await;
}

/// Publishes an Event if the status, the reason or the message of a condition changed. The Event's note is the condition's message.
pub async fn publish_change_of<K: Resource<DynamicType = ()>>(
    type_: &str,
    recorder: &EventRecorder,
    object: &K,
    before: &[Condition],
    after: &[Condition],
) {
    let of = |list: &[Condition]| list.iter().find(|condition| condition.type_ == type_).cloned();
    let Some(now) = of(after) else { return };
    let unchanged = of(before).is_some_and(|then| then.status == now.status && then.reason == now.reason && then.message == now.message);
    if unchanged {
        return;
    }
    info!(kind = %K::kind(&()), name = object.name_any(), condition = type_, status = now.status, reason = now.reason, "{}", now.message);
    let event = Event {
        type_: event_type(of(before).as_ref(), &now),
        reason: now.reason,
        action: "Reconcile".to_owned(),
        note: Some(now.message),
        related: None,
    };
    publish(recorder, object, &event).await;
}

/// Publishes an Event. A failure is logged: no reconciliation fails because of an Event.
pub async fn publish<K: Resource<DynamicType = ()>>(recorder: &EventRecorder, object: &K, event: &Event) {
    match recorder.publish(object, event).await {
        Ok(()) => {}
        Err(PublishError::Kube(kube::Error::Api(status))) if is_namespace_terminating(&status) => {
            debug!(name = object.name_any(), "the namespace is terminating and accepts no Event");
        }
        Err(error) => warn!(name = object.name_any(), error = chain(&error), "failed to publish an Event"),
    }
}

/// The type of the Event that follows from the severity of the reason. A condition with an unknown reason is a warning.
fn event_type(before: Option<&Condition>, now: &Condition) -> EventType {
    let was_true = before.is_some_and(|then| then.status == "True" && then.observed_generation == now.observed_generation);
    match Reason::of(now) {
        Some(reason) if reason.severity() == Severity::Normal => EventType::Normal,
        Some(reason) if !was_true && STARTUP_REASONS.contains(&reason) => EventType::Normal,
        _ => EventType::Warning,
    }
}

#[cfg(test)]
mod tests {
    use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
    use k8s_openapi::jiff::Timestamp;

    use super::*;

    fn ready(status: &str, reason: Reason, generation: i64) -> Condition {
        Condition {
            type_: READY.to_owned(),
            status: status.to_owned(),
            reason: reason.to_string(),
            message: String::new(),
            last_transition_time: Time(Timestamp::UNIX_EPOCH),
            observed_generation: Some(generation),
        }
    }

    #[test]
    fn an_event_is_a_warning_unless_the_reason_is_normal_or_the_object_starts() {
        let was = ready("True", Reason::Ready, 1);
        for (before, now, warns) in [
            (None, ready("True", Reason::Ready, 1), false),
            (None, ready("True", Reason::CertificateExpiresSoon, 1), true),
            (None, ready("False", Reason::BrokerNotReady, 1), false),
            (Some(&was), ready("False", Reason::BrokerNotReady, 2), false),
            (Some(&was), ready("False", Reason::BrokerNotReady, 1), true),
            (Some(&was), ready("False", Reason::BrokerUpdating, 1), false),
            (None, ready("False", Reason::SecretNotFound, 1), true),
            (Some(&was), ready("False", Reason::DatabaseUnavailable, 1), true),
        ] {
            assert_eq!(matches!(event_type(before, &now), EventType::Warning), warns, "{before:?} {now:?}");
        }
        let unknown = Condition { reason: "OfAnotherVersion".to_owned(), ..was };
        assert!(matches!(event_type(None, &unknown), EventType::Warning));
    }
}
