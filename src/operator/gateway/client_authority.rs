//! The authority that signs the certificates of a Gateway's devices: its Secret, and the certificates that the broker trusts. Pure.

use std::sync::Arc;

use jiff::{SignedDuration, Timestamp};
use k8s_openapi::api::core::v1::Secret;

use super::observe::Observed;
use super::tls;
use crate::api::client_authority::{ClientAuthority as Declared, DEFAULT_VALIDITY_SECONDS};
use crate::api::condition::Cause;
use crate::api::duration;
use crate::api::reason::Reason;
use crate::certificate::client::{AuthorityError, ClientAuthority};
use crate::certificate::server::CertificateError;
use crate::certificate::trust::TrustedAuthorities;
use crate::configuration::agent::{TLS_AUTHORITIES, TLS_CERTIFICATE, TLS_KEY};
use crate::operator::device::certificate::{Authority, Issuer, Signer, Source};
use crate::operator::kubernetes::secret::value;
use crate::runtime::error::chain;

/// The state of a Gateway's client authority.
#[derive(Clone, Debug, Default)]
pub struct ClientTrust {
    /// The authority for the certificates of Devices.
    pub authority: Authority,

    /// Certificates with which the broker verifies clients, as PEM: those of the authority or, if it is unusable, the broker's current
    /// ones.
    pub trusted: Option<String>,

    /// Why the authority is unusable.
    pub awaiting: Option<Cause>,

    /// The authority expires soon.
    pub expiring: Option<Cause>,

    /// When one of these values changes although no object changes.
    pub transition_times: Vec<Timestamp>,
}

/// The state of a Gateway's client authority.
#[must_use]
pub fn client_trust(observed: &Observed, now: Timestamp) -> ClientTrust {
    let Some(declared) = &observed.gateway.spec.client_authority else {
        return ClientTrust { authority: Authority::Undeclared, ..ClientTrust::default() };
    };
    match source(declared, observed.client_authority.as_ref(), now) {
        Ok(source) => {
            let (trusted, validity) = match &source {
                Source::Own(authority) => (authority.trusted(), (authority.not_before(), authority.not_after())),
                Source::Issuer(issuer) => (issuer.trusted.trusted(), issuer.trusted.validity()),
            };
            let seconds = duration::seconds(&declared.validity).unwrap_or(DEFAULT_VALIDITY_SECONDS);
            ClientTrust {
                trusted: Some(trusted.to_owned()),
                awaiting: None,
                expiring: tls::expires_soon("authority", &declared.secret_name, validity, now),
                transition_times: tls::transition_times_of(validity).collect(),
                authority: Authority::Usable(Arc::new(Signer::new(source, SignedDuration::from_secs(seconds)))),
            }
        }
        Err(cause) => ClientTrust {
            authority: Authority::Unusable,
            trusted: observed.trusted_before.clone(),
            awaiting: Some(cause),
            ..ClientTrust::default()
        },
    }
}

fn source(declared: &Declared, secret: Option<&Secret>, now: Timestamp) -> Result<Source, Cause> {
    let name = &declared.secret_name;
    let Some(secret) = secret else {
        let expected = match declared.issuer_ref {
            None => "create it (type kubernetes.io/tls) with the client CA's certificate and key",
            Some(_) => "create it with the certificates to trust in ca.crt",
        };
        return Err(Cause::new(Reason::SecretNotFound, format!("Secret {name} does not exist: {expected}")));
    };
    let value = |key: &str| value(secret, key);
    let missing = |message: String| Cause::new(Reason::SecretKeyNotFound, format!("Secret {name} has no key {message}"));
    let authorities = value(TLS_AUTHORITIES);
    let read = match &declared.issuer_ref {
        None => {
            let missing = |key: &str| missing(format!("{key}: expected {TLS_CERTIFICATE} and {TLS_KEY} of the client CA"));
            let certificate = value(TLS_CERTIFICATE).ok_or_else(|| missing(TLS_CERTIFICATE))?;
            let key = value(TLS_KEY).ok_or_else(|| missing(TLS_KEY))?;
            ClientAuthority::parse(certificate, key, authorities, now).map(Source::Own)
        }
        Some(reference) => {
            let certificates = authorities.or_else(|| value(TLS_CERTIFICATE));
            let certificates = certificates
                .ok_or_else(|| missing(format!("{TLS_AUTHORITIES} and no key {TLS_CERTIFICATE}: expected the certificates to trust")))?;
            let issuer = |trusted| Source::Issuer(Issuer { reference: reference.clone(), trusted, secret: name.clone() });
            TrustedAuthorities::parse(certificates, now).map(issuer)
        }
    };
    read.map_err(|error| unusable(name, &error))
}

fn unusable(secret: &str, error: &AuthorityError) -> Cause {
    let reason = match error {
        AuthorityError::Certificate(CertificateError::Expired { .. }) => Reason::CertificateExpired,
        AuthorityError::Certificate(CertificateError::NotYetValid { .. }) => Reason::CertificateNotYetValid,
        AuthorityError::Certificate(_) => Reason::InvalidCertificate,
        _ => Reason::InvalidClientAuthority,
    };
    let message = format!(
        "Secret {secret}: {}. No certificates are issued; devices can connect with existing certificates until these expire",
        chain(error)
    );
    Cause::new(reason, message)
}

#[cfg(test)]
#[path = "client_authority_tests.rs"]
mod tests;
