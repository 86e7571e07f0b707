//! The authority that signs the certificates of devices, from a Secret of the user, and what it issues.

use std::fmt;
use std::sync::Arc;

use jiff::{SignedDuration, Timestamp};
use rcgen::{
    CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose, PublicKeyData,
    SerialNumber, SignatureAlgorithm,
};
use rustls::SignatureScheme;
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer};
use sha2::{Digest, Sha256};
use thiserror::Error;
use x509_cert::Certificate;
use x509_cert::der::{Decode, Encode};
use x509_cert::ext::pkix::{BasicConstraints, KeyUsage, KeyUsages};

use super::request::SigningRequest;
use super::server::{CertificateError, ServerCertificate, issued_by};
use super::set_validity;

/// A certificate is valid from this long before it was issued: a device's clock may be behind.
const CLOCK_SKEW: SignedDuration = SignedDuration::from_mins(10);

/// Signs the certificates of devices.
pub struct ClientAuthority {
    issuer: Issuer<'static, AuthorityKey>,
    /// As PEM: the certificate that signs, then what else the Secret holds.
    trusted: String,
    fingerprint: u64,
    not_before: Timestamp,
    not_after: Timestamp,
}

/// Why the authority in a Secret cannot sign.
#[derive(Debug, Error)]
pub enum AuthorityError {
    /// The pair cannot be used at all.
    #[error(transparent)]
    Certificate(#[from] CertificateError),

    /// An ordinary certificate.
    #[error("the first certificate is not a certificate authority (basicConstraints CA:TRUE): put the client CA's own certificate there")]
    NotAnAuthority,

    /// A certificate that may not sign certificates.
    #[error("the first certificate may not sign certificates (its keyUsage lacks keyCertSign): issue the client CA again with it")]
    KeyUsage,

    /// Brokers trust roots alone.
    #[error(
        "neither tls.crt nor ca.crt holds the root of the client CA (a certificate signed by itself), and brokers accept no chain that \
         ends before: put it into ca.crt"
    )]
    NoRoot,

    /// The additional trusted certificates.
    #[error("ca.crt cannot be read: expected PEM blocks `CERTIFICATE`")]
    ParseTrusted,

    /// A key that signs in no way that is known here.
    #[error("the key of the client CA is of a kind that is not accepted: expected ECDSA P-256 or P-384, Ed25519, or RSA")]
    UnsupportedKey,

    /// A subject that would not stand in certificates as it stands here.
    #[error(
        "the subject of the client CA cannot be repeated exactly in what it issues: issue the CA again with a simple subject, for instance CN alone"
    )]
    UnsupportedSubject,
}

/// An issued certificate.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Issued {
    /// The certificate, as PEM.
    pub pem: String,
    /// Its serial number.
    pub serial: Serial,
    /// Valid from here on.
    pub not_before: Timestamp,
    /// Valid up to here.
    pub not_after: Timestamp,
}

/// The serial number of a certificate that was issued here: 63 random bits, so that none is ever given twice.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct Serial(u64);

impl Serial {
    /// A new one. RFC 5280 section 4.1.2.2: positive.
    #[must_use]
    pub fn generate() -> Self {
        Self((rand::random::<u64>() >> 1).max(1))
    }

    fn number(self) -> SerialNumber {
        SerialNumber::from(self.0)
    }
}

impl fmt::Display for Serial {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{:016x}", self.0)
    }
}

impl ClientAuthority {
    /// The authority of a Secret: `certificates` of `tls.crt`, the one that signs first, `key` of `tls.key`, and what is trusted besides,
    /// of `ca.crt`.
    ///
    /// # Errors
    /// When it cannot sign, now or ever.
    pub fn parse(certificates: &[u8], key: &[u8], trusted: Option<&[u8]>, now: Timestamp) -> Result<Self, AuthorityError> {
        let pair = ServerCertificate::parse(certificates, key)?;
        pair.check_time(now)?;
        let first = CertificateDer::from_pem_slice(certificates).map_err(|_| CertificateError::NoCertificate)?;
        let parsed =
            Certificate::from_der(&first).map_err(|source| CertificateError::ParseCertificate { position: 1, source: source.into() })?;
        check_usage(&parsed)?;
        let private = PrivateKeyDer::from_pem_slice(key).map_err(|_| CertificateError::NoKey)?;
        let key = AuthorityKey::new(&private, &parsed)?;
        let issuer = Issuer::from_ca_cert_der(&first, key).map_err(|_| AuthorityError::UnsupportedSubject)?;
        let authority = Self {
            issuer,
            trusted: trusted_certificates(certificates, trusted.unwrap_or_default())?,
            fingerprint: authority_fingerprint(&parsed),
            not_before: pair.not_before,
            not_after: pair.not_after,
        };
        authority.repeats_subject(&parsed)?;
        Ok(authority)
    }

    /// What a client must see as issuer is what the authority calls itself, to the byte.
    fn repeats_subject(&self, own: &Certificate) -> Result<(), AuthorityError> {
        let unsupported = |_| AuthorityError::UnsupportedSubject;
        let key = KeyPair::generate().map_err(unsupported)?;
        let issued = CertificateParams::default().signed_by(&key, &self.issuer).map_err(unsupported)?;
        let issued = Certificate::from_der(issued.der()).map_err(|_| AuthorityError::UnsupportedSubject)?;
        let bytes = |name: &x509_cert::name::Name| name.to_der().ok();
        if bytes(&issued.tbs_certificate.issuer) == bytes(&own.tbs_certificate.subject) {
            Ok(())
        } else {
            Err(AuthorityError::UnsupportedSubject)
        }
    }

    /// Issues a certificate with this common name, valid for so long, or as long as the authority itself.
    ///
    /// # Errors
    /// If the key cannot sign.
    pub fn issue(
        &self,
        common_name: &str,
        request: &SigningRequest,
        validity: SignedDuration,
        now: Timestamp,
    ) -> Result<Issued, rcgen::Error> {
        let (not_before, not_after) = (whole_seconds(now - CLOCK_SKEW), self.end(now, validity));
        let serial = Serial::generate();
        let mut parameters = CertificateParams::default();
        parameters.distinguished_name = DistinguishedName::new();
        parameters.distinguished_name.push(DnType::CommonName, common_name);
        parameters.is_ca = IsCa::ExplicitNoCa;
        parameters.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        parameters.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
        parameters.use_authority_key_identifier_extension = true;
        parameters.serial_number = Some(serial.number());
        set_validity(&mut parameters, not_before, not_after);
        let certificate = parameters.signed_by(request.key(), &self.issuer)?;
        Ok(Issued { pem: certificate.pem(), serial, not_before, not_after })
    }

    /// Up to when a certificate that is issued now is valid.
    #[must_use]
    pub fn end(&self, now: Timestamp, validity: SignedDuration) -> Timestamp {
        whole_seconds(now.checked_add(validity).unwrap_or(Timestamp::MAX).min(self.not_after))
    }

    /// The certificates with which a broker checks those that were issued, as PEM.
    #[must_use]
    pub fn trusted(&self) -> &str {
        &self.trusted
    }

    /// Tells one authority from another: the first 64 bits of the SHA-256 of its name and its key. With a renewed certificate it is
    /// the same one, and what it issued goes on being accepted.
    #[must_use]
    pub const fn fingerprint(&self) -> u64 {
        self.fingerprint
    }

    /// Valid from here on.
    #[must_use]
    pub const fn not_before(&self) -> Timestamp {
        self.not_before
    }

    /// Valid up to here.
    #[must_use]
    pub const fn not_after(&self) -> Timestamp {
        self.not_after
    }
}

impl fmt::Debug for ClientAuthority {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("ClientAuthority").field("not_after", &self.not_after).finish_non_exhaustive()
    }
}

fn whole_seconds(time: Timestamp) -> Timestamp {
    Timestamp::from_second(time.as_second()).unwrap_or(time)
}

/// The identity of an authority: see [`ClientAuthority::fingerprint`].
pub(super) fn authority_fingerprint(certificate: &Certificate) -> u64 {
    let certificate = &certificate.tbs_certificate;
    // A parsed name can always be encoded.
    let mut hasher = Sha256::new();
    hasher.update(certificate.subject.to_der().unwrap_or_default());
    hasher.update(certificate.subject_public_key_info.to_der().unwrap_or_default());
    let digest: [u8; 32] = hasher.finalize().into();
    u64::from_be_bytes(std::array::from_fn(|index| digest[index]))
}

/// The certificates of both, each once, as PEM; among them a root.
pub(super) fn trusted_certificates(certificates: &[u8], more: &[u8]) -> Result<String, AuthorityError> {
    let mut trusted: Vec<CertificateDer<'_>> = Vec::new();
    let mut rooted = false;
    for der in CertificateDer::pem_slice_iter(certificates).chain(CertificateDer::pem_slice_iter(more)) {
        let der = der.map_err(|_| AuthorityError::ParseTrusted)?;
        let certificate = Certificate::from_der(&der).map_err(|_| AuthorityError::ParseTrusted)?;
        rooted |= issued_by(&certificate, &certificate);
        if !trusted.contains(&der) {
            trusted.push(der);
        }
    }
    if !rooted {
        return Err(AuthorityError::NoRoot);
    }
    let format = pem::EncodeConfig::new().set_line_ending(pem::LineEnding::LF);
    Ok(trusted.iter().map(|der| pem::encode_config(&pem::Pem::new("CERTIFICATE", der.as_ref()), format)).collect())
}

pub(super) fn check_usage(certificate: &Certificate) -> Result<(), AuthorityError> {
    let constraints = certificate.tbs_certificate.get::<BasicConstraints>().ok().flatten();
    if !constraints.is_some_and(|(_, constraints)| constraints.ca) {
        return Err(AuthorityError::NotAnAuthority);
    }
    // RFC 5280: where the extension is missing, everything is allowed.
    let usage = certificate.tbs_certificate.get::<KeyUsage>().ok().flatten();
    if usage.is_some_and(|(_, usage)| !usage.0.contains(KeyUsages::KeyCertSign)) {
        return Err(AuthorityError::KeyUsage);
    }
    Ok(())
}

/// The authority's private key. Any encoding that a TLS Secret may have: what `openssl` and cert-manager write.
struct AuthorityKey {
    key: Arc<dyn rustls::sign::SigningKey>,
    algorithm: &'static SignatureAlgorithm,
    scheme: SignatureScheme,
    public: Vec<u8>,
}

impl AuthorityKey {
    fn new(private: &PrivateKeyDer<'_>, certificate: &Certificate) -> Result<Self, AuthorityError> {
        let key = rustls::crypto::ring::sign::any_supported_type(private).map_err(|_| AuthorityError::UnsupportedKey)?;
        let (scheme, algorithm) = [
            (SignatureScheme::ECDSA_NISTP256_SHA256, &rcgen::PKCS_ECDSA_P256_SHA256),
            (SignatureScheme::ECDSA_NISTP384_SHA384, &rcgen::PKCS_ECDSA_P384_SHA384),
            (SignatureScheme::ED25519, &rcgen::PKCS_ED25519),
            (SignatureScheme::RSA_PKCS1_SHA256, &rcgen::PKCS_RSA_SHA256),
        ]
        .into_iter()
        .find(|(scheme, _)| key.choose_scheme(&[*scheme]).is_some())
        .ok_or(AuthorityError::UnsupportedKey)?;
        let public = certificate.tbs_certificate.subject_public_key_info.subject_public_key.raw_bytes().to_vec();
        Ok(Self { key, algorithm, scheme, public })
    }
}

impl PublicKeyData for AuthorityKey {
    fn der_bytes(&self) -> &[u8] {
        &self.public
    }

    fn algorithm(&self) -> &'static SignatureAlgorithm {
        self.algorithm
    }
}

impl rcgen::SigningKey for AuthorityKey {
    fn sign(&self, message: &[u8]) -> Result<Vec<u8>, rcgen::Error> {
        let signer = self.key.choose_scheme(&[self.scheme]).ok_or(rcgen::Error::RemoteKeyError)?;
        signer.sign(message).map_err(|_| rcgen::Error::RemoteKeyError)
    }
}

#[cfg(test)]
#[path = "client_tests.rs"]
mod tests;
