//! A certificate authority of a test's own, and what a listener presents to a client that is not ours.

use std::path::PathBuf;

use anyhow::{Context, Result};
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, DnType, IsCa, KeyPair};
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::process::Command;

use crate::client::Listener;
use crate::cluster::output;

/// An authority, whose own certificate lies in a file for clients.
pub struct Authority {
    issuer: CertifiedIssuer<'static, KeyPair>,
    folder: TempDir,
}

impl Authority {
    /// A fresh one.
    pub fn new() -> Result<Self> {
        let mut parameters = CertificateParams::default();
        parameters.distinguished_name.push(DnType::CommonName, "end-to-end tests");
        parameters.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let issuer = CertifiedIssuer::self_signed(parameters, KeyPair::generate()?)?;
        let folder = tempfile::tempdir()?;
        std::fs::write(folder.path().join("ca.crt"), issuer.pem())?;
        Ok(Self { issuer, folder })
    }

    /// File with the authority's certificate.
    #[must_use]
    pub fn file(&self) -> PathBuf {
        self.folder.path().join("ca.crt")
    }

    /// A Secret of type `kubernetes.io/tls` with the authority itself, and its key.
    #[must_use]
    pub fn own_secret(&self, name: &str) -> Value {
        json!({
            "apiVersion": "v1", "kind": "Secret", "type": "kubernetes.io/tls", "metadata": {"name": name},
            "stringData": {"tls.crt": self.issuer.pem(), "tls.key": self.issuer.key().serialize_pem()},
        })
    }

    /// A Secret of type `kubernetes.io/tls` with a fresh certificate for a host name.
    pub fn secret(&self, name: &str, host: &str) -> Result<Value> {
        self.secret_until(name, host, 2040)
    }

    /// The same; it expires with the first day of `year`.
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

/// SHA-256 (hexadecimal digits) of the leaf that a listener presents to `openssl s_client`, which trusts the listener's authority
/// alone and verifies the host name.
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
