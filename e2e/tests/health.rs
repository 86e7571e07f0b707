//! The health of objects in Flux, Helm and Argo CD, in every state of an object.

use std::collections::BTreeMap;

use anyhow::{Result, bail, ensure};
use fleetwright_e2e::fleet::{is_ready, summary};
use fleetwright_e2e::health::judge;
use fleetwright_e2e::manifest::{device, gateway, pipeline, with};
use fleetwright_e2e::wait::{seconds, until};
use fleetwright_e2e::{Fleet, run};
use futures::StreamExt;
use kube::ResourceExt;
use kube::api::{DynamicObject, WatchEvent, WatchParams};
use serde_json::json;
use tokio::sync::mpsc;

const OBJECTS: [(&str, &str); 3] = [("Gateway", "plant-1"), ("Device", "press-1"), ("Pipeline", "readings")];

#[test]
fn no_tool_reports_an_object_as_healthy_before_it_is_ready() {
    run("health", async |fleet| {
        let states = watch(&fleet);
        fleet.database().await?;
        let fresh = [pipeline("readings"), device("press-1", "plant-1"), gateway("plant-1")];
        for object in fresh {
            let applied = fleet.apply(object).await?;
            let health = judge(&applied).await?;
            ensure!(!health.is_healthy_to_anyone(), "fresh, it is {health:?}: {}", summary(&applied));
        }
        ready_and_healthy(&fleet).await?;
        // While a change is applied, the status describes the old generation only.
        let acls = json!([{"topic": "lines/#", "access": "Write"}]);
        for (kind, name, change) in [
            ("Device", "press-1", json!({"spec": {"authorization": {"acls": acls}}})),
            ("Gateway", "plant-1", json!({"spec": {"limits": {"maxConnections": 10}}})),
            (
                "Pipeline",
                "readings",
                json!({"spec": {"decode": {"fields": [{"name": "value", "type": "Float64"}, {"name": "more", "type": "Text"}]}}}),
            ),
        ] {
            let changed = fleet.change(kind, name, change).await?;
            let health = judge(&changed).await?;
            ensure!(!health.is_healthy_to_anyone(), "just changed, it is {health:?}: {}", summary(&changed));
        }
        ready_and_healthy(&fleet).await?;
        judge_all(states).await
    });
}

#[test]
fn an_object_that_needs_a_spec_change_has_failed_until_it_is_changed() {
    run("stalled", async |fleet| {
        let states = watch(&fleet);
        fleet.database().await?;
        // The capture and the field would be the same column, which the schema cannot reject.
        let twice = with(pipeline("readings"), "/spec/source/topic", "devices/{device}/{value}".into());
        fleet.apply_all([gateway("plant-1"), device("press-1", "plant-1"), twice]).await?;
        fleet.condition("Pipeline", "readings", "Stalled", "True", "").await?;
        let health = judge(&fleet.api("Pipeline").get("readings").await?).await?;
        ensure!(health.has_failed_to_all(), "stalled, it is {health:?}");
        fleet.apply(pipeline("readings")).await?;
        ready_and_healthy(&fleet).await?;
        judge_all(states).await
    });
}

async fn ready_and_healthy(fleet: &Fleet) -> Result<()> {
    for (kind, name) in OBJECTS {
        let object = fleet.ready(kind, name).await?;
        let health = judge(&object).await?;
        ensure!(health.is_healthy_to_all(), "{kind} {name} is Ready, and {health:?}: {}", summary(&object));
    }
    Ok(())
}

/// Watches all states of the three kinds that the API server stores from now on.
fn watch(fleet: &Fleet) -> mpsc::UnboundedReceiver<Result<DynamicObject>> {
    let (sender, receiver) = mpsc::unbounded_channel();
    for (kind, _) in OBJECTS {
        let (api, sender) = (fleet.api(kind), sender.clone());
        tokio::spawn(async move {
            let watching: Result<()> = async {
                let mut events = api.watch(&WatchParams::default(), "0").await?.boxed();
                while let Some(event) = events.next().await {
                    match event? {
                        WatchEvent::Added(object) | WatchEvent::Modified(object) | WatchEvent::Deleted(object) => {
                            drop(sender.send(Ok(object)));
                        }
                        WatchEvent::Bookmark(_) => {}
                        WatchEvent::Error(error) => bail!("the watch broke, and states may be missed: {error:?}"),
                    }
                }
                bail!("the watch ended, and states may be missed")
            }
            .await;
            if let Err(error) = watching {
                drop(sender.send(Err(error)));
            }
        });
    }
    receiver
}

/// Checks all watched states: an object may be reported as healthy only if it is Ready.
async fn judge_all(mut states: mpsc::UnboundedReceiver<Result<DynamicObject>>) -> Result<()> {
    // Watch events arrive with a delay.
    let mut seen = Vec::new();
    until(seconds(10), "every object was seen to become Ready", async || {
        while let Ok(state) = states.try_recv() {
            seen.push(state?);
        }
        let ready: Vec<String> = seen.iter().filter(|object| is_ready(object)).map(DynamicObject::name_any).collect();
        ensure!(OBJECTS.iter().all(|(_, name)| ready.iter().any(|found| found == name)), "Ready are {ready:?}");
        Ok(())
    })
    .await?;
    let mut count = BTreeMap::<String, usize>::new();
    for object in &seen {
        let health = judge(object).await?;
        ensure!(!health.is_healthy_to_anyone() || is_ready(object), "{} is {health:?}, but {}", object.name_any(), summary(object));
        *count.entry(format!("{} {}/{}", object.name_any(), health.kstatus.status, health.argocd.status)).or_default() += 1;
    }
    println!("judged: {count:?}");
    Ok(())
}
