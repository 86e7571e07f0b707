//! TLS of clients (the trusted authorities) and of servers (a certificate that changes while they run).

use std::sync::{Arc, PoisonError, RwLock};

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, ring, verify_tls12_signature, verify_tls13_signature};
use rustls::server::{ClientHello, ResolvesServerCert};
use rustls::sign::CertifiedKey;
use rustls::{ClientConfig, DigitallySignedStruct, RootCertStore, ServerConfig, SignatureScheme};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, ServerName, UnixTime};

/// How a client verifies a server.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Verification<'a> {
    /// Its certificate by the public authorities, and its name.
    Public,
    /// Its certificate by these authorities (PEM), and its name.
    Authorities(&'a [u8]),
    /// Verifies only that the server has the key of its certificate.
    Unverified,
    /// The same, and the key has to be of this kind: a server without such a certificate refuses the handshake.
    UnverifiedOf(KeyKind),
}

/// Kind of a certificate's key. A server may have one certificate of each kind, and presents a certificate that its client can verify.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum KeyKind {
    /// RSA.
    Rsa,
    /// On a curve of NIST.
    Ecdsa,
    /// On Edwards25519.
    Ed25519,
}

impl KeyKind {
    /// All that our TLS library can verify.
    pub const ALL: [Self; 3] = [Self::Rsa, Self::Ecdsa, Self::Ed25519];

    /// The kind of key that makes such signatures.
    fn of(scheme: SignatureScheme) -> Option<Self> {
        use SignatureScheme as S;
        match scheme {
            S::RSA_PKCS1_SHA256 | S::RSA_PKCS1_SHA384 | S::RSA_PKCS1_SHA512 | S::RSA_PSS_SHA256 | S::RSA_PSS_SHA384 | S::RSA_PSS_SHA512 => {
                Some(Self::Rsa)
            }
            S::ECDSA_NISTP256_SHA256 | S::ECDSA_NISTP384_SHA384 | S::ECDSA_NISTP521_SHA512 => Some(Self::Ecdsa),
            S::ED25519 => Some(Self::Ed25519),
            _ => None,
        }
    }
}

/// Why a configuration is invalid.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// The authorities are no certificates.
    #[error("failed to read the certificates of the authorities: expected PEM")]
    ReadAuthorities(#[source] rustls_pki_types::pem::Error),

    /// There is no certificate.
    #[error("failed to find a certificate of an authority: expected PEM blocks `CERTIFICATE`")]
    FindAuthorities,

    /// The TLS library refused the settings.
    #[error("failed to set up TLS")]
    SetUp(#[from] rustls::Error),
}

/// The configuration of a client without a client certificate; TLS 1.2 or 1.3.
pub fn client_configuration(verification: Verification<'_>) -> Result<ClientConfig, TlsError> {
    let provider = Arc::new(ring::default_provider());
    let builder = ClientConfig::builder_with_provider(provider.clone()).with_safe_default_protocol_versions()?;
    let mut roots = RootCertStore::empty();
    let unverified = |kind| {
        let verifier = Arc::new(Unverified { provider: provider.clone(), kind });
        Ok(builder.clone().dangerous().with_custom_certificate_verifier(verifier).with_no_client_auth())
    };
    match verification {
        Verification::Public => roots.extend(webpki_roots::TLS_SERVER_ROOTS.iter().cloned()),
        Verification::Authorities(pem) => {
            for certificate in CertificateDer::pem_slice_iter(pem) {
                roots.add(certificate.map_err(TlsError::ReadAuthorities)?)?;
            }
            if roots.is_empty() {
                return Err(TlsError::FindAuthorities);
            }
        }
        Verification::Unverified => return unverified(None),
        Verification::UnverifiedOf(kind) => return unverified(Some(kind)),
    }
    Ok(builder.with_root_certificates(roots).with_no_client_auth())
}

/// The certificate of a server, which may be replaced at any time. New connections get the last one. Without a certificate the server
/// refuses handshakes.
#[derive(Clone, Debug, Default)]
pub struct ServedCertificate(Arc<RwLock<Option<Arc<CertifiedKey>>>>);

impl ServedCertificate {
    /// Serves this certificate from now on.
    pub fn replace(&self, certificate: CertifiedKey) {
        // The value is one pointer, so it is consistent after a panic.
        *self.0.write().unwrap_or_else(PoisonError::into_inner) = Some(Arc::new(certificate));
    }

    /// The configuration of a server with this certificate, which asks clients for none; TLS 1.2 or 1.3.
    ///
    /// # Errors
    /// If the TLS library refuses the settings.
    pub fn server_configuration(&self) -> Result<ServerConfig, TlsError> {
        let builder = ServerConfig::builder_with_provider(Arc::new(ring::default_provider())).with_safe_default_protocol_versions()?;
        Ok(builder.with_no_client_auth().with_cert_resolver(Arc::new(self.clone())))
    }
}

impl ResolvesServerCert for ServedCertificate {
    fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        self.0.read().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// Accepts any certificate, but only from a server that holds its key.
#[derive(Debug)]
struct Unverified {
    provider: Arc<CryptoProvider>,
    kind: Option<KeyKind>,
}

impl ServerCertVerifier for Unverified {
    fn verify_server_cert(
        &self,
        _end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls12_signature(message, certificate, signature, &self.provider.signature_verification_algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, certificate, signature, &self.provider.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        let mut schemes = self.provider.signature_verification_algorithms.supported_schemes();
        schemes.retain(|scheme| self.kind.is_none_or(|kind| KeyKind::of(*scheme) == Some(kind)));
        schemes
    }
}
