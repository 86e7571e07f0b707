//! What the operator counts of connections.

use prometheus::core::Collector;
use prometheus::{Gauge, IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Opts, Registry};

use super::totals::GatewayTotals;
use crate::operator::device::key::GatewayKey;

/// The metrics.
#[derive(Debug)]
pub struct PresenceMetrics {
    /// Writes of a Device's connection, by outcome.
    pub writes: IntCounterVec,
    /// Devices that wait for their turn.
    pub waiting: IntGauge,
    /// Devices that are held back until they come to rest.
    pub damped: IntGauge,
    /// How long the first has waited for its turn.
    pub oldest: Gauge,
    /// Pages that agents told.
    pub pages: IntCounter,
    /// Writes a second that are allowed.
    pub budget: Gauge,
    devices: IntGaugeVec,
    refused: IntGaugeVec,
}

impl PresenceMetrics {
    /// Registers them.
    ///
    /// # Errors
    /// When one is registered already.
    pub fn register(registry: &Registry) -> Result<Self, prometheus::Error> {
        let by = |name: &str, help: &str, labels: &[&str]| registered(registry, IntGaugeVec::new(Opts::new(name, help), labels)?);
        Ok(Self {
            writes: registered(
                registry,
                IntCounterVec::new(Opts::new("fleetwright_presence_writes_total", "Writes of a Device's connection."), &["outcome"])?,
            )?,
            waiting: registered(
                registry,
                IntGauge::new("fleetwright_presence_waiting", "Devices whose connection waits for its turn to be written.")?,
            )?,
            damped: registered(
                registry,
                IntGauge::new("fleetwright_presence_damped", "Devices whose connection is held back until they come to rest.")?,
            )?,
            oldest: registered(
                registry,
                Gauge::new("fleetwright_presence_oldest_waiting_seconds", "How long the first of them has waited for its turn.")?,
            )?,
            pages: registered(
                registry,
                IntCounter::new("fleetwright_presence_pages_total", "Pages that agents told of their brokers' clients.")?,
            )?,
            budget: registered(
                registry,
                Gauge::new("fleetwright_presence_writes_per_second_limit", "Writes of connections a second that are allowed.")?,
            )?,
            devices: by(
                "fleetwright_gateway_devices",
                "Devices of a Gateway: declared, live, connected.",
                &["namespace", "gateway", "state"],
            )?,
            refused: by(
                "fleetwright_gateway_refused",
                "Clients that a Gateway's broker refused since its pod was made.",
                &["namespace", "gateway"],
            )?,
        })
    }

    /// The totals of a Gateway.
    pub fn set(&self, gateway: &GatewayKey, (declared, live): (usize, usize), totals: Option<&GatewayTotals>) {
        let labels = |state: &'static str| [gateway.namespace.to_string(), gateway.name.to_string(), state.to_owned()];
        let count = |number: usize| i64::try_from(number).unwrap_or(i64::MAX);
        self.devices.with_label_values(&labels("declared")).set(count(declared));
        self.devices.with_label_values(&labels("live")).set(count(live));
        match totals.and_then(|totals| totals.connected) {
            Some(connected) => self.devices.with_label_values(&labels("connected")).set(connected),
            // That nobody knows is no number.
            None => drop(self.devices.remove_label_values(&labels("connected"))),
        }
        if let Some(clients) = totals.and_then(|totals| totals.clients.as_ref()) {
            self.refused.with_label_values(&[&*gateway.namespace, &*gateway.name]).set(clients.refused);
        }
    }

    /// A Gateway is gone.
    pub fn remove(&self, gateway: &GatewayKey) {
        for state in ["declared", "live", "connected"] {
            // One that was never set is none to remove.
            let _ = self.devices.remove_label_values(&[&*gateway.namespace, &*gateway.name, state]);
        }
        let _ = self.refused.remove_label_values(&[&*gateway.namespace, &*gateway.name]);
    }
}

fn registered<C: Collector + Clone + 'static>(registry: &Registry, collector: C) -> Result<C, prometheus::Error> {
    registry.register(Box::new(collector.clone()))?;
    Ok(collector)
}
