//! Devices that connect by certificate: keys that never leave the device, certificates that come back in the Device's status.

use std::path::PathBuf;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use fleetwright_e2e::certificate::Authority;
use fleetwright_e2e::client::{Listener, Session, mosquitto_pub};
use fleetwright_e2e::fleet::READY_WITHIN;
use fleetwright_e2e::manifest::{device, gateway, with};
use fleetwright_e2e::wait::{seconds, until};
use fleetwright_e2e::{Fleet, run};
use kube::ResourceExt;
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::process::Command;

/// Ports of the listeners for certificates, and for both.
const CERTIFICATES: u16 = 8884;
const BOTH: u16 = 8885;

/// A device's own folder: its key, its request, and what it fetches.
struct Machine(TempDir);

impl Machine {
    /// A machine makes a key, and a request that `openssl` signs with it.
    async fn new() -> Result<Self> {
        let folder = tempfile::tempdir()?;
        let mut command = Command::new("openssl");
        command.args(["req", "-new", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-subj", "/CN=device"]);
        command.args(["-keyout", "key", "-out", "request"]).current_dir(folder.path());
        ensure!(command.output().await?.status.success(), "openssl failed");
        Ok(Self(folder))
    }

    fn file(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn request(&self) -> Result<String> {
        Ok(std::fs::read_to_string(self.file("request"))?)
    }

    /// The machine fetches its certificate from the Device's status; gives the serial number.
    async fn fetch(&self, fleet: &Fleet, name: &str) -> Result<String> {
        let object = fleet.api("Device").get(name).await?;
        let certificate = object.data.pointer("/status/certificate").context("no certificate in the status")?;
        std::fs::write(self.file("certificate"), certificate["pem"].as_str().context("no pem")?)?;
        ensure!(certificate["notAfter"].is_string() && certificate["renewalTime"].is_string(), "it has no times: {certificate}");
        Ok(certificate["serialNumber"].as_str().context("no serialNumber")?.to_owned())
    }

    fn identity(&self) -> (PathBuf, PathBuf) {
        (self.file("certificate"), self.file("key"))
    }
}

fn with_request(name: &str, request: &str) -> Value {
    with(device(name, "plant-1"), "/spec/authentication", json!({"x509": {"certificateSigningRequest": request}}))
}

/// A Gateway with a listener for certificates and one for both.
fn plant() -> Value {
    let listener =
        |name: &str, port: u16, authentication: &str| json!({"name": name, "port": port, "tls": {"authentication": authentication}});
    let listeners = json!([listener("certificates", CERTIFICATES, "Certificate"), listener("both", BOTH, "CertificateAndPassword")]);
    with(with(gateway("plant-1"), "/spec/listeners", listeners), "/spec/clientAuthority", json!({"secretName": "devices-ca"}))
}

#[test]
fn a_device_connects_by_its_certificate_and_is_out_within_a_second_once_it_is_disabled() {
    run("by-certificate", async |fleet| {
        let (authority, machine) = (Authority::new()?, Machine::new().await?);
        fleet.apply_all([authority.own_secret("devices-ca"), plant(), with_request("press-1", &machine.request()?)]).await?;
        // What cannot be a request harms that Device alone.
        fleet.apply(with_request("press-2", "-----BEGIN CERTIFICATE REQUEST-----\nAAAA\n-----END CERTIFICATE REQUEST-----\n")).await?;
        fleet.all_ready(&["Gateway/plant-1", "Device/press-1"]).await?;
        let told = fleet.condition("Device", "press-2", "Accepted", "False", "UnreadableSigningRequest").await?;
        ensure!(told.message.contains("openssl req"), "it does not say what to do: {}", told.message);
        fleet.condition("Device", "press-2", "Stalled", "True", "UnreadableSigningRequest").await?;
        let secrets = fleet.api("Secret").list(&kube::api::ListParams::default()).await?;
        ensure!(secrets.iter().all(|secret| secret.name_any() != "press-1-credentials"), "it has a password besides");

        let serial = machine.fetch(&fleet, "press-1").await?;
        let trusted = tempfile::NamedTempFile::new()?;
        std::fs::write(trusted.path(), fleet.secret("plant-1-tls", "ca.crt").await?)?;
        let listener = Listener {
            host: fleet.address("plant-1").await?,
            port: CERTIFICATES,
            authority: Some(trusted.path().to_owned()),
            identity: Some(machine.identity()),
        };
        mosquitto_pub(&listener, "", "", "devices/press-1/telemetry", "1").await.context("with its certificate")?;
        let anonymous = Listener { identity: None, ..listener.clone() };
        ensure!(mosquitto_pub(&anonymous, "press-1", "x", "devices/press-1/telemetry", "1").await.is_err(), "without a certificate");

        let mut session = Session::connect(&listener, "", "").await?;
        until(READY_WITHIN, "the device is seen", async || {
            let object = fleet.api("Device").get("press-1").await?;
            ensure!(object.data.pointer("/status/connection/state") == Some(&json!("Online")), "it is not Online");
            Ok(())
        })
        .await?;
        fleet.change("Device", "press-1", json!({"spec": {"enabled": false}})).await?;
        let disabled = Instant::now();
        session.ended(seconds(10)).await?;
        println!("from the change of the Device to the end of its session: {:?}", disabled.elapsed());
        ensure!(Session::try_connect(&listener, "", "").await?.is_err(), "a disabled device connects");

        // Enabled again, its certificate counts again; with another key it does not.
        fleet.change("Device", "press-1", json!({"spec": {"enabled": true}})).await?;
        fleet.ready("Device", "press-1").await?;
        mosquitto_pub(&listener, "", "", "devices/press-1/telemetry", "1").await.context("enabled again")?;
        ensure!(machine.fetch(&fleet, "press-1").await? == serial, "another certificate was issued for nothing");
        replace(&fleet, &listener).await?;
        both(&fleet, &listener).await?;
        authority_goes_and_comes(&fleet).await
    });
}

/// A machine is replaced: the new one has another key.
async fn replace(fleet: &Fleet, listener: &Listener) -> Result<()> {
    let replacement = Machine::new().await?;
    fleet.apply(with_request("press-1", &replacement.request()?)).await?;
    fleet.ready("Device", "press-1").await?;
    ensure!(mosquitto_pub(listener, "", "", "devices/press-1/telemetry", "1").await.is_err(), "the former key is accepted");
    replacement.fetch(fleet, "press-1").await?;
    let listener = Listener { identity: Some(replacement.identity()), ..listener.clone() };
    mosquitto_pub(&listener, "", "", "devices/press-1/telemetry", "1").await.context("with the new key")
}

/// A device that has both needs both where both are asked for.
async fn both(fleet: &Fleet, listener: &Listener) -> Result<()> {
    let machine = Machine::new().await?;
    fleet.apply(with(with_request("press-3", &machine.request()?), "/spec/authentication/password", json!({}))).await?;
    fleet.ready("Device", "press-3").await?;
    machine.fetch(fleet, "press-3").await?;
    let password = fleet.password("press-3").await?;
    let listener = Listener { port: BOTH, identity: Some(machine.identity()), ..listener.clone() };
    let publish = async |password: &str| mosquitto_pub(&listener, "press-3", password, "devices/press-3/telemetry", "1").await;
    publish(&password).await.context("with both")?;
    ensure!(publish("wrong").await.is_err(), "the certificate suffices where a password is asked for as well");
    Ok(())
}

/// Without its authority the Gateway says so, who has a certificate goes on, and a new Device waits for it.
async fn authority_goes_and_comes(fleet: &Fleet) -> Result<()> {
    fleet.delete("Secret", "devices-ca").await?;
    let told = fleet.condition("Gateway", "plant-1", "ClientAuthorityValid", "False", "SecretNotFound").await?;
    ensure!(told.message.contains("devices-ca"), "it does not say what is missing: {}", told.message);
    let machine = Machine::new().await?;
    fleet.apply(with_request("press-4", &machine.request()?)).await?;
    fleet.condition("Device", "press-4", "Reconciling", "True", "ClientAuthorityUnusable").await?;
    fleet.ready("Device", "press-3").await?;
    fleet.apply(Authority::new()?.own_secret("devices-ca")).await?;
    fleet.condition("Gateway", "plant-1", "ClientAuthorityValid", "True", "ClientAuthorityUsable").await?;
    fleet.all_ready(&["Device/press-4", "Device/press-1", "Device/press-3"]).await?;
    fleet.ready("Gateway", "plant-1").await.map(drop)
}
