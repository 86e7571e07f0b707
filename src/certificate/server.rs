//! Checks whether a broker can use a listener's certificate. The operator reports the result, and the agent keeps the last good
//! certificate.

use std::net::IpAddr;
use std::sync::Arc;

use jiff::Timestamp;
use rustls::client::verify_server_name;
use rustls::crypto::CryptoProvider;
use rustls::server::ParsedCertificate;
use rustls::sign::CertifiedKey;
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use thiserror::Error;
use x509_cert::Certificate;
use x509_cert::der::Decode;
use x509_cert::ext::pkix::name::GeneralName;
use x509_cert::ext::pkix::{AuthorityKeyIdentifier, SubjectAltName, SubjectKeyIdentifier};

use super::fingerprint;

/// A certificate chain and its matching key, as PEM.
#[derive(Clone, Eq, PartialEq)]
pub struct ServerCertificate {
    /// The chain, leaf first.
    pub chain: Vec<u8>,

    /// The private key of the leaf.
    pub key: Vec<u8>,

    /// Start of the leaf's validity.
    pub not_before: Timestamp,

    /// End of the leaf's validity.
    pub not_after: Timestamp,

    /// SHA-256 of the leaf (see [`fingerprint`]).
    pub fingerprint: String,

    leaf: CertificateDer<'static>,
}

/// Why a broker cannot use a certificate.
#[derive(Debug, Error)]
pub enum CertificateError {
    /// No PEM block in `tls.crt`.
    #[error("tls.crt holds no certificate: expected PEM blocks `CERTIFICATE`, leaf first")]
    NoCertificate,

    /// A block of `tls.crt` that cannot be read.
    #[error("failed to parse certificate {position} of tls.crt")]
    ParseCertificate {
        /// Position in the chain, from 1.
        position: usize,
        /// The cause.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },

    /// No usable block in `tls.key`. The error does not show its content.
    #[error("tls.key holds no private key: expected one unencrypted PEM block `PRIVATE KEY`, `RSA PRIVATE KEY` or `EC PRIVATE KEY`")]
    NoKey,

    /// The key does not match the certificate.
    #[error("tls.key is not the key of the first certificate in tls.crt: write both from the same pair, the leaf first")]
    MatchKey(#[source] rustls::Error),

    /// A certificate is not the issuer of the previous one.
    #[error(
        "certificate {position} of tls.crt did not issue certificate {}: write the leaf first, and after each certificate the one that \
         issued it",
        position - 1
    )]
    ChainOrder {
        /// Position in the chain, from 1, of the first certificate that is out of order.
        position: usize,
    },

    /// Clients that verify the name would refuse it.
    #[error("the certificate is valid for {found}, but clients connect to {expected}: issue it for that name as well")]
    MatchName {
        /// The missing name.
        expected: String,
        /// The names in the certificate.
        found: String,
    },

    /// The certificate has expired.
    #[error("the certificate expired at {not_after}: renew it")]
    Expired {
        /// Time of expiry.
        not_after: Timestamp,
    },

    /// The certificate is not valid yet.
    #[error("the certificate is not valid before {not_before}")]
    NotYetValid {
        /// Start of its validity.
        not_before: Timestamp,
    },
}

impl ServerCertificate {
    /// The certificate of a TLS Secret.
    ///
    /// # Errors
    /// If the parts cannot be read or do not match. [`Self::check_time`] checks the validity.
    pub fn parse(chain: &[u8], key: &[u8]) -> Result<Self, CertificateError> {
        let certificates = parse_chain(chain)?;
        let leaf = certificates.first().ok_or(CertificateError::NoCertificate)?;
        let leaf = leaf.clone();
        let parsed = parse_each(&certificates)?;
        let (not_before, not_after) = super::validity(parsed.first().ok_or(CertificateError::NoCertificate)?);
        certified_key(certificates, key)?;
        check_order(&parsed)?;
        Ok(Self { chain: chain.to_vec(), key: key.to_vec(), not_before, not_after, fingerprint: fingerprint(&leaf), leaf })
    }

    /// The chain and key in the form that a TLS server of this process needs.
    ///
    /// # Errors
    /// Never for a certificate that [`Self::parse`] returned.
    pub fn certified_key(&self) -> Result<CertifiedKey, CertificateError> {
        certified_key(parse_chain(&self.chain)?, &self.key)
    }

    /// Whether clients that connect to these names would accept it at this time.
    ///
    /// # Errors
    /// If they would refuse it.
    pub fn check(&self, now: Timestamp, host_names: &[String]) -> Result<(), CertificateError> {
        self.check_time(now)?;
        host_names.iter().try_for_each(|name| self.check_name(name))
    }

    /// The names and addresses of the leaf (its Subject Alternative Names, because clients check no others).
    #[must_use]
    pub fn names(&self) -> Vec<String> {
        parse(&self.leaf).map(|leaf| alternative_names(&leaf)).unwrap_or_default()
    }

    fn check_name(&self, name: &str) -> Result<(), CertificateError> {
        let valid = ParsedCertificate::try_from(&self.leaf).is_ok_and(|leaf| {
            // An invalid host name cannot be in a certificate.
            ServerName::try_from(name).is_ok_and(|name| verify_server_name(&leaf, &name).is_ok())
        });
        if valid {
            return Ok(());
        }
        let names = self.names();
        let found = if names.is_empty() { "no host name".to_owned() } else { names.join(", ") };
        Err(CertificateError::MatchName { expected: name.to_owned(), found })
    }

    /// Whether the leaf is valid at this time.
    ///
    /// # Errors
    /// If it is not valid.
    pub fn check_time(&self, now: Timestamp) -> Result<(), CertificateError> {
        check_time((self.not_before, self.not_after), now)
    }
}

fn certified_key(chain: Vec<CertificateDer<'static>>, key: &[u8]) -> Result<CertifiedKey, CertificateError> {
    let private = PrivateKeyDer::from_pem_slice(key).map_err(|_| CertificateError::NoKey)?;
    CertifiedKey::from_der(chain, private, &provider()).map_err(|source| match source {
        rustls::Error::InvalidCertificate(_) => CertificateError::ParseCertificate { position: 1, source: source.into() },
        rustls::Error::InconsistentKeys(_) => CertificateError::MatchKey(source),
        _ => CertificateError::NoKey,
    })
}

/// Checks that a time is in a validity.
pub(super) fn check_time((not_before, not_after): (Timestamp, Timestamp), now: Timestamp) -> Result<(), CertificateError> {
    if now >= not_after {
        return Err(CertificateError::Expired { not_after });
    }
    if now < not_before {
        return Err(CertificateError::NotYetValid { not_before });
    }
    Ok(())
}

impl std::fmt::Debug for ServerCertificate {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_struct("ServerCertificate").field("not_after", &self.not_after).finish_non_exhaustive()
    }
}

/// The validity of a certificate.
///
/// # Errors
/// If it cannot be read.
pub fn validity(certificate: &CertificateDer<'_>) -> Result<(Timestamp, Timestamp), CertificateError> {
    let parsed = parse(certificate).map_err(|source| CertificateError::ParseCertificate { position: 1, source: source.into() })?;
    Ok(super::validity(&parsed))
}

fn provider() -> Arc<CryptoProvider> {
    Arc::new(rustls::crypto::ring::default_provider())
}

fn parse_chain(chain: &[u8]) -> Result<Vec<CertificateDer<'static>>, CertificateError> {
    let parse = |(index, certificate): (usize, Result<_, rustls_pki_types::pem::Error>)| {
        certificate.map_err(|source| CertificateError::ParseCertificate { position: index + 1, source: source.into() })
    };
    CertificateDer::pem_slice_iter(chain).enumerate().map(parse).collect()
}

fn parse(certificate: &CertificateDer<'_>) -> Result<Certificate, x509_cert::der::Error> {
    Certificate::from_der(certificate)
}

fn parse_each(certificates: &[CertificateDer<'_>]) -> Result<Vec<Certificate>, CertificateError> {
    let parse = |(index, certificate): (usize, &CertificateDer<'_>)| {
        parse(certificate).map_err(|source| CertificateError::ParseCertificate { position: index + 1, source: source.into() })
    };
    certificates.iter().enumerate().map(parse).collect()
}

fn check_order(chain: &[Certificate]) -> Result<(), CertificateError> {
    let out_of_place = chain.windows(2).position(|pair| !matches!(pair, [certificate, issuer] if issued_by(certificate, issuer)));
    out_of_place.map_or(Ok(()), |index| Err(CertificateError::ChainOrder { position: index + 2 }))
}

/// Compares the names, and the key identifiers if both certificates have one, because an authority may have had another key.
pub(super) fn issued_by(certificate: &Certificate, issuer: &Certificate) -> bool {
    let (certificate, issuer) = (&certificate.tbs_certificate, &issuer.tbs_certificate);
    let names = certificate.issuer == issuer.subject;
    let wanted = certificate.get::<AuthorityKeyIdentifier>().ok().flatten().and_then(|(_, identifier)| identifier.key_identifier);
    let key = issuer.get::<SubjectKeyIdentifier>().ok().flatten().map(|(_, identifier)| identifier.0);
    names && (wanted.is_none() || key.is_none() || wanted == key)
}

fn alternative_names(leaf: &Certificate) -> Vec<String> {
    let names = leaf.tbs_certificate.get::<SubjectAltName>().ok().flatten().map(|(_, names)| names.0).unwrap_or_default();
    names.iter().filter_map(alternative_name).collect()
}

fn alternative_name(name: &GeneralName) -> Option<String> {
    match name {
        GeneralName::DnsName(name) => Some(name.to_string()),
        GeneralName::IpAddress(bytes) => {
            let bytes = bytes.as_bytes();
            let four = <[u8; 4]>::try_from(bytes).map(IpAddr::from);
            four.or_else(|_| <[u8; 16]>::try_from(bytes).map(IpAddr::from)).ok().map(|address| address.to_string())
        }
        _ => None,
    }
}

#[cfg(test)]
#[path = "server_tests.rs"]
mod tests;
