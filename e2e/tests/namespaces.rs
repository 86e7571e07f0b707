//! The operator with Roles instead of a ClusterRole reconciles the objects of its namespaces, and ignores all others.

use std::path::PathBuf;

use anyhow::{Result, ensure};
use fleetwright_e2e::cluster::{SYSTEM_NAMESPACE, output, root};
use fleetwright_e2e::fleet::conditions;
use fleetwright_e2e::manifest::{device, gateway, pipeline};
use fleetwright_e2e::{Fleet, run_alone};
use k8s_openapi::api::authorization::v1::{ResourceAttributes, SubjectAccessReview, SubjectAccessReviewSpec};
use kube::Api;
use kube::api::{ListParams, PostParams};
use tokio::process::Command;

#[test]
fn an_operator_with_roles_reconciles_its_namespaces_and_ignores_others() {
    run_alone("roles", async |fleet| {
        let other = fleet.another("unwatched").await?;
        fleet.database().await?;
        let watch = format!("watchNamespaces={{{}}}", fleet.namespace);
        let chart: PathBuf = root().join("charts/fleetwright");
        helm(&["upgrade", "fleetwright", &chart.display().to_string(), "--reuse-values", "--set", &watch]).await?;
        let outcome = with_roles(&fleet, &other).await;
        // Later tests need the permissions in all namespaces.
        helm(&["rollback", "fleetwright"]).await?;
        outcome?;
        // The other namespace was ignored only because it was not in the list.
        other.all_ready(&["Gateway/plant-1", "Device/press-1"]).await?;
        fleet.all_ready(&["Gateway/plant-1", "Device/press-1", "Pipeline/readings"]).await?;
        other.remove_namespace().await
    });
}

async fn with_roles(fleet: &Fleet, other: &Fleet) -> Result<()> {
    for (namespace, allowed) in [(Some(&fleet.namespace), true), (Some(&other.namespace), false), (None, false)] {
        ensure!(may_list_secrets(fleet, namespace).await? == allowed, "expected {allowed} in {namespace:?}");
    }
    other.apply_all([gateway("plant-1"), device("press-1", "plant-1")]).await?;
    fleet.apply_all([gateway("plant-1"), device("press-1", "plant-1"), pipeline("readings")]).await?;
    fleet.all_ready(&["Gateway/plant-1", "Device/press-1", "Pipeline/readings"]).await?;
    for (kind, name) in [("Gateway", "plant-1"), ("Device", "press-1")] {
        let ignored = conditions(&other.api(kind).get(name).await?);
        ensure!(ignored.is_empty(), "{kind} {name} of the other namespace has {ignored:?}");
    }
    for kind in ["StatefulSet", "Secret", "Service"] {
        let made = other.api(kind).list(&ListParams::default()).await?.items;
        ensure!(made.is_empty(), "the operator has written to the other namespace: {made:?}");
    }
    // A deletion and a change arrive too.
    fleet.delete("Pipeline", "readings").await?;
    fleet.gone("Pipeline", "readings", fleetwright_e2e::fleet::READY_WITHIN).await?;
    fleet.apply_all([device("press-2", "plant-1"), pipeline("readings")]).await?;
    fleet.all_ready(&["Device/press-2", "Pipeline/readings"]).await
}

/// Whether the operator may list Secrets in a namespace, or in all.
async fn may_list_secrets(fleet: &Fleet, namespace: Option<&String>) -> Result<bool> {
    let attributes = ResourceAttributes {
        namespace: namespace.cloned(),
        verb: Some("list".to_owned()),
        resource: Some("secrets".to_owned()),
        ..ResourceAttributes::default()
    };
    let user = Some(format!("system:serviceaccount:{SYSTEM_NAMESPACE}:fleetwright"));
    let spec = SubjectAccessReviewSpec { resource_attributes: Some(attributes), user, ..SubjectAccessReviewSpec::default() };
    let review = SubjectAccessReview { spec, ..SubjectAccessReview::default() };
    let answer = Api::<SubjectAccessReview>::all(fleet.client.clone()).create(&PostParams::default(), &review).await?;
    Ok(answer.status.is_some_and(|status| status.allowed))
}

/// Changes the installation, and waits until the operator is ready.
async fn helm(arguments: &[&str]) -> Result<()> {
    let mut command = Command::new("helm");
    output(command.args(arguments).args(["--namespace", SYSTEM_NAMESPACE, "--wait", "--timeout", "2m"])).await.map(drop)
}
