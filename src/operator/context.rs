//! What all reconcilers share.

use std::sync::Arc;

use k8s_controller::events::{Event, EventRecorder};
use k8s_controller::{PrometheusMetrics, ReconcileObserver};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;
use kube::runtime::events::{EventType, Reporter};
use kube::{Client, Resource, ResourceExt};
use prometheus::Registry;
use tracing::{info, warn};

use super::apply::{WriteMetrics, Writer};
use super::device::fleet::SharedFleet;
use super::presence::totals::SharedTotals;
use crate::api::condition::{CERTIFICATE_EXPIRES_SOON, READY};

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

    /// The devices of all Gateways.
    pub fleet: SharedFleet,

    /// What is known of the clients of all Gateways.
    pub presence: SharedTotals,

    /// Where metrics are registered.
    pub metrics: Registry,

    writes: WriteMetrics,
    observer: Arc<dyn ReconcileObserver>,
    instance: String,
}

impl Context {
    /// A context whose events and leases name `instance` (the pod).
    ///
    /// # Errors
    /// When the registry refuses a metric.
    pub fn new(client: Client, images: Images, instance: String, metrics: Registry) -> Result<Self, prometheus::Error> {
        let observer = PrometheusMetrics::new("fleetwright")?;
        metrics.register(Box::new(observer.clone()))?;
        let writes = WriteMetrics::register(&metrics)?;
        let fleet = SharedFleet::default();
        let presence = SharedTotals::default();
        Ok(Self { client, images, fleet, presence, metrics, writes, observer: Arc::new(observer), instance })
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
    let healthy = now.status == "True" && now.reason != CERTIFICATE_EXPIRES_SOON;
    info!(kind = %K::kind(&()), name = object.name_any(), condition = type_, status = now.status, reason = now.reason, "{}", now.message);
    let event = Event {
        type_: if healthy { EventType::Normal } else { EventType::Warning },
        reason: now.reason,
        action: "Reconcile".to_owned(),
        note: Some(now.message),
        related: None,
    };
    if let Err(error) = recorder.publish(object, &event).await {
        warn!(name = object.name_any(), error = %error, "failed to publish an event");
    }
}
