//! The cluster under test and its scripts.

use std::path::PathBuf;
use std::process::Stdio;

use anyhow::{Context, Result, bail};
use kube::api::{ApiResource, DynamicObject, GroupVersionKind};
use kube::{Api, Client, Config};
use tokio::process::Command;

/// Namespace of the operator.
pub const SYSTEM_NAMESPACE: &str = "fleetwright-system";

/// Creates a client from `KUBECONFIG`. Requests time out when the API server is unavailable.
///
/// # Errors
/// Fails when there is no kubeconfig.
pub async fn client() -> Result<Client> {
    let mut config =
        Config::infer().await.context("failed to find a cluster: run these tests in `cluster.sh exec`, as scripts/test.sh does")?;
    config.connect_timeout = Some(std::time::Duration::from_secs(2));
    config.read_timeout = Some(std::time::Duration::from_secs(295));
    Ok(Client::try_from(config)?)
}

/// The API resource of a kind.
#[must_use]
pub fn resource(kind: &str) -> ApiResource {
    let (group, version) = match kind {
        "Gateway" | "Device" | "Pipeline" => ("fleetwright.io", "v1alpha1"),
        "StatefulSet" | "Deployment" => ("apps", "v1"),
        "NetworkPolicy" => ("networking.k8s.io", "v1"),
        "HorizontalPodAutoscaler" => ("autoscaling", "v2"),
        "PodDisruptionBudget" => ("policy", "v1"),
        "Certificate" | "CertificateRequest" | "Issuer" => ("cert-manager.io", "v1"),
        _ => ("", "v1"),
    };
    ApiResource::from_gvk(&GroupVersionKind::gvk(group, version, kind))
}

/// The objects of a kind in a namespace.
#[must_use]
pub fn api(client: &Client, namespace: &str, kind: &str) -> Api<DynamicObject> {
    Api::namespaced_with(client.clone(), namespace, &resource(kind))
}

/// Root folder of the repository.
#[must_use]
pub fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("..")
}

/// Path of a script: from the environment variable, or relative to the repository.
fn script(variable: &str, place: &str) -> PathBuf {
    std::env::var_os(variable).map_or_else(|| root().join(place), PathBuf::from)
}

/// The script that starts and stops components of the cluster.
#[must_use]
pub fn cluster_script() -> PathBuf {
    script("FLEETWRIGHT_CLUSTER", "e2e/cluster/cluster.sh")
}

/// The program that evaluates the health of objects.
#[must_use]
pub fn health_script() -> PathBuf {
    script("FLEETWRIGHT_HEALTH", "e2e/health/health.sh")
}

/// Stops a component of the local cluster, for instance `apiserver`.
pub async fn stop_component(component: &str) -> Result<()> {
    output(Command::new(cluster_script()).args(["stop", component])).await.map(drop)
}

/// Starts the component again.
pub async fn start_component(component: &str) -> Result<()> {
    output(Command::new(cluster_script()).args(["start", component])).await.map(drop)
}

/// Starts cert-manager in the cluster unless it runs.
pub async fn start_cert_manager() -> Result<()> {
    output(Command::new(cluster_script()).arg("cert-manager")).await.map(drop)
}

/// Runs a command and returns its standard output.
///
/// # Errors
/// Fails when the command cannot be started or exits with an error. The error contains the complete output.
pub async fn output(command: &mut Command) -> Result<String> {
    let program = command.as_std().get_program().to_string_lossy().into_owned();
    let output = command.stdin(Stdio::null()).output().await.with_context(|| format!("failed to start {program}"))?;
    let printed = String::from_utf8_lossy(&output.stdout).into_owned();
    if !output.status.success() {
        bail!("{program} failed with {}: {printed}{}", output.status, String::from_utf8_lossy(&output.stderr));
    }
    Ok(printed)
}
