//! A device's certificate signing request (PKCS #10, RFC 2986): parsing, and validation of its key and signature.

use crate::api::reason::Reason;
use rcgen::{PublicKeyData, SubjectPublicKeyInfo};
use rustls_pki_types::CertificateSigningRequestDer;
use rustls_pki_types::pem::PemObject;
use sha2::{Digest, Sha256};
use thiserror::Error;
use x509_parser::certification_request::X509CertificationRequest;
use x509_parser::prelude::FromDer;
use x509_parser::public_key::PublicKey;

/// Minimum size of an RSA key in bits: NIST SP 800-57 and current TLS libraries allow no smaller key.
const MIN_RSA_BITS: usize = 2048;

/// Maximum size of an RSA key in bits: the verification of a larger key takes too much time.
const MAX_RSA_BITS: usize = 8192;

/// Accepted signature algorithms: RSA (PKCS #1) with SHA-256, -384 or -512 (RFC 8017), ECDSA with SHA-256 or -384 (RFC 5758),
/// Ed25519 (RFC 8410).
const SIGNATURES: [&str; 6] = [
    "1.2.840.113549.1.1.11",
    "1.2.840.113549.1.1.12",
    "1.2.840.113549.1.1.13",
    "1.2.840.10045.4.3.2",
    "1.2.840.10045.4.3.3",
    "1.3.101.112",
];

/// A request with a valid signature, so that its sender has the private key. Its subject and extensions matter only to an external
/// issuer: the operator sets those of the certificates that it signs itself.
#[derive(Debug)]
pub struct SigningRequest {
    key: SubjectPublicKeyInfo,
    der: Vec<u8>,
    sole_name: Option<String>,
}

/// Why no certificate can be issued for a request.
#[derive(Clone, Debug, Eq, Error, PartialEq)]
pub enum RequestError {
    /// No PEM block, a block of another type, or a block without a request.
    #[error(
        "certificateSigningRequest cannot be read: expected one PEM block `CERTIFICATE REQUEST` (PKCS #10), for instance from \
         `openssl req -new -key device.key -subj /CN=device`"
    )]
    Unreadable,

    /// A kind of key or of signature that TLS 1.3 does not support.
    #[error(
        "the key or the signature of certificateSigningRequest is of an unsupported kind: expected ECDSA P-256 or P-384, Ed25519, or RSA of 2048 to 8192 bits, signed with SHA-256 or stronger"
    )]
    UnsupportedKey,

    /// An RSA key that is too small or too large.
    #[error(
        "the RSA key of certificateSigningRequest has {bits} bits: expected {MIN_RSA_BITS} to {MAX_RSA_BITS}; create a new key on the device"
    )]
    KeySize {
        /// Size of the key.
        bits: usize,
    },

    /// The request was changed after it was signed, or was signed with another key.
    #[error("the signature of certificateSigningRequest does not match its key: create the request again with the device's own key")]
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
    /// Parses a PEM text and verifies the signature.
    ///
    /// # Errors
    /// If no certificate may be issued for it.
    pub fn parse(pem: &str) -> Result<Self, RequestError> {
        Self::read(pem, true)
    }

    /// Parses a request whose signature was verified before. This takes a fraction of the time.
    ///
    /// # Errors
    /// If no certificate may be issued for it.
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

    /// The public key as `SubjectPublicKeyInfo` (DER).
    #[must_use]
    pub fn public_key(&self) -> Vec<u8> {
        self.key.subject_public_key_info()
    }

    /// The common name, if the request has no other parts of a subject and no attributes.
    #[must_use]
    pub fn sole_name(&self) -> Option<&str> {
        self.sole_name.as_deref()
    }

    /// The request as PEM, without other text.
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

/// Identifies a request: the first 64 bits of the SHA-256 of its text.
#[must_use]
pub fn digest(pem: &str) -> u64 {
    let digest: [u8; 32] = Sha256::digest(pem.trim().as_bytes()).into();
    u64::from_be_bytes(std::array::from_fn(|index| digest[index]))
}

#[cfg(test)]
#[path = "request_tests.rs"]
mod tests;
