//! The authorities that brokers trust if an external authority signs the certificates of devices, and the check of such certificates.
//! Pure.

use std::fmt;
use std::sync::Arc;

use jiff::{SignedDuration, Timestamp};
use rustls::RootCertStore;
use rustls::server::WebPkiClientVerifier;
use rustls::server::danger::ClientCertVerifier;
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, UnixTime};
use thiserror::Error;
use x509_cert::Certificate;
use x509_cert::der::asn1::{PrintableStringRef, Utf8StringRef};
use x509_cert::der::oid::db::rfc4519::CN;
use x509_cert::der::{Any, Decode, Encode};

use super::client::{AuthorityError, authority_fingerprint, check_usage, trusted_certificates};
use super::server::{CertificateError, check_time, issued_by};
use super::{hexadecimal, validity};

/// The longest chain that is taken, in bytes of PEM: it stands in the status of a Device.
const MAX_BYTES: usize = 16 << 10;

/// A certificate may be valid from this long ahead of our clock, as the operator's own are from that long before it.
const CLOCK_SKEW: SignedDuration = SignedDuration::from_mins(10);

/// Authorities whose keys are elsewhere.
pub struct TrustedAuthorities {
    /// As PEM.
    trusted: String,
    verifier: Arc<dyn ClientCertVerifier>,
    fingerprint: u64,
    not_before: Timestamp,
    not_after: Timestamp,
    roots: Vec<Certificate>,
}

/// Why a device cannot connect with a certificate.
#[derive(Debug, Error)]
pub enum UnusableCertificate {
    /// No certificate in it, or far too much.
    #[error("what was issued cannot be read: expected PEM blocks `CERTIFICATE`, the device's own first, {} KiB at most", MAX_BYTES >> 10)]
    Unreadable,

    /// Not for the key of the request.
    #[error("what was issued is for another key than that of certificateSigningRequest")]
    OtherKey,

    /// The broker takes the name for the user.
    #[error("what was issued is for the common name {found:?}, and the broker takes that for the user: expected {expected:?}")]
    OtherName {
        /// The Device's name.
        expected: String,
        /// That of the certificate; empty where it has none, or several.
        found: String,
    },

    /// Its time is over, or that of one that it leads to.
    #[error("what was issued, or what it leads to, is valid up to {not_after} only: renew the issuer's own certificate")]
    Expired {
        /// Up to when.
        not_after: Timestamp,
    },

    /// The broker would refuse clients that present it.
    #[error(
        "the broker would not accept what was issued: it has to be valid now, for client authentication, and signed by one that {secret} trusts"
    )]
    Untrusted {
        /// Name of the Secret with the trusted certificates.
        secret: String,
        /// Why not.
        #[source]
        source: rustls::Error,
    },
}

/// A certificate that a device can connect with.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Usable {
    /// Its serial number, in hexadecimal digits.
    pub serial_number: String,
    /// Up to here it, and all that it leads to, is valid.
    pub not_after: Timestamp,
}

impl TrustedAuthorities {
    /// From PEM, the authority that signs first, or the root above it.
    ///
    /// # Errors
    /// When there is none, or none that a broker would trust now.
    pub fn parse(certificates: &[u8], now: Timestamp) -> Result<Self, AuthorityError> {
        let trusted = trusted_certificates(certificates, &[])?;
        let ders: Vec<CertificateDer<'_>> = CertificateDer::pem_slice_iter(certificates).filter_map(Result::ok).collect();
        let first = ders.first().ok_or(CertificateError::NoCertificate)?;
        let parse = |der: &CertificateDer<'_>| Certificate::from_der(der).map_err(|_| AuthorityError::ParseTrusted);
        let parsed = parse(first)?;
        check_usage(&parsed)?;
        let (not_before, not_after) = validity(&parsed);
        check_time((not_before, not_after), now)?;
        let (mut anchors, mut roots) = (RootCertStore::empty(), Vec::new());
        for der in &ders {
            let certificate = parse(der)?;
            if issued_by(&certificate, &certificate) {
                anchors.add(der.clone()).map_err(|_| AuthorityError::ParseTrusted)?;
                roots.push(certificate);
            }
        }
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let verifier =
            WebPkiClientVerifier::builder_with_provider(Arc::new(anchors), provider).build().map_err(|_| AuthorityError::NoRoot)?;
        Ok(Self { trusted, verifier, fingerprint: authority_fingerprint(&parsed), not_before, not_after, roots })
    }

    /// Whether a device of this name and this key (`SubjectPublicKeyInfo`, DER) can connect with what was issued to it: `chain`, its own
    /// certificate first.
    ///
    /// # Errors
    /// If it cannot connect now.
    pub fn check(&self, chain: &[u8], device: &str, key: &[u8], secret: &str, now: Timestamp) -> Result<Usable, UnusableCertificate> {
        if chain.len() > MAX_BYTES {
            return Err(UnusableCertificate::Unreadable);
        }
        let ders: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(chain).collect();
        let ders: Vec<CertificateDer<'_>> = ders.map_err(|_| UnusableCertificate::Unreadable)?;
        let (leaf, intermediates) = ders.split_first().ok_or(UnusableCertificate::Unreadable)?;
        let parse = |der: &CertificateDer<'_>| Certificate::from_der(der).map_err(|_| UnusableCertificate::Unreadable);
        let chain: Vec<Certificate> = ders.iter().map(parse).collect::<Result<_, _>>()?;
        let (Some(own), Some(last)) = (chain.first(), chain.last()) else { return Err(UnusableCertificate::Unreadable) };
        let public = own.tbs_certificate.subject_public_key_info.to_der().map_err(|_| UnusableCertificate::Unreadable)?;
        if public != key {
            return Err(UnusableCertificate::OtherKey);
        }
        let found = common_name(&own.tbs_certificate).unwrap_or_default();
        if found != device {
            return Err(UnusableCertificate::OtherName { expected: device.to_owned(), found });
        }
        // An issuer's clock may be ahead of ours.
        let from = validity(own).0;
        let at = if from.duration_since(now) <= CLOCK_SKEW { now.max(from) } else { now };
        let since = std::time::Duration::from_secs(u64::try_from(at.as_second()).unwrap_or_default());
        self.verifier
            .verify_client_cert(leaf, intermediates, UnixTime::since_unix_epoch(since))
            .map_err(|source| UnusableCertificate::Untrusted { secret: secret.to_owned(), source })?;
        // Some issuers give what outlives themselves, and brokers look at the whole chain, roots included.
        let root = self.roots.iter().filter(|root| issued_by(last, root)).map(|root| validity(root).1).max();
        let not_after = chain.iter().map(|certificate| validity(certificate).1).chain(root).fold(Timestamp::MAX, Timestamp::min);
        if not_after <= now {
            return Err(UnusableCertificate::Expired { not_after });
        }
        Ok(Usable { serial_number: hexadecimal(own.tbs_certificate.serial_number.as_bytes()), not_after })
    }

    /// Nothing that leads to one of the roots is valid for longer.
    #[must_use]
    pub fn roots_until(&self) -> Timestamp {
        self.roots.iter().map(|root| validity(root).1).max().unwrap_or(self.not_after)
    }

    /// The certificates with which a broker checks those that were issued, as PEM.
    #[must_use]
    pub fn trusted(&self) -> &str {
        &self.trusted
    }

    /// The identity of an authority, as in [`super::client::ClientAuthority::fingerprint`].
    #[must_use]
    pub const fn fingerprint(&self) -> u64 {
        self.fingerprint
    }

    /// When the first of them is valid.
    #[must_use]
    pub const fn validity(&self) -> (Timestamp, Timestamp) {
        (self.not_before, self.not_after)
    }
}

impl fmt::Debug for TrustedAuthorities {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("TrustedAuthorities").field("not_after", &self.not_after).finish_non_exhaustive()
    }
}

/// The common name of a subject that has one and no more.
fn common_name(certificate: &x509_cert::TbsCertificate) -> Option<String> {
    let attributes = certificate.subject.0.iter().flat_map(|relative| relative.0.iter());
    let mut names = attributes.filter(|attribute| attribute.oid == CN).map(|attribute| text(&attribute.value));
    let first = names.next()?;
    first.filter(|_| names.next().is_none())
}

fn text(value: &Any) -> Option<String> {
    let utf8 = Utf8StringRef::try_from(value).map(|text| text.as_str().to_owned());
    utf8.or_else(|_| PrintableStringRef::try_from(value).map(|text| text.as_str().to_owned())).ok()
}

#[cfg(test)]
#[path = "trust_tests.rs"]
mod tests;
