//! Metrics of connection states.

use prometheus::core::Collector;
use prometheus::{Gauge, IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Opts, Registry};

use super::totals::GatewayTotals;
use crate::operator::device::key::GatewayKey;

/// The metrics.
#[derive(Debug)]
pub struct PresenceMetrics {
    /// Writes of a Device's connection, by outcome.
    pub writes: IntCounterVec,
    /// Devices that are ready to be written.
    pub waiting: IntGauge,
    /// Devices that change often and are held back.
    pub damped: IntGauge,
    /// How long the oldest of the ready devices has been ready, in seconds.
    pub oldest: Gauge,
    /// Pages that agents returned.
    pub pages: IntCounter,
    /// Upper limit of writes per second.
    pub budget: Gauge,
    devices: IntGaugeVec,
    refused: IntGaugeVec,
}

impl PresenceMetrics {
    /// Registers the metrics.
    ///
    /// # Errors
    /// When a metric is registered twice.
    pub fn register(registry: &Registry) -> Result<Self, prometheus::Error> {
        let by = |name: &str, help: &str, labels: &[&str]| registered(registry, IntGaugeVec::new(Opts::new(name, help), labels)?);
        Ok(Self {
            writes: registered(
                registry,
                IntCounterVec::new(Opts::new("fleetwright_presence_writes_total", "Writes of a Device's connection."), &["outcome"])?,
            )?,
            waiting: registered(
                registry,
                IntGauge::new("fleetwright_presence_waiting", "Devices whose connection state is ready to be written.")?,
            )?,
            damped: registered(
                registry,
                IntGauge::new("fleetwright_presence_damped", "Devices that change often and whose connection state is held back.")?,
            )?,
            oldest: registered(
                registry,
                Gauge::new(
                    "fleetwright_presence_oldest_waiting_seconds",
                    "How long the oldest ready connection state has been ready, in seconds.",
                )?,
            )?,
            pages: registered(
                registry,
                IntCounter::new("fleetwright_presence_pages_total", "Pages of broker clients that agents returned.")?,
            )?,
            budget: registered(
                registry,
                Gauge::new("fleetwright_presence_writes_per_second_limit", "Upper limit of connection writes per second.")?,
            )?,
            devices: by(
                "fleetwright_gateway_devices",
                "Devices of a Gateway: declared, live, connected.",
                &["namespace", "gateway", "state"],
            )?,
            refused: by(
                "fleetwright_gateway_refused",
                "Clients that a Gateway's broker refused since its pod was created.",
                &["namespace", "gateway"],
            )?,
        })
    }

    /// Sets the totals of a Gateway.
    pub fn set(&self, gateway: &GatewayKey, (declared, live): (usize, usize), totals: Option<&GatewayTotals>) {
        let labels = |state: &'static str| [gateway.namespace.to_string(), gateway.name.to_string(), state.to_owned()];
        let count = |number: usize| i64::try_from(number).unwrap_or(i64::MAX);
        self.devices.with_label_values(&labels("declared")).set(count(declared));
        self.devices.with_label_values(&labels("live")).set(count(live));
        match totals.and_then(|totals| totals.connected) {
            Some(connected) => self.devices.with_label_values(&labels("connected")).set(connected),
            // An unknown number is not reported.
            None => drop(self.devices.remove_label_values(&labels("connected"))),
        }
        if let Some(clients) = totals.and_then(|totals| totals.clients.as_ref()) {
            self.refused.with_label_values(&[&*gateway.namespace, &*gateway.name]).set(clients.refused);
        }
    }

    /// Removes the metrics of a deleted Gateway.
    pub fn remove(&self, gateway: &GatewayKey) {
        for state in ["declared", "live", "connected"] {
            // There may be no such series.
            let _ = self.devices.remove_label_values(&[&*gateway.namespace, &*gateway.name, state]);
        }
        let _ = self.refused.remove_label_values(&[&*gateway.namespace, &*gateway.name]);
    }
}

fn registered<C: Collector + Clone + 'static>(registry: &Registry, collector: C) -> Result<C, prometheus::Error> {
    registry.register(Box::new(collector.clone()))?;
    Ok(collector)
}
