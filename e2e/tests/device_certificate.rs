//! Devices with client certificates: the key stays on the device, and the certificate is in the Device's status.

use std::time::Instant;

use anyhow::{Context, Result, ensure};
use fleetwright_e2e::certificate::Authority;
use fleetwright_e2e::client::{Listener, Session, mosquitto_pub};
use fleetwright_e2e::fleet::READY_WITHIN;
use fleetwright_e2e::machine::Machine;
use fleetwright_e2e::manifest::{device_with_request, gateway, with};
use fleetwright_e2e::wait::{seconds, until};
use fleetwright_e2e::{Fleet, run};
use kube::ResourceExt;
use serde_json::{Value, json};

/// Ports of the listeners that require a certificate, and a certificate and a password.
const CERTIFICATES: u16 = 8884;
const BOTH: u16 = 8885;

/// A Gateway with these two listeners.
fn plant() -> Value {
    let listener =
        |name: &str, port: u16, authentication: &str| json!({"name": name, "port": port, "tls": {"authentication": authentication}});
    let listeners = json!([listener("certificates", CERTIFICATES, "Certificate"), listener("both", BOTH, "CertificateAndPassword")]);
    with(with(gateway("plant-1"), "/spec/listeners", listeners), "/spec/clientAuthority", json!({"secretName": "devices-ca"}))
}

#[test]
fn a_device_connects_by_certificate_and_is_disconnected_when_disabled() {
    run("by-certificate", async |fleet| {
        let (authority, machine) = (Authority::new()?, Machine::new("device").await?);
        fleet.apply_all([authority.own_secret("devices-ca"), plant(), machine.device("press-1")?]).await?;
        // An invalid request affects only its Device.
        fleet
            .apply(device_with_request(
                "press-2",
                "plant-1",
                "-----BEGIN CERTIFICATE REQUEST-----\nAAAA\n-----END CERTIFICATE REQUEST-----\n",
            ))
            .await?;
        fleet.all_ready(&["Gateway/plant-1", "Device/press-1"]).await?;
        let told = fleet.condition("Device", "press-2", "Accepted", "False", "UnreadableSigningRequest").await?;
        ensure!(told.message.contains("openssl req"), "it does not say what to do: {}", told.message);
        fleet.condition("Device", "press-2", "Stalled", "True", "UnreadableSigningRequest").await?;
        let secrets = fleet.api("Secret").list(&kube::api::ListParams::default()).await?;
        ensure!(secrets.iter().all(|secret| secret.name_any() != "press-1-credentials"), "it has a password besides");

        let serial = machine.fetch(&fleet, "press-1").await?;
        let listener = machine.listener(&fleet, CERTIFICATES).await?;
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

        // An enabled Device may use its certificate again. With another key the certificate is refused.
        fleet.change("Device", "press-1", json!({"spec": {"enabled": true}})).await?;
        fleet.ready("Device", "press-1").await?;
        mosquitto_pub(&listener, "", "", "devices/press-1/telemetry", "1").await.context("enabled again")?;
        ensure!(machine.fetch(&fleet, "press-1").await? == serial, "another certificate was issued for nothing");
        replace(&fleet, &listener).await?;
        both(&fleet, &listener).await?;
        authority_goes_and_comes(&fleet).await
    });
}

/// Replaces the machine by a new one with another key.
async fn replace(fleet: &Fleet, listener: &Listener) -> Result<()> {
    let replacement = Machine::new("device").await?;
    fleet.apply(replacement.device("press-1")?).await?;
    fleet.ready("Device", "press-1").await?;
    ensure!(mosquitto_pub(listener, "", "", "devices/press-1/telemetry", "1").await.is_err(), "the former key is accepted");
    replacement.fetch(fleet, "press-1").await?;
    let listener = Listener { identity: Some(replacement.identity()), ..listener.clone() };
    mosquitto_pub(&listener, "", "", "devices/press-1/telemetry", "1").await.context("with the new key")
}

/// A listener with `CertificateAndPassword` requires both.
async fn both(fleet: &Fleet, listener: &Listener) -> Result<()> {
    let machine = Machine::new("device").await?;
    fleet.apply(with(machine.device("press-3")?, "/spec/authentication/password", json!({}))).await?;
    fleet.ready("Device", "press-3").await?;
    machine.fetch(fleet, "press-3").await?;
    let password = fleet.password("press-3").await?;
    let listener = Listener { port: BOTH, identity: Some(machine.identity()), ..listener.clone() };
    let publish = async |password: &str| mosquitto_pub(&listener, "press-3", password, "devices/press-3/telemetry", "1").await;
    publish(&password).await.context("with both")?;
    ensure!(publish("wrong").await.is_err(), "the certificate suffices where a password is asked for as well");
    Ok(())
}

/// Deletes the CA Secret: the Gateway reports it, connected devices continue, and new Devices wait for it.
async fn authority_goes_and_comes(fleet: &Fleet) -> Result<()> {
    fleet.delete("Secret", "devices-ca").await?;
    let told = fleet.condition("Gateway", "plant-1", "ClientAuthorityValid", "False", "SecretNotFound").await?;
    ensure!(told.message.contains("devices-ca"), "it does not say what is missing: {}", told.message);
    let machine = Machine::new("device").await?;
    fleet.apply(machine.device("press-4")?).await?;
    fleet.condition("Device", "press-4", "Reconciling", "True", "ClientAuthorityUnusable").await?;
    fleet.ready("Device", "press-3").await?;
    fleet.apply(Authority::new()?.own_secret("devices-ca")).await?;
    fleet.condition("Gateway", "plant-1", "ClientAuthorityValid", "True", "ClientAuthorityUsable").await?;
    fleet.all_ready(&["Device/press-4", "Device/press-1", "Device/press-3"]).await?;
    fleet.ready("Gateway", "plant-1").await.map(drop)
}
