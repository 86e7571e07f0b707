//! The handles from which the operator builds its controllers.

use std::sync::Arc;

use k8s_controller::events::EventRecorder;
use k8s_controller::{PrometheusMetrics, ReconcileObserver};
use kube::Client;
use kube::runtime::controller::Action;
use kube::runtime::events::Reporter;
use prometheus::Registry;
use tracing::debug;

use super::device::index::SharedDeviceIndex;
use super::kubernetes::apply::{WriteError, WriteMetrics, Writer};
use super::kubernetes::namespaces::WatchedNamespaces;
use super::presence::totals::SharedTotals;
use super::twin_sync::external::SharedExternals;
use crate::runtime::address::AddressPolicy;
use crate::runtime::error::chain;

/// Container images of the pods that the operator creates.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Images {
    /// The image of this binary, for agents and workers.
    pub fleetwright: String,

    /// The image of the broker.
    pub mosquitto: String,

    /// `imagePullPolicy` of all containers; empty for the cluster's default.
    pub pull_policy: Option<String>,
}

/// The handles of the operator. Each controller takes the ones that it needs at its start; no reconciler keeps the whole.
#[derive(Clone)]
pub struct Context {
    /// The client for reads.
    pub client: Client,

    /// Container images of the pods that the operator creates.
    pub images: Images,

    /// Namespace of the operator itself.
    pub namespace: String,

    /// The namespaces that it watches.
    pub watched: WatchedNamespaces,

    /// The devices of all Gateways.
    pub fleet: SharedDeviceIndex,

    /// Totals of connected and refused clients, by Gateway.
    pub presence: SharedTotals,

    /// Logins and login results of external brokers.
    pub externals: SharedExternals,

    /// Identity of the cluster: the UID of its namespace `kube-system`.
    pub cluster: Arc<str>,

    /// The addresses of databases and external brokers that the operator connects to.
    pub addresses: AddressPolicy,

    /// The registry of Prometheus metrics.
    pub metrics: Registry,

    writes: WriteMetrics,
    observer: Arc<dyn ReconcileObserver>,
    instance: String,
}

impl Context {
    /// A context whose events and leases name `instance`, a pod of `namespace`.
    ///
    /// # Errors
    /// If the registry refuses a metric.
    pub fn new(client: Client, images: Images, namespace: String, instance: String, metrics: Registry) -> Result<Self, prometheus::Error> {
        let observer = PrometheusMetrics::new("fleetwright")?;
        metrics.register(Box::new(observer.clone()))?;
        let writes = WriteMetrics::register(&metrics)?;
        let fleet = SharedDeviceIndex::default();
        let (presence, externals) = (SharedTotals::default(), SharedExternals::default());
        let addresses = AddressPolicy::default();
        Ok(Self {
            watched: WatchedNamespaces::new(client.clone(), &[]),
            client,
            images,
            namespace,
            fleet,
            presence,
            externals,
            cluster: "".into(),
            addresses,
            metrics,
            writes,
            observer: Arc::new(observer),
            instance,
        })
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

    /// The observer that records reconciliations as metrics.
    #[must_use]
    pub fn observer(&self) -> Arc<dyn ReconcileObserver> {
        Arc::clone(&self.observer)
    }
}

/// Waits instead of failing in a terminating namespace: it accepts no new objects, and will delete this object.
pub fn unless_terminating(outcome: Result<Option<Action>, WriteError>) -> Result<Option<Action>, WriteError> {
    match outcome {
        Err(error) if error.is_namespace_terminating() => {
            debug!(error = chain(&error), "the namespace is terminating: waiting for the deletion of the object");
            Ok(Some(Action::await_change()))
        }
        outcome => outcome,
    }
}
