//! A listener's certificate: whether a broker can use it. Checked by the operator, which says so, and by the agent, which
//! keeps the last good one.

use std::sync::Arc;

use jiff::Timestamp;
use rustls::crypto::CryptoProvider;
use rustls::sign::CertifiedKey;
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer};
use thiserror::Error;
use x509_cert::Certificate;
use x509_cert::der::Decode;

use super::timestamp;

/// A certificate chain and its key, as PEM, that fit one another.
#[derive(Clone, Eq, PartialEq)]
pub struct ServerCertificate {
    /// The chain, leaf first.
    pub chain: Vec<u8>,

    /// The private key of the leaf.
    pub key: Vec<u8>,

    /// The leaf is valid from here on.
    pub not_before: Timestamp,

    /// The leaf is valid up to here.
    pub not_after: Timestamp,
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
        /// Place in the chain, from 1.
        position: usize,
        /// Why.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },

    /// No usable block in `tls.key`. Says nothing of its content.
    #[error("tls.key holds no private key: expected one unencrypted PEM block `PRIVATE KEY`, `RSA PRIVATE KEY` or `EC PRIVATE KEY`")]
    NoKey,

    /// The key is of another pair.
    #[error("tls.key is not the key of the first certificate in tls.crt: write both from the same pair, the leaf first")]
    MatchKey(#[source] rustls::Error),

    /// Its time is over.
    #[error("the certificate expired at {not_after}: renew it")]
    Expired {
        /// When.
        not_after: Timestamp,
    },

    /// Its time has not come.
    #[error("the certificate is not valid before {not_before}")]
    NotYetValid {
        /// When it will.
        not_before: Timestamp,
    },
}

impl ServerCertificate {
    /// The certificate of a TLS Secret.
    ///
    /// # Errors
    /// When the parts cannot be read or do not fit. Whether its time is over is told by [`Self::check_time`].
    pub fn parse(chain: &[u8], key: &[u8]) -> Result<Self, CertificateError> {
        let certificates = parse_chain(chain)?;
        let leaf = certificates.first().ok_or(CertificateError::NoCertificate)?;
        let validity = parse_leaf(leaf)?.tbs_certificate.validity;
        let private = PrivateKeyDer::from_pem_slice(key).map_err(|_| CertificateError::NoKey)?;
        CertifiedKey::from_der(certificates, private, &provider()).map_err(|source| match source {
            rustls::Error::InvalidCertificate(_) => CertificateError::ParseCertificate { position: 1, source: source.into() },
            rustls::Error::InconsistentKeys(_) => CertificateError::MatchKey(source),
            _ => CertificateError::NoKey,
        })?;
        Ok(Self {
            chain: chain.to_vec(),
            key: key.to_vec(),
            not_before: timestamp(validity.not_before),
            not_after: timestamp(validity.not_after),
        })
    }

    /// Whether the leaf is valid at this time.
    ///
    /// # Errors
    /// When it is not.
    pub fn check_time(&self, now: Timestamp) -> Result<(), CertificateError> {
        if now >= self.not_after {
            return Err(CertificateError::Expired { not_after: self.not_after });
        }
        if now < self.not_before {
            return Err(CertificateError::NotYetValid { not_before: self.not_before });
        }
        Ok(())
    }
}

impl std::fmt::Debug for ServerCertificate {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_struct("ServerCertificate").field("not_after", &self.not_after).finish_non_exhaustive()
    }
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

fn parse_leaf(leaf: &CertificateDer<'_>) -> Result<Certificate, CertificateError> {
    Certificate::from_der(leaf).map_err(|source| CertificateError::ParseCertificate { position: 1, source: source.into() })
}

#[cfg(test)]
mod tests {
    use rcgen::{CertificateParams, KeyPair};

    use super::*;

    fn pair(names: &[&str]) -> (String, String) {
        let key = KeyPair::generate().unwrap();
        let mut parameters = CertificateParams::new(names.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>()).unwrap();
        parameters.not_before = rcgen::date_time_ymd(2020, 1, 1);
        parameters.not_after = rcgen::date_time_ymd(2030, 1, 1);
        (parameters.self_signed(&key).unwrap().pem(), key.serialize_pem())
    }

    #[test]
    fn a_pair_and_its_time() {
        let (chain, key) = pair(&["plant-1"]);
        let certificate = ServerCertificate::parse(chain.as_bytes(), key.as_bytes()).unwrap();
        assert_eq!(certificate.not_after.to_string(), "2030-01-01T00:00:00Z");
        let check = |time: &str| certificate.check_time(time.parse().unwrap());
        assert!(check("2025-06-01T00:00:00Z").is_ok());
        assert!(matches!(check("2030-01-01T00:00:00Z"), Err(CertificateError::Expired { .. })));
        assert!(matches!(check("2019-12-31T23:59:59Z"), Err(CertificateError::NotYetValid { .. })));
        assert!(!format!("{certificate:?}").contains("PRIVATE"));
    }

    #[test]
    fn what_a_broker_cannot_use() {
        let ((chain, key), (other_chain, other_key)) = (pair(&["plant-1"]), pair(&["plant-2"]));
        let parse = |chain: &str, key: &str| ServerCertificate::parse(chain.as_bytes(), key.as_bytes()).map(drop);
        assert!(parse(&format!("{chain}{other_chain}"), &key).is_ok(), "a chain");
        assert!(matches!(parse(&format!("{other_chain}{chain}"), &key), Err(CertificateError::MatchKey(_))), "the leaf is not first");
        assert!(matches!(parse(&chain, &other_key), Err(CertificateError::MatchKey(_))));
        assert!(matches!(parse("", &key), Err(CertificateError::NoCertificate)));
        assert!(matches!(parse(&key, &key), Err(CertificateError::NoCertificate)));
        assert!(matches!(parse(&chain, ""), Err(CertificateError::NoKey)));
        assert!(matches!(parse(&chain, &chain), Err(CertificateError::NoKey)));
        let encrypted = key.replace("PRIVATE KEY", "ENCRYPTED PRIVATE KEY");
        assert!(matches!(parse(&chain, &encrypted), Err(CertificateError::NoKey)));
        let garbage = "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n";
        assert!(matches!(parse(garbage, &key), Err(CertificateError::ParseCertificate { position: 1, .. })));
        let broken = "-----BEGIN CERTIFICATE-----\n****\n-----END CERTIFICATE-----\n";
        assert!(matches!(parse(broken, &key), Err(CertificateError::ParseCertificate { position: 1, .. })));
    }
}
