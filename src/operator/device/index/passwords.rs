//! What becomes known of the passwords and certificates of Devices.

use super::DeviceIndex;
use crate::api::condition::Cause;
use crate::api::device::DeviceCertificate;
use crate::operator::device::certificate::{Certificate, IssuerResponse};
use crate::operator::device::key::DeviceKey;
use crate::operator::device::record::{DeviceRecord, PasswordSource, PasswordState};
use crate::operator::kubernetes::apply::WriteError;
use crate::runtime::error::chain;

/// A step that fails this often in a row is worth a status: some three seconds of trying.
const MIN_REPORTED_FAILURES: u32 = 4;

impl DeviceIndex {
    /// The password of a Device has been read, or could not be.
    pub fn password_observed(&mut self, key: &DeviceKey, uid: &str, password: PasswordState) {
        let Some(record) = self.record_mut(key).filter(|record| *record.uid == *uid) else { return };
        let arrives = record.password().hash().is_none();
        if record.set_password(&key.name, password) {
            let changes = if arrives { &mut self.changes.arrivals } else { &mut self.changes.shards };
            changes.insert(key.gateway.clone());
        }
        self.changes.devices.insert(key.clone());
    }

    /// A certificate was issued to a Device (of this uid) for the request with this digest.
    pub fn certificate_issued(&mut self, key: &DeviceKey, uid: &str, digest: u64, issued: DeviceCertificate) {
        let Some(record) = self.record_mut(key).filter(|record| *record.uid == *uid) else { return };
        if let Some(certificate) = record.certificate_mut() {
            certificate.take(digest, issued);
        }
        self.schedule(key);
        self.changes.devices.insert(key.clone());
    }

    /// An issuer was asked for a certificate for a Device (of this uid) and the request with this digest. Returns whether its refusal is
    /// news while there is a certificate still.
    pub fn certificate_asked(&mut self, key: &DeviceKey, uid: &str, digest: u64, answer: IssuerResponse) -> bool {
        let Some(record) = self.record_mut(key).filter(|record| *record.uid == *uid) else { return false };
        let news = record.certificate_mut().is_some_and(|certificate| certificate.take_answer(digest, answer));
        self.schedule(key);
        self.changes.devices.insert(key.clone());
        news
    }

    /// The CertificateRequest of a Device (of this uid) changed, or was deleted.
    pub fn certificate_request_observed(&mut self, key: &DeviceKey, uid: &str, exists: bool) {
        let Some(record) = self.record_mut(key).filter(|record| *record.uid == *uid) else { return };
        record.has_certificate_request = exists;
        if let Some(certificate) = record.certificate_mut() {
            certificate.requeue();
        }
        self.changes.devices.insert(key.clone());
    }

    /// All that issuers were asked has been listed: what became of it meanwhile is to be looked at.
    pub fn certificate_requests_listed(&mut self) {
        for key in self.keys_of(|record| record.certificate().is_some_and(Certificate::is_asked_for)) {
            if let Some(certificate) = self.record_mut(&key).and_then(DeviceRecord::certificate_mut) {
                certificate.requeue();
                self.changes.devices.insert(key);
            }
        }
    }

    /// The Secret with a Device's generated password is gone: there will be another.
    pub fn generated_secret_deleted(&mut self, key: &DeviceKey, uid: &str) {
        let Some(record) = self.record_mut(key).filter(|record| *record.uid == *uid) else { return };
        record.has_generated_secret = false;
        if record.source == PasswordSource::Generated {
            self.password_observed(key, uid, PasswordState::Unknown);
        }
    }

    /// All Secrets are about to be listed.
    pub fn listing_secrets(&mut self) {
        self.records_mut().for_each(|record| record.secret_listed = false);
    }

    /// All Secrets with generated passwords have been listed: those that were not among them are gone.
    pub fn generated_secrets_listed(&mut self) {
        for key in
            self.keys_of(|record| !record.secret_listed && (record.has_generated_secret || record.source == PasswordSource::Generated))
        {
            if let Some(uid) = self.uid(&key) {
                self.generated_secret_deleted(&key, &uid);
            }
        }
    }

    /// A Secret changed that Devices may name: their passwords have to be read again.
    pub fn given_secret_changed(&mut self, namespace: &str, secret: &str) {
        let devices = self.given.get(&(namespace.into(), secret.into())).cloned().unwrap_or_default();
        for key in devices {
            let Some(record) = self.record_mut(&key) else { continue };
            let named = matches!(&record.source, PasswordSource::Given { secret: name, .. } if **name == *secret);
            if named {
                // Until it is read, the hash that is known goes on.
                let stale = record.password().hash().map_or(PasswordState::Unknown, |hash| PasswordState::Stale(hash.into()));
                record.set_password(&key.name, stale);
                self.changes.devices.insert(key);
            }
        }
    }

    /// The uid of a Device, where it is there.
    #[must_use]
    pub fn uid(&self, key: &DeviceKey) -> Option<Box<str>> {
        self.gateways.get(&key.gateway)?.devices.get(&*key.name).map(|record| record.uid.clone())
    }

    /// The uid of a Device and the hash of its password that is known, where the Device is there.
    #[must_use]
    pub fn password(&self, key: &DeviceKey) -> Option<(Box<str>, Option<Box<str>>)> {
        let record = self.gateways.get(&key.gateway)?.devices.get(&*key.name)?;
        Some((record.uid.clone(), record.password().hash().map(Into::into)))
    }

    /// A step of a Device failed for the n-th time. When it keeps failing before there is a password, the status says why.
    pub fn step_failed(&mut self, key: &DeviceKey, failures: u32, error: &WriteError) {
        let Some(record) = self.record_mut(key).filter(|_| failures == MIN_REPORTED_FAILURES) else { return };
        if *record.password() == PasswordState::Unknown && record.source == PasswordSource::Generated {
            record.set_password(&key.name, PasswordState::Failing(Box::new(Cause::new(error.reason(), chain(error)))));
        }
    }
}
