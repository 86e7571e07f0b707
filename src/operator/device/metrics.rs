//! Metrics of the Devices' reconciler.

use prometheus::{Gauge, IntCounterVec, IntGauge, Opts};

/// The metrics of the Devices' reconciler.
pub struct DeviceMetrics {
    /// Executed actions, by object and outcome.
    pub steps: IntCounterVec,
    /// Devices that are ready for an action.
    pub queued: IntGauge,
    /// Seconds from acquiring the lease until all objects were listed.
    pub listing: Gauge,
}

impl DeviceMetrics {
    /// Registers the metrics.
    ///
    /// # Errors
    /// When a metric is registered twice.
    pub fn register(registry: &prometheus::Registry) -> Result<Self, prometheus::Error> {
        let steps = Opts::new("fleetwright_device_steps_total", "Actions executed for Devices and for the shards of Gateways, by outcome.");
        let steps = IntCounterVec::new(steps, &["step", "outcome"])?;
        let queued = IntGauge::new("fleetwright_device_queue_length", "Devices that are ready for an action.")?;
        let listing = Gauge::new(
            "fleetwright_device_listing_seconds",
            "Time from acquiring the lease until all Devices and their objects were listed; 0 before that.",
        )?;
        registry.register(Box::new(steps.clone()))?;
        registry.register(Box::new(queued.clone()))?;
        registry.register(Box::new(listing.clone()))?;
        Ok(Self { steps, queued, listing })
    }
}
