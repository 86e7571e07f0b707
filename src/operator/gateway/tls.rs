//! The certificates of a Gateway's TLS listeners, from Secrets or issued by the operator, and the warnings about their expiry.
//! Pure except for the randomness of keys.

use std::collections::BTreeMap;
use std::fmt::{self, Debug, Formatter};
use std::time::Duration;

use jiff::{SignedDuration, Timestamp};
use k8s_openapi::api::core::v1::Secret;
use rustls_pki_types::ServerName;

use super::observe::Observed;
use crate::api::condition::Cause;
use crate::api::reason::Reason;
use crate::api::{Gateway, name};
use crate::certificate::authority::{Authority, AuthorityError, Data};
use crate::certificate::server::{CertificateError, ServerCertificate};
use crate::configuration::agent::{PresentedCertificate, TLS_CERTIFICATE, TLS_KEY};
use crate::runtime::error::chain;

/// Remaining validity at which the operator warns: the thresholds of the alert `KubeClientCertificateExpiration` of kubernetes-mixin
/// (<https://github.com/kubernetes-monitoring/kubernetes-mixin>).
const WARNINGS: [Duration; 2] = [Duration::from_hours(7 * 24), Duration::from_hours(24)];

/// Remaining share of the lifetime before which the operator never warns: cert-manager renews a certificate at two thirds of its
/// lifetime, and has had half of the rest to do so.
const MAX_SHARES: [i32; 2] = [6, 12];

/// The certificates for a Gateway's TLS listeners.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Certificates {
    /// Names under which clients reach the broker: a certificate must contain each of them.
    pub host_names: Vec<String>,

    /// Valid certificates, by the name of their Secret.
    pub usable: BTreeMap<String, ServerCertificate>,

    /// The certificate that the operator issues if a listener names no Secret.
    pub issued: Option<Issued>,

    /// The cause why a Secret is unusable.
    pub awaiting: Option<Cause>,

    /// A certificate that expires soon.
    pub expiring: Option<Cause>,
}

/// The data of the Secrets that the operator issues.
#[derive(Clone, PartialEq)]
pub struct Issued {
    /// Data of the authority's Secret.
    pub authority: Data,

    /// Data of the certificate's Secret.
    pub certificate: Data,
}

impl Debug for Issued {
    fn fmt(&self, formatter: &mut Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("Issued").finish_non_exhaustive()
    }
}

/// The declared names that are invalid.
#[must_use]
pub fn invalid_host_name(gateway: &Gateway) -> Option<Cause> {
    let invalid = gateway.spec.service.host_names.iter().find(|name| ServerName::try_from(name.as_str()).is_err())?;
    let message = format!("service.hostNames has {invalid:?}: expected a host name, such as mqtt.example.org, or an IP address");
    Some(Cause::new(Reason::InvalidHostName, message))
}

/// The certificates for the listeners of a Gateway.
#[must_use]
pub fn certificates(observed: &Observed, now: Timestamp) -> Certificates {
    if observed.tls.is_empty() {
        return Certificates::default();
    }
    let mut found = Certificates { host_names: client_names(&observed.gateway), ..Certificates::default() };
    if observed.gateway.spec.issues_certificate() {
        match issue_for_listeners(observed, now) {
            Ok(issued) => found.issued = Some(issued),
            // The existing issued certificate is checked below.
            Err(error) => found.awaiting = Some(Cause::new(Reason::InvalidAuthority, chain(&error))),
        }
    }
    let issued_name = name::server_certificate(observed.gateway.metadata.name.as_deref().unwrap_or_default());
    for (secret, object) in &observed.tls {
        let issued = found.issued.as_ref().filter(|_| *secret == issued_name).map(|issued| &issued.certificate);
        let data = issued.or_else(|| object.as_ref().and_then(|object| object.data.as_ref()));
        match check(secret, object.is_some() || issued.is_some(), data, &found.host_names, now) {
            Ok(certificate) => {
                found.expiring = found.expiring.or_else(|| expires_soon("certificate", secret, validity(&certificate), now));
                found.usable.insert(secret.clone(), certificate);
            }
            Err(cause) => found.awaiting = found.awaiting.or(Some(cause)),
        }
    }
    found
}

/// The names by which clients reach the broker: the declared names, because a public authority may sign no others.
#[must_use]
pub fn client_names(gateway: &Gateway) -> Vec<String> {
    let declared = &gateway.spec.service.host_names;
    let (name, namespace) = identity(gateway);
    if declared.is_empty() { vec![name::service_host(name, namespace)] } else { declared.clone() }
}

fn identity(gateway: &Gateway) -> (&str, &str) {
    (gateway.metadata.name.as_deref().unwrap_or_default(), gateway.metadata.namespace.as_deref().unwrap_or_default())
}

fn issue_for_listeners(observed: &Observed, now: Timestamp) -> Result<Issued, AuthorityError> {
    let (name, namespace) = identity(&observed.gateway);
    let mut names = name::service_host_names(name, namespace).to_vec();
    names.extend(observed.gateway.spec.service.host_names.iter().filter(|declared| !names.contains(declared)).cloned().collect::<Vec<_>>());
    let existing = observed.tls.get(&name::server_certificate(name)).and_then(Option::as_ref);
    issue((namespace, name), &names, observed.authority.as_ref(), existing, now)
}

/// A certificate for these names by the authority in this Secret, or by a new one. Keeps the existing certificate while it is good. The
/// Gateway is namespace and name.
///
/// # Errors
/// If the authority cannot be read.
pub fn issue(
    (namespace, gateway): (&str, &str),
    names: &[String],
    authority: Option<&Secret>,
    existing: Option<&Secret>,
    now: Timestamp,
) -> Result<Issued, AuthorityError> {
    let data = |secret: &Secret| secret.data.clone().unwrap_or_default();
    let authority = match authority.map(data) {
        Some(data) => Authority::parse(&data)?.advance(namespace, gateway, now)?,
        None => Authority::create(namespace, gateway, now)?,
    };
    Ok(Issued { certificate: authority.certify(names, existing.map(data).as_ref(), now)?, authority: authority.render() })
}

/// The certificate in a Secret, or why it is unusable.
fn check(secret: &str, exists: bool, data: Option<&Data>, names: &[String], now: Timestamp) -> Result<ServerCertificate, Cause> {
    if !exists {
        let message =
            format!("Secret {secret} does not exist: create it (type kubernetes.io/tls), or remove secretName to have one issued");
        return Err(Cause::new(Reason::SecretNotFound, message));
    }
    let value = |key: &str| {
        let missing =
            || Cause::new(Reason::SecretKeyNotFound, format!("Secret {secret} has no key {key}: expected {TLS_CERTIFICATE} and {TLS_KEY}"));
        data.and_then(|data| data.get(key)).ok_or_else(missing)
    };
    let (certificate, key) = (value(TLS_CERTIFICATE)?, value(TLS_KEY)?);
    let checked = ServerCertificate::parse(&certificate.0, &key.0).and_then(|certificate| {
        certificate.check(now, names)?;
        Ok(certificate)
    });
    checked.map_err(|error| {
        let reason = match error {
            CertificateError::Expired { .. } => Reason::CertificateExpired,
            CertificateError::NotYetValid { .. } => Reason::CertificateNotYetValid,
            CertificateError::MatchName { .. } => Reason::CertificateNameMismatch,
            _ => Reason::InvalidCertificate,
        };
        Cause::new(reason, format!("Secret {secret}: {}. A running broker keeps its current certificate", chain(&error)))
    })
}

fn validity(certificate: &ServerCertificate) -> (Timestamp, Timestamp) {
    (certificate.not_before, certificate.not_after)
}

/// The times of the warnings about this expiry, and their distance from it.
fn warnings((from, to): (Timestamp, Timestamp)) -> [(Timestamp, SignedDuration); 2] {
    let life = to.duration_since(from);
    std::array::from_fn(|index| {
        let left = SignedDuration::try_from(WARNINGS[index]).unwrap_or(SignedDuration::MAX).min(life / MAX_SHARES[index]);
        (to - left, left)
    })
}

/// The warning about the expiry of `what`. The text is constant until the next warning, so that each becomes one Event, without a
/// duplicate after a restart of the operator.
#[must_use]
pub fn expires_soon(what: &str, secret: &str, validity: (Timestamp, Timestamp), now: Timestamp) -> Option<Cause> {
    let (_, left) = warnings(validity).into_iter().rev().find(|(due, _)| now >= *due)?;
    let message = format!(
        "the {what} in Secret {secret} expires at {}, in less than {} hours: renew it, or check why it is not renewed automatically",
        validity.1,
        left.as_hours().max(1)
    );
    Some(Cause::new(Reason::CertificateExpiresSoon, message))
}

/// The times at which a result changes although no object changes.
pub fn transition_times(certificate: &ServerCertificate) -> impl Iterator<Item = Timestamp> + use<> {
    transition_times_of(validity(certificate))
}

/// The times at which the result for this validity changes.
pub fn transition_times_of(validity: (Timestamp, Timestamp)) -> impl Iterator<Item = Timestamp> {
    [validity.0, validity.1].into_iter().chain(warnings(validity).map(|(due, _)| due))
}

/// Whether the agent has verified that the broker presents this certificate.
#[must_use]
pub fn is_presented(certificate: &ServerCertificate, presented: Option<&PresentedCertificate>) -> bool {
    presented.is_some_and(|presented| presented.fingerprint == certificate.fingerprint)
}

#[cfg(test)]
#[path = "tls_tests.rs"]
mod tests;
