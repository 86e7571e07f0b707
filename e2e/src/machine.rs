//! A machine that authenticates with a client certificate.

use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use tempfile::TempDir;
use tokio::process::Command;

use crate::Fleet;
use crate::client::Listener;
use crate::cluster::output;
use crate::manifest::device_with_request;

/// Folder with the machine's key, request and certificate.
pub struct Machine(TempDir);

impl Machine {
    /// Creates a key, and a request for `name` that `openssl` signs with the key.
    pub async fn new(common_name: &str) -> Result<Self> {
        let folder = tempfile::tempdir()?;
        let mut command = Command::new("openssl");
        command.args(["req", "-new", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"]);
        command.args(["-subj", &format!("/CN={common_name}"), "-keyout", "key", "-out", "request"]).current_dir(folder.path());
        output(&mut command).await?;
        Ok(Self(folder))
    }

    fn file(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// A Device of the Gateway `plant-1` with the request of this machine.
    pub fn device(&self, name: &str) -> Result<Value> {
        Ok(device_with_request(name, "plant-1", &std::fs::read_to_string(self.file("request"))?))
    }

    /// Reads the certificate from the Device's status and returns its serial number.
    pub async fn fetch(&self, fleet: &Fleet, name: &str) -> Result<String> {
        let object = fleet.api("Device").get(name).await?;
        let certificate = object.data.pointer("/status/certificate").context("no certificate in the status")?;
        std::fs::write(self.file("certificate"), certificate["pem"].as_str().context("no pem")?)?;
        ensure!(certificate["notAfter"].is_string() && certificate["renewalTime"].is_string(), "the status has no times: {certificate}");
        Ok(certificate["serialNumber"].as_str().context("no serialNumber")?.to_owned())
    }

    /// The listener of the Gateway `plant-1` on this port, with the machine's certificate and the CA that it trusts.
    pub async fn listener(&self, fleet: &Fleet, port: u16) -> Result<Listener> {
        let trusted = self.file("trusted");
        std::fs::write(&trusted, fleet.secret("plant-1-tls", "ca.crt").await?)?;
        Ok(Listener { host: fleet.address("plant-1").await?, port, authority: Some(trusted), identity: Some(self.identity()) })
    }

    /// Files with the machine's certificate and key.
    #[must_use]
    pub fn identity(&self) -> (PathBuf, PathBuf) {
        (self.file("certificate"), self.file("key"))
    }
}
