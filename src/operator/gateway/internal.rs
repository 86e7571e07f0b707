//! The authority and the certificate of a Gateway's internal ports: the internal listener of the broker, which workers, operator and agent
//! use, and the endpoint of the agent, which the operator uses. Pure except for the randomness of keys.
//!
//! They are separate from those of the listeners (see [`super::tls`]): devices do not trust this authority, and it may be replaced at any
//! time by deleting its Secret. Workers get only `ca.crt`. There is no setting without encryption.

use jiff::Timestamp;
use k8s_openapi::api::core::v1::Secret;

use super::observe::Observed;
use super::tls::{Issued, issue};
use crate::api::condition::Cause;
use crate::api::name;
use crate::api::reason::Reason;
use crate::configuration::agent::TLS_AUTHORITIES;
use crate::operator::kubernetes::secret::value;
use crate::runtime::error::chain;

/// The authority and the certificate of the internal ports.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Internal {
    /// The Secrets to write. `None` if the authority cannot be read: the existing certificate stays in use until it expires.
    pub issued: Option<Issued>,

    /// The certificates with which clients verify the ports (PEM). `None` if there are none yet.
    pub authorities: Option<Vec<u8>>,

    /// Why the authority is unusable.
    pub awaiting: Option<Cause>,
}

/// The names under which workers and operator reach the internal ports.
#[must_use]
pub fn host_names(gateway: &str, namespace: &str) -> Vec<String> {
    let services = [name::internal_service(gateway), name::agent_service(gateway)];
    services.iter().flat_map(|service| name::service_host_names(service, namespace)).collect()
}

/// The authority and the certificate, issued or renewed if necessary.
#[must_use]
pub fn internal(observed: &Observed, now: Timestamp) -> Internal {
    let metadata = &observed.gateway.metadata;
    let (gateway, namespace) = (metadata.name.as_deref().unwrap_or_default(), metadata.namespace.as_deref().unwrap_or_default());
    let (authority, certificate) = (observed.internal_authority.as_ref(), observed.internal_certificate.as_ref());
    match issue((namespace, gateway), &host_names(gateway, namespace), authority, certificate, now) {
        Ok(issued) => {
            let authorities = issued.certificate.get(TLS_AUTHORITIES).map(|pem| pem.0.clone());
            Internal { issued: Some(issued), authorities, awaiting: None }
        }
        Err(error) => Internal {
            issued: None,
            authorities: certificate.and_then(trusted),
            awaiting: Some(Cause::new(
                Reason::InvalidAuthority,
                format!("Secret {}: {}", name::internal_authority(gateway), chain(&error)),
            )),
        },
    }
}

/// The certificates with which clients verify the internal ports, from a Secret (PEM).
#[must_use]
pub fn trusted(secret: &Secret) -> Option<Vec<u8>> {
    value(secret, TLS_AUTHORITIES).map(<[u8]>::to_vec)
}

#[cfg(test)]
#[path = "internal_tests.rs"]
mod tests;
