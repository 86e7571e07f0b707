//! A device's certificate signing request (PKCS #10, RFC 2986): whether a certificate may be issued for its key.

use crate::api::reason::Reason;
use rcgen::{PublicKeyData, SubjectPublicKeyInfo};
use rustls_pki_types::CertificateSigningRequestDer;
use rustls_pki_types::pem::PemObject;
use sha2::{Digest, Sha256};
use thiserror::Error;
use x509_parser::certification_request::X509CertificationRequest;
use x509_parser::prelude::FromDer;
use x509_parser::public_key::PublicKey;

/// The shortest RSA key, in bits: NIST SP 800-57 allows no shorter one, and neither do current TLS libraries.
const MIN_RSA_BITS: usize = 2048;

/// The longest one that the signature is checked of: beyond it a request costs more time than it is worth.
const MAX_RSA_BITS: usize = 8192;

/// How a request may be signed: RSA (PKCS #1) with SHA-256, -384 or -512 (RFC 8017), ECDSA with SHA-256 or -384 (RFC 5758),
/// Ed25519 (RFC 8410).
const SIGNATURES: [&str; 6] = [
    "1.2.840.113549.1.1.11",
    "1.2.840.113549.1.1.12",
    "1.2.840.113549.1.1.13",
    "1.2.840.10045.4.3.2",
    "1.2.840.10045.4.3.3",
    "1.3.101.112",
];

/// A request whose signature shows that its sender holds the private key. Its subject and extensions matter only where somebody else
/// signs: what is issued here is decided here, not by the request.
#[derive(Debug)]
pub struct SigningRequest {
    key: SubjectPublicKeyInfo,
    der: Vec<u8>,
    sole_name: Option<String>,
}

/// Why no certificate can be issued for a request.
#[derive(Clone, Debug, Eq, Error, PartialEq)]
pub enum RequestError {
    /// No PEM block, or not the right one, or not a request inside.
    #[error(
        "certificateSigningRequest cannot be read: expected one PEM block `CERTIFICATE REQUEST` (PKCS #10), for instance from \
         `openssl req -new -key device.key -subj /CN=device`"
    )]
    Unreadable,

    /// A kind of key, or of signature, that TLS 1.3 has no use for.
    #[error(
        "the key or the signature of certificateSigningRequest is of a kind that is not accepted: expected ECDSA P-256 or P-384, Ed25519, or RSA of 2048 to 8192 bits, signed with SHA-256 or stronger"
    )]
    UnsupportedKey,

    /// RSA, but short or far too long.
    #[error(
        "the RSA key of certificateSigningRequest has {bits} bits: expected {MIN_RSA_BITS} to {MAX_RSA_BITS}; make a new key on the device"
    )]
    KeySize {
        /// Its size.
        bits: usize,
    },

    /// The request was changed after it was signed, or signed with another key.
    #[error("the signature of certificateSigningRequest is not by the key inside: make the request again with the device's own key")]
    InvalidSignature,
}

impl RequestError {
    /// The reason in a condition.
    #[must_use]
    pub const fn reason(&self) -> Reason {
        match self {
            Self::Unreadable => Reason::UnreadableSigningRequest,
            Self::UnsupportedKey => Reason::UnsupportedKey,
            Self::KeySize { .. } => Reason::WeakKey,
            Self::InvalidSignature => Reason::InvalidRequestSignature,
        }
    }
}

impl SigningRequest {
    /// The request in a PEM text.
    ///
    /// # Errors
    /// When no certificate may be issued for it.
    pub fn parse(pem: &str) -> Result<Self, RequestError> {
        Self::read(pem, true)
    }

    /// The same for a request whose signature is known to be good, which saves most of the time that it takes.
    ///
    /// # Errors
    /// When no certificate may be issued for it.
    pub fn parse_known(pem: &str) -> Result<Self, RequestError> {
        Self::read(pem, false)
    }

    fn read(pem: &str, verify: bool) -> Result<Self, RequestError> {
        let der = CertificateSigningRequestDer::from_pem_slice(pem.as_bytes()).map_err(|_| RequestError::Unreadable)?;
        let (rest, request) = X509CertificationRequest::from_der(&der).map_err(|_| RequestError::Unreadable)?;
        if !rest.is_empty() {
            return Err(RequestError::Unreadable);
        }
        let public = &request.certification_request_info.subject_pki;
        let key = SubjectPublicKeyInfo::from_der(public.raw).map_err(|_| RequestError::UnsupportedKey)?;
        if let PublicKey::RSA(rsa) = public.parsed().map_err(|_| RequestError::Unreadable)? {
            let bits = rsa.key_size();
            if !(MIN_RSA_BITS..=MAX_RSA_BITS).contains(&bits) {
                return Err(RequestError::KeySize { bits });
            }
        }
        if !SIGNATURES.contains(&request.signature_algorithm.algorithm.to_id_string().as_str()) {
            return Err(RequestError::UnsupportedKey);
        }
        if verify {
            request.verify_signature().map_err(|_| RequestError::InvalidSignature)?;
        }
        let asked = &request.certification_request_info;
        let name = asked.subject.iter_common_name().next().and_then(|name| name.as_str().ok()).map(str::to_owned);
        let is_sole = asked.subject.iter_attributes().count() == 1 && asked.attributes().is_empty();
        Ok(Self { key, sole_name: name.filter(|_| is_sole), der: der.to_vec() })
    }

    /// The same as `SubjectPublicKeyInfo` (DER).
    #[must_use]
    pub fn public_key(&self) -> Vec<u8> {
        self.key.subject_public_key_info()
    }

    /// The common name that it asks for, where it asks for nothing else: neither for other parts of a subject nor for extensions.
    #[must_use]
    pub fn sole_name(&self) -> Option<&str> {
        self.sole_name.as_deref()
    }

    /// This very request as PEM, and nothing that stood beside it.
    #[must_use]
    pub fn pem(&self) -> String {
        let format = pem::EncodeConfig::new().set_line_ending(pem::LineEnding::LF);
        pem::encode_config(&pem::Pem::new("CERTIFICATE REQUEST", self.der.as_slice()), format)
    }

    /// The public key that the certificate will hold.
    #[must_use]
    pub const fn key(&self) -> &(impl PublicKeyData + use<>) {
        &self.key
    }
}

/// Tells one request from another without keeping it: the first 64 bits of the SHA-256 of its text.
#[must_use]
pub fn digest(pem: &str) -> u64 {
    let digest: [u8; 32] = Sha256::digest(pem.trim().as_bytes()).into();
    u64::from_be_bytes(std::array::from_fn(|index| digest[index]))
}

#[cfg(test)]
#[path = "request_tests.rs"]
mod tests;
