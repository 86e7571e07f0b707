//! Deadlines: rotation of passwords, renewal of certificates, expiry of previous passwords.

use super::DeviceIndex;
use crate::operator::device::key::DeviceKey;
use crate::operator::device::record::{PasswordSource, PasswordState};
use crate::operator::device::rotation::Lifetime;

impl DeviceIndex {
    /// A Secret with a generated password was read.
    pub fn generated_observed(&mut self, key: &DeviceKey, uid: &str, password: PasswordState, lifetime: Lifetime, now: i64) {
        let Some(record) = self.record_mut(key).filter(|record| *record.uid == *uid) else { return };
        record.secret_listed = true;
        record.has_generated_secret = true;
        if record.source != PasswordSource::Generated {
            // It may have to be pruned.
            self.changes.devices.insert(key.clone());
            return;
        }
        let changed = record.observe_lifetime(&key.name, lifetime, now);
        if changed {
            self.changes.shards.insert(key.gateway.clone());
        }
        self.password_observed(key, uid, password);
        self.schedule(key);
    }

    /// Updates the deadline after a change of a Device.
    pub(super) fn schedule(&mut self, key: &DeviceKey) {
        let deadline = self.record_mut(key).and_then(|record| record.deadline());
        self.deadline = [self.deadline, deadline].into_iter().flatten().min();
    }

    /// The next time at which something changes without an event, in seconds since 1970.
    #[must_use]
    pub fn next_deadline(&self) -> Option<i64> {
        self.deadline
    }

    /// Advances the time. Visits all Devices when the first deadline has passed, which is rare.
    pub fn advance(&mut self, now: i64) {
        if self.deadline.is_none_or(|deadline| deadline > now) {
            return;
        }
        self.deadline = None;
        for (gateway, state) in &mut self.gateways {
            for (name, record) in &mut state.devices {
                if record.advance(name, now) {
                    self.changes.shards.insert(gateway.clone());
                }
                let certificate = record.certificate_mut().is_some_and(|certificate| certificate.advance(now));
                if record.rotation.is_due() || certificate {
                    self.changes.devices.insert(DeviceKey { gateway: gateway.clone(), name: name.as_ref().into() });
                }
                self.deadline = [self.deadline, record.deadline()].into_iter().flatten().min();
            }
        }
    }

    /// The rotation request on a Device.
    #[must_use]
    pub fn requested_rotation(&self, key: &DeviceKey) -> Option<Box<str>> {
        self.gateways.get(&key.gateway)?.devices.get(&*key.name)?.rotation.requested().map(Into::into)
    }
}
