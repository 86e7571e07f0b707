//! The floor: the minimum of writes that every implementation needs, made by a plain client.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use fleetwright::api::Device;
use fleetwright::api::condition::READY;
use futures::{StreamExt, TryStreamExt, stream};
use k8s_openapi::ByteString;
use k8s_openapi::api::core::v1::Secret;
use kube::api::{Api, ObjectMeta, Patch, PatchParams, PostParams};
use serde_json::json;

use crate::Arguments;
use crate::cluster::Cluster;
use crate::fleet::{self, device_name};
use crate::report::{heading, rate_row};

const NAMESPACE: &str = "bench-floor";

/// Creates the Devices and then writes a Secret and a status for each. Returns the total time.
pub async fn measure(cluster: &Cluster, arguments: &Arguments) -> anyhow::Result<Duration> {
    heading("floor");
    cluster.create_namespace(NAMESPACE).await?;
    // Paused, so that the operator ignores them.
    // A watch runs, as in the other measurements.
    let devices = Api::<Device>::namespaced(cluster.client.clone(), NAMESPACE);
    let watching = tokio::spawn(fleet::await_devices(devices, arguments.devices, fleet::is_live));
    let declared = fleet::declare(cluster, NAMESPACE, arguments, |_| "nowhere".to_owned(), true).await?;
    rate_row("declare", declared, arguments.devices);
    let begin = Instant::now();
    fewest_writes(cluster, arguments).await?;
    watching.await??;
    let written = begin.elapsed();
    rate_row("a Secret and a status each", written, arguments.devices);
    rate_row("together", declared + written, arguments.devices);
    cluster.delete_namespace(NAMESPACE).await?;
    Ok(declared + written)
}

async fn fewest_writes(cluster: &Cluster, arguments: &Arguments) -> anyhow::Result<()> {
    let secrets = Api::<Secret>::namespaced(cluster.client.clone(), NAMESPACE);
    let devices = Api::<Device>::namespaced(cluster.client.clone(), NAMESPACE);
    // The same size as the values in a Device's Secret.
    let data: BTreeMap<_, _> =
        [("username", 13), ("password", 43), ("gateway", 23)].map(|(key, length)| (key.to_owned(), ByteString(vec![b'x'; length]))).into();
    stream::iter(0..arguments.devices)
        .map(|index| {
            let name = device_name(index);
            let metadata = ObjectMeta { name: Some(format!("{name}-credentials")), ..ObjectMeta::default() };
            let secret = Secret { metadata, data: Some(data.clone()), ..Secret::default() };
            let (secrets, devices) = (secrets.clone(), devices.clone());
            async move {
                secrets.create(&PostParams::default(), &secret).await?;
                let condition = |type_| {
                    json!({
                        "type": type_, "status": "True", "reason": "Proven", "observedGeneration": 1,
                        "message": "the broker of Gateway plant-1 has proven that it accepts this credential",
                        "lastTransitionTime": "2026-01-01T00:00:00Z",
                    })
                };
                let conditions = [condition("Accepted"), condition("CredentialsLive"), condition(READY)];
                let status = json!({"status": {"observedGeneration": 1, "username": name, "conditions": conditions}});
                anyhow::Ok(devices.patch_status(&name, &PatchParams::default(), &Patch::Merge(status)).await?)
            }
        })
        .buffer_unordered(arguments.concurrency)
        .try_for_each(|_| async { Ok(()) })
        .await
}
