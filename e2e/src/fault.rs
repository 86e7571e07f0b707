//! Faults: killed processes and deleted pods.

use std::collections::BTreeMap;
use std::fs;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use k8s_openapi::api::core::v1::Pod;
use kube::api::{DeleteParams, ListParams};
use kube::{Api, Client};
use tokio::process::Command;

use crate::cluster::output;
use crate::wait::{seconds, until};

/// Maximum time until a killed container or a deleted pod is ready again. It includes the restart back-off of the
/// kubelet.
const BACK_WITHIN: Duration = seconds(120);

/// The pods of a namespace whose names have this prefix and that are not being deleted.
pub async fn pods(client: &Client, namespace: &str, prefix: &str) -> Result<Vec<Pod>> {
    let list = Api::<Pod>::namespaced(client.clone(), namespace).list(&ListParams::default()).await?;
    let named =
        |pod: &Pod| pod.metadata.name.as_deref().is_some_and(|name| name.starts_with(prefix)) && pod.metadata.deletion_timestamp.is_none();
    Ok(list.items.into_iter().filter(named).collect())
}

/// The only pod whose name has this prefix.
pub async fn pod(client: &Client, namespace: &str, prefix: &str) -> Result<Pod> {
    pods(client, namespace, prefix).await?.into_iter().next().with_context(|| format!("no pod {prefix}* in {namespace}"))
}

/// Kills (SIGKILL) the process of a pod whose command line contains `program`, as the kernel does when memory runs out. Child
/// processes with the same program are not killed directly. The API server is not used, because it may be unavailable.
///
/// The name of the process's cgroup contains the UID of the pod, with every container runtime.
pub async fn kill(pod: &Pod, program: &str) -> Result<()> {
    let uid = pod.metadata.uid.as_deref().context("the pod has no UID")?;
    let found: BTreeMap<u32, u32> = processes_of(uid, program)?.into_iter().collect();
    let first: Vec<String> =
        found.iter().filter(|(_, parent)| !found.contains_key(parent)).map(|(process, _)| process.to_string()).collect();
    ensure!(!first.is_empty(), "no process of {:?} has {program} in its command line", pod.metadata.name);
    output(Command::new("kill").arg("-9").args(&first)).await.map(drop)
}

/// The processes of a pod, each with its parent. Processes that end during the search are ignored.
fn processes_of(uid: &str, program: &str) -> Result<Vec<(u32, u32)>> {
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc")? {
        let folder = entry?.path();
        let Some(process) = folder.file_name().and_then(|name| name.to_str()?.parse().ok()) else { continue };
        let Ok(cgroup) = fs::read_to_string(folder.join("cgroup")) else { continue };
        let Ok(command) = fs::read(folder.join("cmdline")) else { continue };
        let Ok(status) = fs::read_to_string(folder.join("status")) else { continue };
        // The systemd cgroup driver replaces dashes by underscores.
        let of_the_pod = cgroup.contains(uid) || cgroup.contains(&uid.replace('-', "_"));
        if of_the_pod && String::from_utf8_lossy(&command).replace('\0', " ").contains(program) {
            let parent = status.lines().find_map(|line| line.strip_prefix("PPid:"));
            found.push((process, parent.context("a process without a parent")?.trim().parse()?));
        }
    }
    Ok(found)
}

/// Kills `program` in the pod, and waits until the kubelet has restarted its container and the pod is ready.
pub async fn kill_and_wait(client: &Client, namespace: &str, prefix: &str, program: &str) -> Result<()> {
    let before = pod(client, namespace, prefix).await?;
    let restarts = restarts(&before);
    kill(&before, program).await?;
    until(BACK_WITHIN, format!("{prefix} is back after kill -9 of {program}"), async || {
        let now = pod(client, namespace, prefix).await?;
        ensure!(now.metadata.uid == before.metadata.uid, "the pod was replaced");
        ensure!(self::restarts(&now) > restarts, "no container was restarted");
        ensure_ready(&now)
    })
    .await
}

/// Deletes the pod, and waits until its replacement is ready.
pub async fn delete_pod_and_wait(client: &Client, namespace: &str, prefix: &str) -> Result<()> {
    let before = pod(client, namespace, prefix).await?;
    let name = before.metadata.name.clone().unwrap_or_default();
    Api::<Pod>::namespaced(client.clone(), namespace).delete(&name, &DeleteParams::default()).await?;
    until(BACK_WITHIN, format!("a pod is ready in the place of {name}"), async || {
        let now = pod(client, namespace, prefix).await?;
        ensure!(now.metadata.uid != before.metadata.uid, "the pod was not replaced");
        ensure_ready(&now)
    })
    .await
}

fn restarts(pod: &Pod) -> i32 {
    let statuses = pod
        .status
        .iter()
        .flat_map(|status| status.container_statuses.iter().flatten().chain(status.init_container_statuses.iter().flatten()));
    statuses.map(|container| container.restart_count).sum()
}

/// Whether the pod has the condition `Ready`.
#[must_use]
pub fn is_ready(pod: &Pod) -> bool {
    let conditions = pod.status.iter().flat_map(|status| status.conditions.iter().flatten());
    conditions.into_iter().any(|condition| condition.type_ == "Ready" && condition.status == "True")
}

fn ensure_ready(pod: &Pod) -> Result<()> {
    if !is_ready(pod) {
        let status = pod.status.as_ref().context("the pod has no status")?;
        let containers: Vec<_> = status.container_statuses.iter().flatten().map(|c| format!("{}: {:?}", c.name, c.state)).collect();
        bail!("the pod is not ready: {containers:?}");
    }
    Ok(())
}
