//! Server certificates of the broker, issued by the operator or from a Secret, and their renewal under load.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Context, Result, ensure};
use fleetwright_e2e::certificate::{Authority, fingerprint, presented};
use fleetwright_e2e::client::{Listener, Session, mosquitto_pub};
use fleetwright_e2e::fleet::READY_WITHIN;
use fleetwright_e2e::manifest::{device, gateway, with};
use fleetwright_e2e::publisher::Publisher;
use fleetwright_e2e::wait::{seconds, until};
use fleetwright_e2e::{Fleet, run};
use serde_json::{Value, json};
use tempfile::NamedTempFile;

/// Readings per second, and the readings to be acknowledged before and after the renewal.
const RATE: f64 = 50.0;
const AROUND: usize = 100;

/// Maximum time until a subscriber receives a message that was acknowledged to its publisher.
const DELIVERED_WITHIN: std::time::Duration = seconds(20);

#[test]
fn a_listener_without_a_secret_has_a_certificate_that_devices_verify() {
    run("issued", async |fleet| {
        fleet.apply_all([with(gateway("plant-1"), "/spec/listeners", listeners(&json!({}))), device("press-1", "plant-1")]).await?;
        fleet.all_ready(&["Gateway/plant-1", "Device/press-1"]).await?;
        let trusted = trusted(&fleet).await?;
        let listener = Listener::tls(fleet.address("plant-1").await?, trusted.path());
        let password = fleet.password("press-1").await?;
        let publish = async || mosquitto_pub(&listener, "press-1", &password, "devices/press-1/telemetry", "1").await;
        publish().await.context("a device that trusts ca.crt")?;
        let first = shown(&fleet, &listener).await?;

        // A device with another CA refuses the broker.
        let other = Listener::tls(&listener.host, &Authority::new()?.file());
        ensure!(presented(&other).await.is_err(), "a client that trusts another authority accepts the broker");

        // The CA outlives the server certificates, so devices need no new CA.
        fleet.delete("Secret", "plant-1-tls").await?;
        let second = until(READY_WITHIN, "another certificate is presented", async || {
            let now = shown(&fleet, &listener).await?;
            ensure!(now != first, "it is the first one");
            Ok(now)
        })
        .await?;
        ensure!(fingerprint(&fleet.secret("plant-1-tls", "tls.crt").await?).await? == second, "the Secret holds another certificate");
        publish().await.context("a device that trusts ca.crt of before")?;
        fleet.ready("Gateway", "plant-1").await.map(drop)
    });
}

#[test]
fn the_broker_loads_a_renewed_certificate_and_rejects_an_invalid_one() {
    run("renewed", async |fleet| {
        let authority = Authority::new()?;
        let host = format!("plant-1.{}.svc", fleet.namespace);
        let acls = json!([{"topic": "devices/press-1/telemetry", "access": "Read"}]);
        fleet.apply(authority.secret_until("plant-1-tls", &host, 2040)?).await?;
        fleet.apply(with(gateway("plant-1"), "/spec/listeners", listeners(&json!({"secretName": "plant-1-tls"})))).await?;
        fleet.apply(device("press-1", "plant-1")).await?;
        fleet.apply(with(device("panel", "plant-1"), "/spec/authorization", json!({"acls": acls}))).await?;
        fleet.all_ready(&["Gateway/plant-1", "Device/press-1", "Device/panel"]).await?;
        let listener = Listener::tls(&host, &authority.file());
        let first = shown(&fleet, &listener).await?;
        ensure!(certificate(&fleet).await?["notAfter"] == "2040-01-01T00:00:00Z", "status has another time");

        let mut panel = Session::connect(&listener, "panel", &fleet.password("panel").await?).await?;
        ensure!(panel.subscribe("devices/press-1/telemetry").await? <= 1, "not subscribed");
        let devices = BTreeMap::from([("press-1".to_owned(), fleet.password("press-1").await?)]);
        let publisher = Publisher::start(&listener, &devices, RATE).await?;
        publisher.more(AROUND).await?;
        fleet.apply(authority.secret_until("plant-1-tls", &host, 2041)?).await?;
        let second = until(READY_WITHIN, "the renewed certificate is presented", async || {
            let now = shown(&fleet, &listener).await?;
            ensure!(now != first, "it is the first one");
            Ok(now)
        })
        .await?;
        ensure!(certificate(&fleet).await?["notAfter"] == "2041-01-01T00:00:00Z", "status has another time");
        publisher.more(AROUND).await?;
        ensure!(publisher.connections() == 1, "the publisher had to connect again");
        let acknowledged: BTreeSet<i64> = publisher.stop().await?.into_iter().map(|(_, time)| time).collect();
        // The publisher still has its first session: a lost session is an error in this test.
        let mut delivered = BTreeSet::new();
        while !acknowledged.is_subset(&delivered) {
            let message = panel.message(DELIVERED_WITHIN).await.context("a message was missed")?;
            let (_, payload) = message.split_once(' ').context("a message without a payload")?;
            delivered.extend(serde_json::from_str::<Value>(payload)?["value"].as_i64());
        }
        fleet.ready("Gateway", "plant-1").await?;

        refuses_a_bad_one(&fleet, &authority, &listener, &second).await
    });
}

async fn refuses_a_bad_one(fleet: &Fleet, authority: &Authority, listener: &Listener, good: &str) -> Result<()> {
    let (mut mixed, other) = (authority.secret("plant-1-tls", &listener.host)?, authority.secret("plant-1-tls", &listener.host)?);
    mixed["stringData"]["tls.key"] = other["stringData"]["tls.key"].clone();
    fleet.apply(mixed).await?;
    let told = fleet.condition("Gateway", "plant-1", "CertificateValid", "False", "InvalidCertificate").await?;
    ensure!(told.message.contains("plant-1-tls") && told.message.contains("tls.key"), "it does not say what to mend: {}", told.message);
    fleet.condition("Gateway", "plant-1", "Ready", "False", "InvalidCertificate").await?;
    ensure!(presented(listener).await? == good, "the good certificate is not presented any more");
    ensure!(certificate(fleet).await?["sha256"] == good, "status tells of another certificate");
    fleet.event("Gateway", "plant-1", "Warning", "InvalidCertificate").await?;
    // After the correction, no other action is needed.
    fleet.apply(other).await?;
    fleet.condition("Gateway", "plant-1", "CertificateValid", "True", "CertificateProven").await?;
    fleet.ready("Gateway", "plant-1").await.map(drop)
}

fn listeners(tls: &Value) -> Value {
    json!([{"name": "mqtts", "port": 8883, "tls": tls}])
}

/// Writes the CA certificate for devices to a file.
async fn trusted(fleet: &Fleet) -> Result<NamedTempFile> {
    let file = NamedTempFile::new()?;
    std::fs::write(file.path(), fleet.secret("plant-1-tls", "ca.crt").await?)?;
    Ok(file)
}

/// The certificate in the Gateway's status.
async fn certificate(fleet: &Fleet) -> Result<Value> {
    let object = fleet.api("Gateway").get("plant-1").await?;
    object.data.pointer("/status/certificate").cloned().context("the Gateway's status has no certificate")
}

/// SHA-256 of the certificate that the listener presents, when it is the one in the Gateway's status.
async fn shown(fleet: &Fleet, listener: &Listener) -> Result<String> {
    until(seconds(10), "status tells what is presented", async || {
        let (presented, told) = (presented(listener).await?, certificate(fleet).await?);
        ensure!(told["sha256"] == presented.as_str(), "presented is {presented}, status has {told}");
        ensure!(told["notAfter"].is_string() && told["secretName"] == "plant-1-tls", "status has {told}");
        Ok(presented)
    })
    .await
}
