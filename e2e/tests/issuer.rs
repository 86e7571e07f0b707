//! Device certificates from a cert-manager issuer. Only cert-manager reads the key of the CA.

use anyhow::{Context, Result, ensure};
use fleetwright_e2e::certificate::Authority;
use fleetwright_e2e::client::mosquitto_pub;
use fleetwright_e2e::cluster::{output, start_cert_manager, start_component, stop_component};
use fleetwright_e2e::fleet::{READY_WITHIN, conditions, summary};
use fleetwright_e2e::machine::Machine;
use fleetwright_e2e::manifest::{gateway, secret, with};
use fleetwright_e2e::wait::until;
use fleetwright_e2e::{Fleet, run};
use kube::ResourceExt;
use kube::api::{ListParams, Patch, PatchParams};
use serde_json::{Value, json};
use tokio::process::Command;

/// Port of the listener that requires certificates.
const CERTIFICATES: u16 = 8884;

/// The Secret with the CA and its key, which only cert-manager reads, and the Secret with the trusted certificates.
const AUTHORITY: &str = "authority";
const TRUSTED: &str = "trusted";

/// Reasons of a Device's `Ready`, and of `Accepted` where the Device itself is the cause.
const AWAITING_ISSUER: &str = "AwaitingIssuer";
const DENIED: &str = "CertificateDenied";
const OTHER_NAME: &str = "CommonNameMismatch";

/// A Gateway whose device certificates come from the issuer `devices`, and the Secret with the certificates that its broker trusts.
fn plant(authority: &Authority) -> Result<[Value; 2]> {
    let listener = json!({"name": "certificates", "port": CERTIFICATES, "tls": {"authentication": "Certificate"}});
    let client_authority = json!({"issuerRef": {"name": "devices"}, "secretName": TRUSTED});
    let gateway = with(with(gateway("plant-1"), "/spec/listeners", json!([listener])), "/spec/clientAuthority", client_authority);
    Ok([secret(TRUSTED, &json!({"ca.crt": std::fs::read_to_string(authority.file())?})), gateway])
}

/// An issuer that signs with the CA in a Secret.
fn issuer() -> Value {
    let metadata = json!({"name": "devices"});
    json!({"apiVersion": "cert-manager.io/v1", "kind": "Issuer", "metadata": metadata, "spec": {"ca": {"secretName": AUTHORITY}}})
}

async fn no_request_is_left(fleet: &Fleet) -> Result<()> {
    until(READY_WITHIN, "no CertificateRequest is left", async || {
        let left = fleet.api("CertificateRequest").list(&ListParams::default()).await?;
        ensure!(left.items.is_empty(), "there are {:?}", left.iter().map(ResourceExt::name_any).collect::<Vec<_>>());
        Ok(())
    })
    .await
}

/// Waits until a Device is not Ready for this reason, with a message that contains `word`.
async fn waits(fleet: &Fleet, name: &str, reason: &str, word: &str) -> Result<()> {
    until(READY_WITHIN, format!("Device {name} waits with {reason} for {word}"), async || {
        let object = fleet.api("Device").get(name).await?;
        let told = conditions(&object).into_iter().find(|condition| condition.type_ == "Ready");
        let holds = told.is_some_and(|told| told.status == "False" && told.reason == reason && told.message.contains(word));
        ensure!(holds, "it is {}", summary(&object));
        Ok(())
    })
    .await
}

/// Reads the certificate of the Device and publishes with it.
async fn publishes(fleet: &Fleet, machine: &Machine, name: &str) -> Result<()> {
    fleet.ready("Device", name).await?;
    machine.fetch(fleet, name).await?;
    let listener = machine.listener(fleet, CERTIFICATES).await?;
    mosquitto_pub(&listener, "", "", &format!("devices/{name}/telemetry"), "1").await
}

#[test]
fn a_device_gets_its_certificate_from_a_cert_manager_issuer() {
    run("issuer", async |fleet| {
        start_cert_manager().await?;
        let (authority, machine) = (Authority::new()?, Machine::new("press-1").await?);
        fleet.apply_all(plant(&authority)?).await?;
        fleet.apply(machine.device("press-1")?).await?;
        waits(&fleet, "press-1", AWAITING_ISSUER, "not found").await?;
        // An issuer without its Secret is not ready.
        fleet.apply(issuer()).await?;
        waits(&fleet, "press-1", AWAITING_ISSUER, "Ready").await?;
        fleet.apply(authority.own_secret(AUTHORITY)).await?;
        publishes(&fleet, &machine, "press-1").await.context("with the certificate from the issuer")?;
        let mut verify = Command::new("openssl");
        verify.args(["verify", "-purpose", "sslclient", "-CAfile"]).arg(authority.file()).arg(machine.identity().0);
        output(&mut verify).await.context("it is not from this authority, or not for clients")?;
        no_request_is_left(&fleet).await?;
        other_name(&fleet).await?;
        denied(&fleet).await
    });
}

/// The issuer copies the name from the request, so the operator must not forward a request with another device's name.
async fn other_name(fleet: &Fleet) -> Result<()> {
    fleet.apply(Machine::new("press-1").await?.device("press-2")?).await?;
    let told = fleet.condition("Device", "press-2", "Accepted", "False", OTHER_NAME).await?;
    ensure!(told.message.contains("CN=press-2"), "it does not say what to do: {}", told.message);
    let refused = fleet.api("Device").get("press-2").await?;
    ensure!(refused.data.pointer("/status/certificate/pem").is_none(), "it has a certificate");
    let requests = fleet.api("CertificateRequest").list(&ListParams::default()).await?;
    ensure!(requests.items.is_empty(), "the issuer was asked for another device's name");
    fleet.apply(Machine::new("press-2").await?.device("press-2")?).await?;
    fleet.ready("Device", "press-2").await?;
    no_request_is_left(fleet).await
}

/// A denied request is reported, and created again after it is deleted.
async fn denied(fleet: &Fleet) -> Result<()> {
    let machine = Machine::new("press-3").await?;
    // Stops the approver, which approves each new request.
    stop_component("cert-manager").await?;
    let outcome = deny(fleet, machine.device("press-3")?).await;
    start_component("cert-manager").await?;
    let request = outcome?;
    waits(fleet, "press-3", DENIED, &request).await?;
    fleet.delete("CertificateRequest", &request).await?;
    publishes(fleet, &machine, "press-3").await.context("with the certificate of the second request")?;
    no_request_is_left(fleet).await
}

/// Denies the first request for a Device, like `cmctl deny`, and returns its name.
async fn deny(fleet: &Fleet, device: Value) -> Result<String> {
    fleet.apply(device).await?;
    let name = until(READY_WITHIN, "a CertificateRequest is made", async || {
        let made = fleet.api("CertificateRequest").list(&ListParams::default()).await?;
        made.items.first().map(ResourceExt::name_any).context("there is none")
    })
    .await?;
    let denied = json!({"type": "Denied", "status": "True", "reason": "NotInInventory", "message": "no such machine was bought"});
    let patch = Patch::Merge(json!({"status": {"conditions": [denied]}}));
    fleet.api("CertificateRequest").patch_status(&name, &PatchParams::default(), &patch).await?;
    Ok(name)
}
