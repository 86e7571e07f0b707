//! The metrics of the broker's clients.

use prometheus::{IntCounter, IntCounterVec, IntGauge, Opts, Registry};

use crate::broker::log::line::Reason;
use crate::broker::log::tracker::LogOutcome;

/// The metrics. They count from the agent's start on, without earlier lines of the log.
#[derive(Clone, Debug)]
pub struct PresenceMetrics {
    connects: IntCounter,
    disconnects: IntCounterVec,
    refused: IntCounterVec,
    /// Devices that are connected.
    pub connected: IntGauge,
    /// Rotations of the broker's log.
    pub rotations: IntCounter,
}

impl PresenceMetrics {
    /// Registers the metrics.
    ///
    /// # Errors
    /// If a metric is already registered.
    pub fn register(registry: &Registry) -> Result<Self, prometheus::Error> {
        let by_reason = |name: &str, help: &str| {
            let counter = IntCounterVec::new(Opts::new(name, help), &["reason"])?;
            registry.register(Box::new(counter.clone()))?;
            Ok::<_, prometheus::Error>(counter)
        };
        let metrics = Self {
            connects: IntCounter::new("fleetwright_broker_connects_total", "Clients that the broker accepted.")?,
            disconnects: by_reason("fleetwright_broker_disconnects_total", "Connections of accepted clients that ended.")?,
            refused: by_reason("fleetwright_broker_refused_total", "Clients that the broker refused.")?,
            connected: IntGauge::new("fleetwright_broker_devices_connected", "Clients that are connected and can be Devices.")?,
            rotations: IntCounter::new(
                "fleetwright_agent_log_rotations_total",
                "Times that the broker's log was put aside for a new one.",
            )?,
        };
        registry.register(Box::new(metrics.connects.clone()))?;
        registry.register(Box::new(metrics.connected.clone()))?;
        registry.register(Box::new(metrics.rotations.clone()))?;
        for reason in Reason::ALL {
            let _ = metrics.disconnects.with_label_values(&[reason.name()]);
            if reason.is_refusal() {
                let _ = metrics.refused.with_label_values(&[reason.name()]);
            }
        }
        Ok(metrics)
    }

    /// Counts the outcome of a line.
    pub fn count(&self, outcome: LogOutcome) {
        match outcome {
            LogOutcome::Connected => self.connects.inc(),
            LogOutcome::Disconnected(reason) => self.disconnects.with_label_values(&[reason.name()]).inc(),
            LogOutcome::Refused(reason) => self.refused.with_label_values(&[reason.name()]).inc(),
            LogOutcome::Broker | LogOutcome::Nothing => {}
        }
    }
}
