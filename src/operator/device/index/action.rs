//! Determines the next action of a Device.

use std::sync::Arc;

use super::DeviceIndex;
use crate::api::DeviceStatus;
use crate::operator::device::certificate::{Authority, REQUEUE_AFTER, Signer};
use crate::operator::device::endpoint::Endpoint;
use crate::operator::device::gateway::GatewayState;
use crate::operator::device::key::DeviceKey;
use crate::operator::device::record::{DeviceRecord, PasswordSource, PasswordState};
use crate::operator::device::status::{StatusContext, status};

/// The next action of a Device.
#[derive(Debug)]
pub enum DeviceAction {
    /// Create the Secret with a generated password.
    CreateSecret {
        /// `metadata.uid` of the Device.
        uid: Box<str>,
        /// The address to write to it.
        endpoint: Arc<Endpoint>,
    },

    /// Write the address of the broker to the Secret with the generated password.
    WriteEndpoint {
        /// `metadata.uid` of the Device.
        uid: Box<str>,
        /// The address.
        endpoint: Arc<Endpoint>,
    },

    /// Replace the generated password.
    RotatePassword {
        /// `metadata.uid` of the Device.
        uid: Box<str>,
        /// The rotation request that this completes, if there is one.
        token: Option<Box<str>>,
        /// How long both passwords are accepted, in seconds.
        overlap: i64,
    },

    /// Read the password from the user's Secret.
    ReadSecret {
        /// Name of the Secret.
        secret: Box<str>,
        /// Key of the Secret.
        key: Box<str>,
    },

    /// Issue a certificate.
    IssueCertificate {
        /// `metadata.uid` of the Device.
        uid: Box<str>,
        /// The authority that signs.
        signer: Arc<Signer>,
        /// A number from the uid that distributes renewals over time.
        spread: u64,
    },

    /// Delete the CertificateRequest: another authority signs now, or the Device has no signing request any more.
    DeleteCertificateRequest {
        /// `metadata.uid` of the Device.
        uid: Box<str>,
    },

    /// Delete the Secret with the generated password: the Device has other credentials, and the broker accepts them.
    DeleteSecret {
        /// `metadata.uid` of the Device.
        uid: Box<str>,
    },

    /// Write this status.
    WriteStatus(Box<DeviceStatus>),

    /// Wait for the broker. The Device is queued again for the time at which its status must say so.
    AwaitBroker,

    /// Nothing to do.
    None,
}

impl DeviceIndex {
    /// As [`Self::next_action`], before its execution: an event of an issuer from now on causes another query.
    pub fn start_action(&mut self, key: &DeviceKey, waited: bool, now: i64) -> DeviceAction {
        let step = self.next_action(key, waited);
        if let DeviceAction::IssueCertificate { signer, .. } = &step
            && signer.issuer().is_some()
            && let Some(certificate) = self.record_mut(key).and_then(DeviceRecord::certificate_mut)
        {
            certificate.ask_issuer(now + REQUEUE_AFTER.as_secs());
            self.schedule(key);
        }
        step
    }

    /// The next action of a Device. `waited`: whether it has waited for the broker long enough for a status write.
    #[must_use]
    pub fn next_action(&self, key: &DeviceKey, waited: bool) -> DeviceAction {
        let Some((state, record)) = self.gateways.get(&key.gateway).and_then(|state| Some((state, state.devices.get(&*key.name)?))) else {
            return DeviceAction::None;
        };
        if record.paused {
            return DeviceAction::None;
        }
        if record.has_certificate_request && !needs_certificate_request(record, state.authority()) {
            return DeviceAction::DeleteCertificateRequest { uid: record.uid.clone() };
        }
        if let (Some(certificate), Authority::Usable(signer)) = (record.certificate(), state.authority())
            && record.enabled
            && certificate.wants(signer)
        {
            return DeviceAction::IssueCertificate { uid: record.uid.clone(), signer: Arc::clone(signer), spread: record.spread() };
        }
        match (&record.source, record.password()) {
            // The operator does not manage credentials of an external broker.
            _ if state.external && state.owner.is_some() => {}
            (PasswordSource::Generated, PasswordState::Unknown | PasswordState::Stale(_)) => {
                // Without a Gateway the status reports that. A new Gateway reports its address soon.
                if let Some(endpoint) = state.endpoint() {
                    return DeviceAction::CreateSecret { uid: record.uid.clone(), endpoint: Arc::clone(endpoint) };
                }
            }
            (PasswordSource::Given { secret, key }, PasswordState::Unknown | PasswordState::Stale(_)) => {
                return DeviceAction::ReadSecret { secret: secret.clone(), key: key.clone() };
            }
            (PasswordSource::Generated, PasswordState::Hashed(_)) if record.rotation.is_due() => {
                let token = record.rotation.requested().map(Into::into);
                return DeviceAction::RotatePassword { uid: record.uid.clone(), token, overlap: record.rotation.overlap() };
            }
            (PasswordSource::Generated, PasswordState::Hashed(_)) => {
                let said = record.rotation.endpoint();
                if let Some(endpoint) = state.endpoint().filter(|wanted| said.is_some_and(|said| said != wanted.digest())) {
                    return DeviceAction::WriteEndpoint { uid: record.uid.clone(), endpoint: Arc::clone(endpoint) };
                }
            }
            (PasswordSource::Absent, _) | (_, PasswordState::Hashed(_) | PasswordState::Missing(..) | PasswordState::Failing(_)) => {}
        }
        let proven = state.has_proven(&key.name, record);
        let around = StatusContext {
            gateway: &key.gateway.name,
            gateway_exists: state.owner.is_some(),
            external: state.external,
            authority: state.authority(),
            proven,
            broker_connected: state.broker_connected,
            waited,
        };
        match status(&key.name, record, around) {
            Some(status) if record.last_written.equals(&status) => match (record.password(), state.endpoint()) {
                (PasswordState::Failing(_), Some(endpoint)) => {
                    DeviceAction::CreateSecret { uid: record.uid.clone(), endpoint: Arc::clone(endpoint) }
                }
                _ if record.has_generated_secret && record.last_written.ready && !needs_generated_secret(record, state) => {
                    DeviceAction::DeleteSecret { uid: record.uid.clone() }
                }
                _ => DeviceAction::None,
            },
            Some(status) => DeviceAction::WriteStatus(Box::new(status)),
            None => DeviceAction::AwaitBroker,
        }
    }
}

/// Whether the Device's CertificateRequest may still lead to its certificate. While the authority is not known, it may.
fn needs_certificate_request(record: &DeviceRecord, authority: &Authority) -> bool {
    record.certificate().is_some()
        && match authority {
            Authority::Usable(signer) => signer.issuer().is_some(),
            Authority::Unknown | Authority::Unusable => true,
            Authority::Undeclared => false,
        }
}

fn needs_generated_secret(record: &DeviceRecord, state: &GatewayState) -> bool {
    record.source == PasswordSource::Generated && !(state.external && state.owner.is_some())
}

impl DeviceIndex {
    /// Devices that need an action or wait for their broker.
    #[must_use]
    pub fn unsettled(&self) -> Vec<DeviceKey> {
        let mut unsettled = Vec::new();
        for (gateway, state) in &self.gateways {
            let keys = state.devices.keys().map(|name| DeviceKey { gateway: gateway.clone(), name: name.as_ref().into() });
            unsettled.extend(keys.filter(|key| !matches!(self.next_action(key, false), DeviceAction::None)));
        }
        unsettled
    }
}

#[cfg(test)]
#[path = "endpoint_tests.rs"]
mod tests;

#[cfg(test)]
#[path = "prune_tests.rs"]
mod prune_tests;

#[cfg(test)]
#[path = "certificate_tests.rs"]
mod certificate_tests;
