//! Desired and reported states.

use super::DeviceIndex;
use crate::api::Device;
use crate::api::condition::Cause;
use crate::api::device::ReportedStatus;
use crate::operator::device::key::{DeviceKey, GatewayKey};
use crate::operator::device::record::DeviceRecord;
use crate::operator::device::twin::{Twin, Wanted};

impl DeviceIndex {
    /// Updates the desired state of a created or changed Device.
    pub(super) fn desired_applied(&mut self, key: &DeviceKey, device: &Device) {
        let Some(record) = self.record_mut(key).filter(|record| record.twin().is_some() || device.spec.desired.is_some()) else { return };
        if record.change_twin(|twin| twin.update(device)) {
            self.changes.desired.insert(key.clone());
        }
    }

    /// The message that the broker has to retain for a device.
    #[must_use]
    pub fn desired(&self, key: &DeviceKey) -> Wanted {
        match self.record(key) {
            // Without a desired state there is nothing to clear.
            Some(record) if record.paused && record.twin().is_none_or(|twin| twin.wanted() == Wanted::Nothing) => Wanted::LeaveAlone,
            record => record.and_then(DeviceRecord::twin).map_or(Wanted::Nothing, Twin::wanted),
        }
    }

    /// Devices of a Gateway with a message that the broker has to retain.
    #[must_use]
    pub fn with_desired(&self, gateway: &GatewayKey) -> Vec<DeviceKey> {
        let devices = self.gateways.get(gateway).into_iter().flat_map(|state| &state.devices);
        let wanting = devices.filter(|(_, record)| record.twin().is_some_and(|twin| twin.wanted() != Wanted::Nothing));
        wanting.map(|(name, _)| DeviceKey { gateway: gateway.clone(), name: name.as_ref().into() }).collect()
    }

    /// Whether the operator is connected to the broker of a Gateway. Devices that wait for the broker get a status.
    pub fn broker_connection_observed(&mut self, gateway: &GatewayKey, broker_connected: bool) {
        let Some(state) = self.gateways.get_mut(gateway) else { return };
        state.broker_connected = broker_connected;
        if broker_connected && state.external {
            // Their credentials need no proof.
            let waiting = state.devices.iter().filter(|(_, record)| !record.last_written.ready);
            let waiting = waiting.map(|(name, _)| DeviceKey { gateway: gateway.clone(), name: name.as_ref().into() });
            self.changes.devices.extend(waiting.collect::<Vec<_>>());
        } else if !broker_connected {
            let waiting = state.devices.iter().filter(|(_, record)| record.twin().is_some_and(Twin::awaits_broker));
            let waiting = waiting.map(|(name, _)| DeviceKey { gateway: gateway.clone(), name: name.as_ref().into() });
            self.changes.devices.extend(waiting.collect::<Vec<_>>());
        }
    }

    /// Whether a Device exists.
    #[must_use]
    pub fn has_device(&self, key: &DeviceKey) -> bool {
        self.record(key).is_some()
    }

    /// The broker retains the desired state of this generation.
    pub fn desired_published(&mut self, key: &DeviceKey, generation: i64) {
        let Some(record) = self.record_mut(key).filter(|record| record.twin().is_some()) else { return };
        if record.change_twin(|twin| twin.published(generation)) {
            self.changes.devices.insert(key.clone());
        }
    }

    /// Whether a report differs from the last one. `None` without such a Device.
    #[must_use]
    pub fn is_news(&self, key: &DeviceKey, report: &Result<ReportedStatus, Cause>) -> Option<bool> {
        let record = self.record(key)?;
        Some(!record.paused && record.twin().map_or_else(|| Twin::default().is_news(report), |twin| twin.is_news(report)))
    }

    /// Stores a report of a device, or why it was rejected.
    pub fn reported(&mut self, key: &DeviceKey, report: Result<ReportedStatus, Cause>) {
        if let Some(record) = self.record_mut(key) {
            record.change_twin(|twin| twin.report(report));
            self.changes.devices.insert(key.clone());
        }
    }

    /// The report in the status of a Device.
    #[must_use]
    pub fn written_report(&self, key: &DeviceKey) -> Option<ReportedStatus> {
        self.record(key)?.twin()?.written_report()
    }

    /// The status of a Device was written with this report.
    pub fn report_written(&mut self, key: &DeviceKey, report: Option<&ReportedStatus>) {
        if let Some(record) = self.record_mut(key).filter(|record| record.twin().is_some()) {
            record.change_twin(|twin| twin.written(report));
        }
    }

    fn record(&self, key: &DeviceKey) -> Option<&DeviceRecord> {
        self.gateways.get(&key.gateway)?.devices.get(&*key.name).map(Box::as_ref)
    }
}
