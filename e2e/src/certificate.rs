//! Certificate authorities of tests, and the certificates that a listener presents to OpenSSL.

use std::path::PathBuf;

use anyhow::{Context, Result};
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, DnType, IsCa, KeyPair};
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::process::Command;

use crate::client::Listener;
use crate::cluster::output;

/// A certificate authority, with its certificate in a file for clients.
pub struct Authority {
    issuer: CertifiedIssuer<'static, KeyPair>,
    folder: TempDir,
}

impl Authority {
    /// Creates an authority with a new key.
    pub fn new() -> Result<Self> {
        let mut parameters = CertificateParams::default();
        parameters.distinguished_name.push(DnType::CommonName, "end-to-end tests");
        parameters.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let issuer = CertifiedIssuer::self_signed(parameters, KeyPair::generate()?)?;
        let folder = tempfile::tempdir()?;
        std::fs::write(folder.path().join("ca.crt"), issuer.pem())?;
        Ok(Self { issuer, folder })
    }

    /// File with the certificate of the authority.
    #[must_use]
    pub fn file(&self) -> PathBuf {
        self.folder.path().join("ca.crt")
    }

    /// Secret of type `kubernetes.io/tls` with the certificate and the key of the authority.
    #[must_use]
    pub fn own_secret(&self, name: &str) -> Value {
        json!({
            "apiVersion": "v1", "kind": "Secret", "type": "kubernetes.io/tls", "metadata": {"name": name},
            "stringData": {"tls.crt": self.issuer.pem(), "tls.key": self.issuer.key().serialize_pem()},
        })
    }

    /// Secret of type `kubernetes.io/tls` with a new certificate for a host name.
    pub fn secret(&self, name: &str, host: &str) -> Result<Value> {
        self.secret_until(name, host, 2040)
    }

    /// As [`Self::secret`], with a certificate that expires at the beginning of `year`.
    pub fn secret_until(&self, name: &str, host: &str, year: i32) -> Result<Value> {
        let key = KeyPair::generate()?;
        let mut parameters = CertificateParams::new(vec![host.to_owned()])?;
        parameters.not_after = rcgen::date_time_ymd(year, 1, 1);
        let certificate = parameters.signed_by(&key, &self.issuer)?;
        Ok(json!({
            "apiVersion": "v1", "kind": "Secret", "type": "kubernetes.io/tls", "metadata": {"name": name},
            "stringData": {"tls.crt": certificate.pem(), "tls.key": key.serialize_pem()},
        }))
    }
}

/// SHA-256 (hexadecimal digits) of the server certificate that a listener presents to `openssl s_client`. The client trusts only the
/// listener's authority and verifies the host name.
pub async fn presented(listener: &Listener) -> Result<String> {
    listener.reach().await?;
    let address = format!("{}:{}", listener.host, listener.port);
    let mut command = Command::new("openssl");
    command.args(["s_client", "-connect", &address, "-servername", &listener.host, "-verify_hostname", &listener.host]);
    command.arg("-verify_return_error").arg("-CAfile").arg(listener.authority.as_ref().context("a plain listener")?);
    fingerprint(&output(&mut command).await?).await
}

/// SHA-256 (hexadecimal digits) of the first certificate in a PEM text.
pub async fn fingerprint(pem: &str) -> Result<String> {
    let file = tempfile::NamedTempFile::new()?;
    std::fs::write(file.path(), pem)?;
    let printed = output(Command::new("openssl").args(["x509", "-noout", "-fingerprint", "-sha256", "-in"]).arg(file.path())).await?;
    let (_, digits) = printed.trim().split_once('=').with_context(|| format!("openssl printed {printed:?}"))?;
    Ok(digits.replace(':', "").to_lowercase())
}
