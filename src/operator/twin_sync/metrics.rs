//! What the operator counts of its links.

use prometheus::{Gauge, IntCounterVec, IntGauge, IntGaugeVec, Opts, Registry};

use crate::operator::device::key::GatewayKey;

/// The metrics.
#[derive(Clone, Debug)]
pub struct TwinSyncMetrics {
    /// Messages that the brokers were given, by outcome.
    pub publishes: IntCounterVec,
    /// Reports of devices, by what became of them.
    pub reports: IntCounterVec,
    /// Reports that wait for their turn.
    pub waiting: IntGauge,
    /// Reports a second that may be written.
    pub budget: Gauge,
    connected: IntGaugeVec,
}

impl TwinSyncMetrics {
    /// Registers them.
    ///
    /// # Errors
    /// When one is registered already.
    pub fn register(registry: &Registry) -> Result<Self, prometheus::Error> {
        let publishes = Opts::new("fleetwright_desired_publishes_total", "Desired states given to brokers.");
        let reports = Opts::new("fleetwright_reports_total", "Reports of devices, by what became of them.");
        let connected = Opts::new("fleetwright_link_connected", "Whether the operator is logged in at the broker of a Gateway.");
        let metrics = Self {
            publishes: IntCounterVec::new(publishes, &["outcome"])?,
            reports: IntCounterVec::new(reports, &["outcome"])?,
            waiting: IntGauge::new("fleetwright_reports_waiting", "Reports of devices that wait for their turn to be written.")?,
            budget: Gauge::new("fleetwright_reports_writes_per_second_limit", "Reports of devices a second that may be written.")?,
            connected: IntGaugeVec::new(connected, &["namespace", "gateway"])?,
        };
        registry.register(Box::new(metrics.publishes.clone()))?;
        registry.register(Box::new(metrics.reports.clone()))?;
        registry.register(Box::new(metrics.waiting.clone()))?;
        registry.register(Box::new(metrics.budget.clone()))?;
        registry.register(Box::new(metrics.connected.clone()))?;
        Ok(metrics)
    }

    /// Whether the operator is logged in at a broker.
    pub fn connected(&self, gateway: &GatewayKey, connected: bool) {
        self.connected.with_label_values(&[&*gateway.namespace, &*gateway.name]).set(connected.into());
    }

    /// A Gateway is gone.
    pub fn remove(&self, gateway: &GatewayKey) {
        // It may never have been linked.
        let _ = self.connected.remove_label_values(&[&*gateway.namespace, &*gateway.name]);
    }
}
