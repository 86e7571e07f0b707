//! Passwords from users' Secrets: invalid values, and changes of the Secret.

use anyhow::{Result, ensure};
use fleetwright_e2e::client::{Listener, Session};
use fleetwright_e2e::manifest::{device, gateway, secret, with};
use fleetwright_e2e::wait::{seconds, until};
use fleetwright_e2e::{Fleet, run};
use serde_json::json;

use crate::refusal::{REFUSAL, ensure_refused};

#[test]
fn an_invalid_password_is_reported_and_affects_only_its_device() {
    run("unusable", async |fleet| {
        let huge = "p".repeat(1025);
        let bad = [("empty", ""), ("huge", huge.as_str()), ("control", "pass\u{7}word"), ("break", "password\n"), ("none", "unused")];
        let secrets = bad.map(|(name, password)| {
            let key = if name == "none" { "other" } else { "password" };
            secret(&format!("{name}-own"), &json!({key: password}))
        });
        fleet.apply_all(secrets).await?;
        let unlabelled = with(secret("hidden-own", &json!({"password": "usable"})), "/metadata/labels", json!({}));
        fleet.apply(unlabelled).await?;
        fleet.apply_all([gateway("plant-1"), device("press-1", "plant-1")]).await?;
        for name in bad.map(|(name, _)| name).into_iter().chain(["absent", "hidden"]) {
            fleet.apply(given(name)).await?;
        }
        fleet.all_ready(&["Gateway/plant-1", "Device/press-1"]).await?;
        let listener = Listener::plain(fleet.address("plant-1").await?);
        let mut bystander = Session::connect(&listener, "press-1", &fleet.password("press-1").await?).await?;
        for (name, reason) in [
            ("empty", "InvalidPassword"),
            ("huge", "InvalidPassword"),
            ("control", "InvalidPassword"),
            ("break", "InvalidPassword"),
            ("none", "SecretKeyNotFound"),
            ("absent", "SecretNotFound"),
            ("hidden", "SecretNotAllowed"),
        ] {
            let condition = fleet.condition("Device", name, "Accepted", "False", reason).await?;
            ensure!(condition.message.contains(&format!("{name}-own")), "{name}: {} does not name the Secret", condition.message);
            ensure!(!condition.message.contains("pass\u{7}word"), "the condition contains the password");
            ensure_refused(&listener, name, "password").await?;
        }

        // The operator uses a valid password without a change of the Device. A later invalid one does not disconnect the device.
        for name in ["empty", "absent"] {
            fleet.apply(secret(&format!("{name}-own"), &json!({"password": "usable"}))).await?;
            fleet.ready("Device", name).await?;
        }
        let mut session = Session::connect(&listener, "empty", "usable").await?;
        fleet.apply(secret("empty-own", &json!({"password": ""}))).await?;
        fleet.condition("Device", "empty", "Accepted", "False", "InvalidPassword").await?;
        ensure!(session.publish("devices/empty/telemetry", "{}").await? < REFUSAL, "the previous password is no longer accepted");
        Session::connect(&listener, "empty", "usable").await?;

        // A new password ends the sessions that used the old one.
        let mut session = Session::connect(&listener, "absent", "usable").await?;
        change(&fleet, "absent-own", "another").await?;
        session.ended(seconds(10)).await?;
        until(seconds(10), "the new password is accepted", async || Session::connect(&listener, "absent", "another").await).await?;
        ensure_refused(&listener, "absent", "usable").await?;
        ensure!(bystander.publish("devices/press-1/telemetry", "{}").await? < REFUSAL, "another device was affected");
        fleet.ready("Device", "absent").await.map(drop)
    });
}

/// A Device whose password is in the Secret `<name>-own`.
fn given(name: &str) -> serde_json::Value {
    let reference = json!({"password": {"secretRef": {"name": format!("{name}-own")}}});
    with(device(name, "plant-1"), "/spec/authentication", reference)
}

async fn change(fleet: &Fleet, name: &str, password: &str) -> Result<()> {
    fleet.apply(secret(name, &json!({"password": password}))).await.map(drop)
}
