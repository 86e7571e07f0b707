//! The operator's authority for brokers whose listeners name no certificate: one for each Gateway.
//!
//! The authority belongs to a Gateway and not to a namespace: Kubernetes deletes it with the Gateway, only the operator reads its key,
//! and a stolen key can impersonate only this broker. Its lifetime has four parts:
//!
//! | share of its life | what clients trust (`ca.crt`) | who signs |
//! |---|---|---|
//! | up to [`NEXT_AFTER`] | it | it |
//! | for [`OVERLAP`] | it, and the next one | it |
//! | to its end | it, and the next one | the next one |
//! | after | the next one | the next one |
//!
//! A client that updates `ca.crt` within the overlap therefore never loses its connection.

use std::collections::BTreeMap;
use std::time::Duration;

use jiff::Timestamp;
use k8s_openapi::ByteString;
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose,
};
use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::PemObject;
use thiserror::Error;
use x509_cert::Certificate;
use x509_cert::der::Decode;

use super::server::{ServerCertificate, issued_by};
use super::{set_validity, timestamp};
use crate::configuration::agent::{TLS_AUTHORITIES, TLS_CERTIFICATE, TLS_KEY};

/// Data of a Secret.
pub type Data = BTreeMap<String, ByteString>;

/// Life of an authority. What machines are given at the factory or by hand lasts years: ten are usual for a private root.
pub const AUTHORITY_LIFE: Duration = Duration::from_hours(10 * 365 * 24);

/// Life of a broker's certificate: cert-manager's default (<https://cert-manager.io/docs/usage/certificate/>).
pub const SERVER_LIFE: Duration = Duration::from_hours(90 * 24);

/// An authority is this old when the next one is made: two thirds of its life.
pub const NEXT_AFTER: Duration = Duration::from_secs(AUTHORITY_LIFE.as_secs() / 3 * 2);

/// Clients have this long to take over the next authority before it signs: half of the life that is left by then.
pub const OVERLAP: Duration = Duration::from_secs(AUTHORITY_LIFE.as_secs() / 6);

/// Certificates are valid from this long before they are issued, for clients whose clocks are behind (as Let's Encrypt does).
const BACKDATED: Duration = Duration::from_hours(1);

/// Keys of the authority's Secret, beside those of a TLS Secret, which hold the one that signs.
const NEXT_CERTIFICATE: &str = "next.crt";
const NEXT_KEY: &str = "next.key";
const PREVIOUS_CERTIFICATE: &str = "previous.crt";

/// Why an authority cannot be read or a certificate cannot be issued.
#[derive(Debug, Error)]
pub enum AuthorityError {
    /// Another writer changed the Secret of the authority. The error does not show its content.
    #[error(
        "the key {key} of the authority's Secret cannot be read: restore the Secret; or delete it, then a new authority is made, and clients \
         must be given the new {TLS_AUTHORITIES}"
    )]
    Parse {
        /// Which.
        key: &'static str,
    },

    /// The library refused.
    #[error("failed to issue a certificate for {subject}")]
    Issue {
        /// For whom.
        subject: String,
        /// Why.
        #[source]
        source: rcgen::Error,
    },
}

/// The authority of a Gateway.
#[derive(Clone, Eq, PartialEq)]
pub struct Authority {
    signing: Root,
    next: Option<Root>,
    /// Signed before, and is still trusted.
    previous: Option<String>,
}

/// A certificate that signed itself, and its key.
#[derive(Clone, Eq, PartialEq)]
struct Root {
    certificate: String,
    key: String,
    not_before: Timestamp,
    not_after: Timestamp,
}

impl Authority {
    /// A new authority for a Gateway.
    ///
    /// # Errors
    /// If the system has no randomness.
    pub fn create(namespace: &str, gateway: &str, now: Timestamp) -> Result<Self, AuthorityError> {
        Ok(Self { signing: Root::create(namespace, gateway, now)?, next: None, previous: None })
    }

    /// The one in a Secret.
    ///
    /// # Errors
    /// If its content is malformed.
    pub fn parse(data: &Data) -> Result<Self, AuthorityError> {
        let next = data.contains_key(NEXT_CERTIFICATE).then(|| Root::parse(data, NEXT_CERTIFICATE, NEXT_KEY)).transpose()?;
        let previous = data.contains_key(PREVIOUS_CERTIFICATE).then(|| text(data, PREVIOUS_CERTIFICATE)).transpose()?;
        if let Some(previous) = &previous {
            validity(previous).ok_or(AuthorityError::Parse { key: PREVIOUS_CERTIFICATE })?;
        }
        Ok(Self { signing: Root::parse(data, TLS_CERTIFICATE, TLS_KEY)?, next, previous })
    }

    /// The data of its Secret.
    #[must_use]
    pub fn render(&self) -> Data {
        let mut data = vec![
            (TLS_CERTIFICATE, self.signing.certificate.clone()),
            (TLS_KEY, self.signing.key.clone()),
            (TLS_AUTHORITIES, self.trusted()),
        ];
        if let Some(next) = &self.next {
            data.extend([(NEXT_CERTIFICATE, next.certificate.clone()), (NEXT_KEY, next.key.clone())]);
        }
        data.extend(self.previous.clone().map(|previous| (PREVIOUS_CERTIFICATE, previous)));
        data.into_iter().map(|(key, text)| (key.to_owned(), ByteString(text.into_bytes()))).collect()
    }

    /// The certificates that clients should trust, as PEM: the signing one first.
    #[must_use]
    pub fn trusted(&self) -> String {
        let next = self.next.as_ref().map(|next| next.certificate.as_str());
        [Some(self.signing.certificate.as_str()), next, self.previous.as_deref()].into_iter().flatten().collect()
    }

    /// The authority at this time, see the table above. Changes only between two parts of its lifetime.
    ///
    /// # Errors
    /// If the system has no randomness.
    pub fn advance(mut self, namespace: &str, gateway: &str, now: Timestamp) -> Result<Self, AuthorityError> {
        if self.next.is_none() && now >= self.signing.not_before + NEXT_AFTER {
            self.next = Some(Root::create(namespace, gateway, now)?);
        }
        // Should the operator have been away for long, no certificate outlives the one that signed it.
        let last_call = self.signing.not_after - SERVER_LIFE;
        if let Some(next) = self.next.take_if(|next| now >= (next.not_before + OVERLAP).min(last_call)) {
            self.previous = Some(std::mem::replace(&mut self.signing, next).certificate);
        }
        self.previous = self.previous.filter(|previous| validity(previous).is_some_and(|(_, not_after)| now < not_after));
        Ok(self)
    }

    /// The data of the Secret with a broker's certificate: `existing` while that is good for these names, is of the authority that
    /// signs, and has a third of its life before it; else with a fresh certificate. `ca.crt` is what clients should trust.
    ///
    /// # Errors
    /// When there is no randomness, or a name is none that a certificate can have.
    pub fn certify(&self, names: &[String], existing: Option<&Data>, now: Timestamp) -> Result<Data, AuthorityError> {
        let pair = match existing.and_then(|data| self.still_good(names, data, now)) {
            Some(pair) => pair,
            None => self.signing.issue(names, now)?,
        };
        let authorities = ByteString(self.trusted().into_bytes());
        Ok([(TLS_CERTIFICATE, pair.0), (TLS_KEY, pair.1), (TLS_AUTHORITIES, authorities)]
            .map(|(key, value)| (key.to_owned(), value))
            .into())
    }

    fn still_good(&self, names: &[String], data: &Data, now: Timestamp) -> Option<(ByteString, ByteString)> {
        let (chain, key) = (data.get(TLS_CERTIFICATE)?, data.get(TLS_KEY)?);
        let certificate = ServerCertificate::parse(&chain.0, &key.0).ok()?;
        let life = certificate.not_after.duration_since(certificate.not_before);
        let ours = issued_by(&read(&String::from_utf8(chain.0.clone()).ok()?)?, &read(&self.signing.certificate)?);
        // As many, and each of the wanted ones: so these, however they are written.
        let complete = certificate.names().len() == names.len() && certificate.check(now, names).is_ok();
        let good = ours && complete && now < certificate.not_after - life / 3;
        good.then(|| (chain.clone(), key.clone()))
    }
}

impl Root {
    fn create(namespace: &str, gateway: &str, now: Timestamp) -> Result<Self, AuthorityError> {
        let issue = |source| AuthorityError::Issue { subject: format!("the authority of Gateway {namespace}/{gateway}"), source };
        let key = KeyPair::generate().map_err(issue)?;
        let mut parameters = CertificateParams::default();
        // Each of its own name: some clients look for an issuer by its name alone, and find one.
        parameters.distinguished_name = DistinguishedName::new();
        parameters.distinguished_name.push(DnType::OrganizationName, "Fleetwright");
        parameters.distinguished_name.push(DnType::OrganizationalUnitName, namespace);
        parameters.distinguished_name.push(DnType::CommonName, format!("{gateway} {}", now.strftime("%Y-%m-%dT%H:%M:%SZ")));
        // Without name constraints, though they would say what it is for: a client that does not know that extension must
        // refuse the certificate (RFC 5280 section 4.2), and small devices often do not.
        parameters.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        parameters.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign, KeyUsagePurpose::DigitalSignature];
        let (not_before, not_after) = (whole_seconds(now - BACKDATED), whole_seconds(now + AUTHORITY_LIFE));
        set_validity(&mut parameters, not_before, not_after);
        let certificate = parameters.self_signed(&key).map_err(issue)?.pem();
        Ok(Self { certificate, key: key.serialize_pem(), not_before, not_after })
    }

    fn parse(data: &Data, certificate: &'static str, key: &'static str) -> Result<Self, AuthorityError> {
        let (pem, private) = (text(data, certificate)?, text(data, key)?);
        let (not_before, not_after) = validity(&pem).ok_or(AuthorityError::Parse { key: certificate })?;
        // Its key fits, else nobody could verify what it signs.
        ServerCertificate::parse(pem.as_bytes(), private.as_bytes()).map_err(|_| AuthorityError::Parse { key })?;
        Ok(Self { certificate: pem, key: private, not_before, not_after })
    }

    fn issue(&self, names: &[String], now: Timestamp) -> Result<(ByteString, ByteString), AuthorityError> {
        let subject = names.first().cloned().unwrap_or_default();
        let issue = |source| AuthorityError::Issue { subject: subject.clone(), source };
        let authority = KeyPair::from_pem(&self.key).map_err(|_| AuthorityError::Parse { key: TLS_KEY })?;
        let issuer = Issuer::from_ca_cert_pem(&self.certificate, authority).map_err(|_| AuthorityError::Parse { key: TLS_CERTIFICATE })?;
        let key = KeyPair::generate().map_err(issue)?;
        let mut parameters = CertificateParams::new(names).map_err(issue)?;
        parameters.distinguished_name = DistinguishedName::new();
        // At most 64 characters (RFC 5280 appendix A.1): the first name is the Gateway's own.
        parameters.distinguished_name.push(DnType::CommonName, subject.as_str());
        parameters.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        parameters.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        parameters.use_authority_key_identifier_extension = true;
        set_validity(&mut parameters, now - BACKDATED, (now + SERVER_LIFE).min(self.not_after));
        let certificate = parameters.signed_by(&key, &issuer).map_err(issue)?.pem();
        Ok((ByteString(certificate.into_bytes()), ByteString(key.serialize_pem().into_bytes())))
    }
}

fn text(data: &Data, key: &'static str) -> Result<String, AuthorityError> {
    let bytes = data.get(key).ok_or(AuthorityError::Parse { key })?;
    String::from_utf8(bytes.0.clone()).map_err(|_| AuthorityError::Parse { key })
}

fn read(pem: &str) -> Option<Certificate> {
    let der = CertificateDer::from_pem_slice(pem.as_bytes()).ok()?;
    Certificate::from_der(&der).ok()
}

fn validity(pem: &str) -> Option<(Timestamp, Timestamp)> {
    let validity = read(pem)?.tbs_certificate.validity;
    Some((timestamp(validity.not_before), timestamp(validity.not_after)))
}

/// X.509 has no fractions of a second.
fn whole_seconds(time: Timestamp) -> Timestamp {
    Timestamp::from_second(time.as_second()).unwrap_or(time)
}

#[cfg(test)]
#[path = "authority_tests.rs"]
mod tests;
