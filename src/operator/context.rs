//! What all reconcilers share.

use std::sync::Arc;

use k8s_controller::events::{Event, EventRecorder, PublishError};
use k8s_controller::{PrometheusMetrics, ReconcileObserver};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;
use kube::runtime::controller::Action;
use kube::runtime::events::{EventType, Reporter};
use kube::{Client, Resource, ResourceExt};
use prometheus::Registry;
use tracing::{debug, info, warn};

use super::device::index::SharedDeviceIndex;
use super::kubernetes::apply::{WriteError, WriteMetrics, Writer, is_namespace_terminating};
use super::presence::totals::SharedTotals;
use super::twin_sync::external::SharedExternals;
use crate::api::condition::{BROKER_FULL, CERTIFICATE_EXPIRES_SOON, MESSAGES_DROPPED, READY, TOO_MANY_REFUSED};
use crate::runtime::error::chain;

/// Container images of what the operator runs.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Images {
    /// This very binary: agents and workers.
    pub fleetwright: String,

    /// The broker.
    pub mosquitto: String,

    /// `imagePullPolicy` of all containers; empty for the cluster's default.
    pub pull_policy: Option<String>,
}

/// What all reconcilers share.
#[derive(Clone)]
pub struct Context {
    /// For reads.
    pub client: Client,

    /// Container images of what the operator runs.
    pub images: Images,

    /// Namespace of the operator itself.
    pub namespace: String,

    /// The devices of all Gateways.
    pub fleet: SharedDeviceIndex,

    /// What is known of the clients of all Gateways.
    pub presence: SharedTotals,

    /// The brokers that run elsewhere.
    pub externals: SharedExternals,

    /// Where metrics are registered.
    pub metrics: Registry,

    writes: WriteMetrics,
    observer: Arc<dyn ReconcileObserver>,
    instance: String,
}

impl Context {
    /// A context whose events and leases name `instance`, a pod of `namespace`.
    ///
    /// # Errors
    /// When the registry refuses a metric.
    pub fn new(client: Client, images: Images, namespace: String, instance: String, metrics: Registry) -> Result<Self, prometheus::Error> {
        let observer = PrometheusMetrics::new("fleetwright")?;
        metrics.register(Box::new(observer.clone()))?;
        let writes = WriteMetrics::register(&metrics)?;
        let fleet = SharedDeviceIndex::default();
        let (presence, externals) = (SharedTotals::default(), SharedExternals::default());
        Ok(Self { client, images, namespace, fleet, presence, externals, metrics, writes, observer: Arc::new(observer), instance })
    }

    /// The writer of one reconciler, with a field manager such as `fleetwright/gateway`.
    #[must_use]
    pub fn writer(&self, field_manager: &'static str) -> Writer {
        Writer::new(self.client.clone(), field_manager, &self.writes)
    }

    /// The recorder of one reconciler's events, with a name such as `fleetwright.io/gateway`.
    #[must_use]
    pub fn recorder(&self, controller: &str) -> Arc<EventRecorder> {
        let reporter = Reporter { controller: controller.to_owned(), instance: Some(self.instance.clone()) };
        Arc::new(EventRecorder::new(self.client.clone(), reporter))
    }

    /// The observer that turns reconciliations into metrics.
    #[must_use]
    pub fn observer(&self) -> Arc<dyn ReconcileObserver> {
        Arc::clone(&self.observer)
    }
}

/// Publishes an event where `Ready` changed, see [`publish_change_of`].
pub async fn publish_change<K: Resource<DynamicType = ()>>(
    recorder: &EventRecorder,
    object: &K,
    before: &[Condition],
    after: &[Condition],
) {
    publish_change_of(READY, recorder, object, before, after).await;
}

/// Publishes an event where a condition changed its status, its reason or its message: the cause, for `kubectl describe`.
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
        type_: if is_alarming(of(before).as_ref(), &now) { EventType::Warning } else { EventType::Normal },
        reason: now.reason,
        action: "Reconcile".to_owned(),
        note: Some(now.message),
        related: None,
    };
    match recorder.publish(object, &event).await {
        Ok(()) => {}
        Err(PublishError::Kube(kube::Error::Api(status))) if is_namespace_terminating(&status) => {
            debug!(name = object.name_any(), "the namespace is on its way out, and takes in no event");
        }
        Err(error) => warn!(name = object.name_any(), error = chain(&error), "failed to publish an event"),
    }
}

/// What a start, a change or a deletion leads through, whenever it comes.
const PLANNED: [&str; 6] = ["AwaitingBroker", "AwaitingWorker", "BrokerUpdating", "Deleting", "Pausing", "Replaying"];

/// What a start leads through. From an object that was ready as it is, it is a failure.
const STARTING: [&str; 6] =
    ["BrokerNotReady", "CertificateNotProven", "CredentialsNotProven", "RegistryNotFilled", "TableNotReady", "WorkersNotReady"];

/// Conditions that are good while they are not True.
const HARMFUL: [&str; 2] = [BROKER_FULL, MESSAGES_DROPPED];

/// Whether someone should look: not where the operator is at work, and where time alone is likely to help.
fn is_alarming(before: Option<&Condition>, now: &Condition) -> bool {
    if HARMFUL.contains(&now.type_.as_str()) {
        return now.status == "True";
    }
    if now.status == "True" {
        return [CERTIFICATE_EXPIRES_SOON, TOO_MANY_REFUSED].contains(&now.reason.as_str());
    }
    let was_so = before.is_some_and(|then| then.status == "True" && then.observed_generation == now.observed_generation);
    let reason = now.reason.as_str();
    !PLANNED.contains(&reason) && (was_so || !STARTING.contains(&reason))
}

/// What came of a look at an object, where a namespace that is on its way out is no failure: it takes in nothing new, and the
/// object goes with it.
pub fn unless_terminating(outcome: Result<Option<Action>, WriteError>) -> Result<Option<Action>, WriteError> {
    match outcome {
        Err(error) if error.is_namespace_terminating() => {
            debug!(error = chain(&error), "the namespace is on its way out: waiting for the object to go");
            Ok(Some(Action::await_change()))
        }
        outcome => outcome,
    }
}

#[cfg(test)]
mod tests {
    use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
    use k8s_openapi::jiff::Timestamp;

    use super::*;

    fn ready(status: &str, reason: &str, generation: i64) -> Condition {
        Condition {
            type_: READY.to_owned(),
            status: status.to_owned(),
            reason: reason.to_owned(),
            message: String::new(),
            last_transition_time: Time(Timestamp::UNIX_EPOCH),
            observed_generation: Some(generation),
        }
    }

    #[test]
    fn what_a_change_leads_through_is_no_warning() {
        let was = ready("True", "Ready", 1);
        for (before, now, expected) in [
            (None, ready("True", "Ready", 1), false),
            (None, ready("True", CERTIFICATE_EXPIRES_SOON, 1), true),
            (None, ready("False", "BrokerNotReady", 1), false),
            (Some(&was), ready("False", "BrokerNotReady", 2), false),
            (Some(&was), ready("False", "BrokerNotReady", 1), true),
            (Some(&was), ready("False", "BrokerUpdating", 1), false),
            (None, ready("False", "SecretNotFound", 1), true),
            (Some(&was), ready("False", "DatabaseUnavailable", 1), true),
        ] {
            assert_eq!(is_alarming(before, &now), expected, "{before:?} {now:?}");
        }
    }
}
