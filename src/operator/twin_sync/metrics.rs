//! Metrics of twin synchronization.

use prometheus::{Gauge, IntCounterVec, IntGauge, IntGaugeVec, Opts, Registry};

use crate::operator::device::key::GatewayKey;

/// The metrics.
#[derive(Clone, Debug)]
pub struct TwinSyncMetrics {
    /// Messages published to brokers, by outcome.
    pub publishes: IntCounterVec,
    /// Reports of devices, by outcome.
    pub reports: IntCounterVec,
    /// Queued reports.
    pub waiting: IntGauge,
    /// Upper limit of report writes per second.
    pub budget: Gauge,
    connected: IntGaugeVec,
}

impl TwinSyncMetrics {
    /// Registers the metrics.
    ///
    /// # Errors
    /// When a metric is registered twice.
    pub fn register(registry: &Registry) -> Result<Self, prometheus::Error> {
        let publishes = Opts::new("fleetwright_desired_publishes_total", "Desired states published to brokers, by outcome.");
        let reports = Opts::new("fleetwright_reports_total", "Reports of devices, by outcome.");
        let connected = Opts::new("fleetwright_link_connected", "Whether the operator is connected to the broker of a Gateway.");
        let metrics = Self {
            publishes: IntCounterVec::new(publishes, &["outcome"])?,
            reports: IntCounterVec::new(reports, &["outcome"])?,
            waiting: IntGauge::new("fleetwright_reports_waiting", "Queued reports of devices.")?,
            budget: Gauge::new("fleetwright_reports_writes_per_second_limit", "Upper limit of report writes per second.")?,
            connected: IntGaugeVec::new(connected, &["namespace", "gateway"])?,
        };
        registry.register(Box::new(metrics.publishes.clone()))?;
        registry.register(Box::new(metrics.reports.clone()))?;
        registry.register(Box::new(metrics.waiting.clone()))?;
        registry.register(Box::new(metrics.budget.clone()))?;
        registry.register(Box::new(metrics.connected.clone()))?;
        Ok(metrics)
    }

    /// Sets whether the operator is connected to a broker.
    pub fn connected(&self, gateway: &GatewayKey, connected: bool) {
        self.connected.with_label_values(&[&*gateway.namespace, &*gateway.name]).set(connected.into());
    }

    /// Removes the metrics of a deleted Gateway.
    pub fn remove(&self, gateway: &GatewayKey) {
        // There may be no such series.
        let _ = self.connected.remove_label_values(&[&*gateway.namespace, &*gateway.name]);
    }
}
