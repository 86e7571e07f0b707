//! Changes of passwords and certificates.

use super::DeviceIndex;
use crate::api::condition::Cause;
use crate::api::device::DeviceCertificate;
use crate::operator::device::certificate::{Certificate, IssuerResponse};
use crate::operator::device::key::DeviceKey;
use crate::operator::device::record::{DeviceRecord, PasswordSource, PasswordState};
use crate::operator::kubernetes::apply::WriteError;
use crate::runtime::error::chain;

/// The status reports an action that failed this often in a row: after some three seconds.
const MIN_REPORTED_FAILURES: u32 = 4;

impl DeviceIndex {
    /// Stores the state of a Device's password.
    pub fn password_observed(&mut self, key: &DeviceKey, uid: &str, password: PasswordState) {
        let Some(record) = self.record_mut(key).filter(|record| *record.uid == *uid) else { return };
        let arrives = record.password().hash().is_none();
        if record.set_password(&key.name, password) {
            let changes = if arrives { &mut self.changes.arrivals } else { &mut self.changes.shards };
            changes.insert(key.gateway.clone());
        }
        self.changes.devices.insert(key.clone());
    }

    /// Stores a certificate for a Device (with this uid) and the request with this digest.
    pub fn certificate_issued(&mut self, key: &DeviceKey, uid: &str, digest: u64, issued: DeviceCertificate) {
        let Some(record) = self.record_mut(key).filter(|record| *record.uid == *uid) else { return };
        if let Some(certificate) = record.certificate_mut() {
            certificate.take(digest, issued);
        }
        self.schedule(key);
        self.changes.devices.insert(key.clone());
    }

    /// Stores the response of an issuer for a Device (with this uid) and the request with this digest. Returns whether it is a new
    /// refusal while a certificate is still valid.
    pub fn certificate_asked(&mut self, key: &DeviceKey, uid: &str, digest: u64, answer: IssuerResponse) -> bool {
        let Some(record) = self.record_mut(key).filter(|record| *record.uid == *uid) else { return false };
        let news = record.certificate_mut().is_some_and(|certificate| certificate.take_answer(digest, answer));
        self.schedule(key);
        self.changes.devices.insert(key.clone());
        news
    }

    /// The CertificateRequest of a Device (with this uid) changed, or was deleted.
    pub fn certificate_request_observed(&mut self, key: &DeviceKey, uid: &str, exists: bool) {
        let Some(record) = self.record_mut(key).filter(|record| *record.uid == *uid) else { return };
        record.has_certificate_request = exists;
        if let Some(certificate) = record.certificate_mut() {
            certificate.requeue();
        }
        self.changes.devices.insert(key.clone());
    }

    /// The list of CertificateRequests is complete: pending ones are checked again.
    pub fn certificate_requests_listed(&mut self) {
        for key in self.keys_of(|record| record.certificate().is_some_and(Certificate::is_asked_for)) {
            if let Some(certificate) = self.record_mut(&key).and_then(DeviceRecord::certificate_mut) {
                certificate.requeue();
                self.changes.devices.insert(key);
            }
        }
    }

    /// The Secret with a Device's generated password was deleted. It is created again if it is needed.
    pub fn generated_secret_deleted(&mut self, key: &DeviceKey, uid: &str) {
        let Some(record) = self.record_mut(key).filter(|record| *record.uid == *uid) else { return };
        record.has_generated_secret = false;
        if record.source == PasswordSource::Generated {
            self.password_observed(key, uid, PasswordState::Unknown);
        }
    }

    /// A list of all Secrets begins.
    pub fn listing_secrets(&mut self) {
        self.records_mut().for_each(|record| record.secret_listed = false);
    }

    /// The list of Secrets is complete: those that it does not contain were deleted.
    pub fn generated_secrets_listed(&mut self) {
        for key in
            self.keys_of(|record| !record.secret_listed && (record.has_generated_secret || record.source == PasswordSource::Generated))
        {
            if let Some(uid) = self.uid(&key) {
                self.generated_secret_deleted(&key, &uid);
            }
        }
    }

    /// A Secret changed that Devices may reference: their passwords are read again.
    pub fn given_secret_changed(&mut self, namespace: &str, secret: &str) {
        let devices = self.given.get(&(namespace.into(), secret.into())).cloned().unwrap_or_default();
        for key in devices {
            let Some(record) = self.record_mut(&key) else { continue };
            let named = matches!(&record.source, PasswordSource::Given { secret: name, .. } if **name == *secret);
            if named {
                // The known hash is used until the Secret is read.
                let stale = record.password().hash().map_or(PasswordState::Unknown, |hash| PasswordState::Stale(hash.into()));
                record.set_password(&key.name, stale);
                self.changes.devices.insert(key);
            }
        }
    }

    /// The uid of a Device, if it exists.
    #[must_use]
    pub fn uid(&self, key: &DeviceKey) -> Option<Box<str>> {
        self.gateways.get(&key.gateway)?.devices.get(&*key.name).map(|record| record.uid.clone())
    }

    /// The uid of a Device and the known hash of its password, if the Device exists.
    #[must_use]
    pub fn password(&self, key: &DeviceKey) -> Option<(Box<str>, Option<Box<str>>)> {
        let record = self.gateways.get(&key.gateway)?.devices.get(&*key.name)?;
        Some((record.uid.clone(), record.password().hash().map(Into::into)))
    }

    /// An action of a Device failed for the n-th time in a row. If there is no password yet, the status reports the cause.
    pub fn action_failed(&mut self, key: &DeviceKey, failures: u32, error: &WriteError) {
        let Some(record) = self.record_mut(key).filter(|_| failures == MIN_REPORTED_FAILURES) else { return };
        if *record.password() == PasswordState::Unknown && record.source == PasswordSource::Generated {
            record.set_password(&key.name, PasswordState::Failing(Box::new(Cause::new(error.reason(), chain(error)))));
        }
    }
}
