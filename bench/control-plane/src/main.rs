//! How long a fleet takes to come up, beside the floor: a bare client that makes the fewest writes that are needed (a Secret
//! and a status for each Device) with the same concurrency, on the same cluster, in the same run.

use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use clap::Parser;
use fleetwright::api::condition::READY;
use fleetwright::api::device::DeviceSpec;
use fleetwright::api::reference::GatewayReference;
use fleetwright::api::{Device, Gateway, GatewaySpec, PAUSE_ANNOTATION};
use futures::{StreamExt, TryStreamExt, stream};
use k8s_openapi::ByteString;
use k8s_openapi::api::core::v1::{Namespace, Secret};
use kube::api::{Api, DeleteParams, ListParams, ObjectMeta, Patch, PatchParams, PostParams};
use kube::{Client, ResourceExt};
use serde_json::json;

/// Namespace of the floor.
const FLOOR: &str = "bench-floor";

/// Devices at fleet scale, beside the floor. Needs a cluster with Fleetwright installed, and KUBECONFIG.
#[derive(Parser)]
struct Arguments {
    /// Devices to declare
    #[arg(long, default_value_t = 15_000)]
    devices: usize,

    /// Gateways to spread them over
    #[arg(long, default_value_t = 12)]
    gateways: usize,

    /// Calls at the same time: that of the operator (`deviceConcurrency`)
    #[arg(long, default_value_t = 32)]
    concurrency: usize,

    /// Single changes to measure, one after another, once all Devices are Ready
    #[arg(long, default_value_t = 100)]
    changes: usize,

    /// Leave the fleet for a look
    #[arg(long)]
    keep: bool,
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let arguments = Arguments::parse();
    let client = Client::try_default().await?;
    let fleet = Run { client: client.clone(), namespace: "bench-fleet", arguments: &arguments };
    let floor = Run { client, namespace: FLOOR, arguments: &arguments };

    floor.prepare(false).await?;
    let declared = floor.declare().await?;
    let floor_time = floor.fewest_writes().await?;
    row("floor: declare", declared, arguments.devices);
    row("floor: a Secret and a status each", floor_time, arguments.devices);
    floor.clean_up().await?;

    fleet.prepare(true).await?;
    let begin = Instant::now();
    row("fleetwright: declare", fleet.declare().await?, arguments.devices);
    fleet.await_ready().await?;
    let ready = begin.elapsed();
    row("fleetwright: all CredentialsLive", ready, arguments.devices);
    let ratio = ready.as_secs_f64() / (declared + floor_time).as_secs_f64();
    report(&format!("{:<42} {ratio:>8.2}", "of the floor (declare, Secret, status)"));
    let mut changes = fleet.single_changes().await?;
    changes.sort_unstable();
    for (name, part) in [("p50", 50), ("p99", 99)] {
        let value = changes.get(changes.len() * part / 100).copied().unwrap_or_default();
        report(&format!("{:<42} {:>8.0} ms", format!("one change among {}, {name}", arguments.devices), value.as_secs_f64() * 1e3));
    }
    if !arguments.keep {
        fleet.clean_up().await?;
    }
    Ok(())
}

struct Run<'a> {
    client: Client,
    namespace: &'static str,
    arguments: &'a Arguments,
}

impl Run<'_> {
    fn devices(&self) -> Api<Device> {
        Api::namespaced(self.client.clone(), self.namespace)
    }

    fn name(index: usize) -> String {
        format!("device-{index:06}")
    }

    async fn prepare(&self, gateways: bool) -> anyhow::Result<()> {
        let namespaces = Api::<Namespace>::all(self.client.clone());
        let metadata = ObjectMeta { name: Some(self.namespace.to_owned()), ..ObjectMeta::default() };
        namespaces
            .create(&PostParams::default(), &Namespace { metadata, ..Namespace::default() })
            .await
            .context("the namespace of an earlier run is there: delete it")?;
        if !gateways {
            return Ok(());
        }
        let api = Api::<Gateway>::namespaced(self.client.clone(), self.namespace);
        for index in 0..self.arguments.gateways {
            let spec: GatewaySpec = serde_json::from_value(json!({"resources": {"requests": {"memory": "32Mi"}}}))?;
            api.create(&PostParams::default(), &Gateway::new(&format!("plant-{index}"), spec)).await?;
        }
        let deadline = Instant::now() + Duration::from_mins(3);
        loop {
            let ready = api
                .list(&ListParams::default())
                .await?
                .items
                .iter()
                .filter(|gateway| is_ready(gateway.status.as_ref().map(|status| status.conditions.as_slice())))
                .count();
            if ready == self.arguments.gateways {
                return Ok(());
            }
            ensure!(Instant::now() < deadline, "only {ready} of {} Gateways are Ready", self.arguments.gateways);
            tokio::time::sleep(Duration::from_millis(500)).await;
        }
    }

    async fn declare(&self) -> anyhow::Result<Duration> {
        let begin = Instant::now();
        let gateway_of = |index: usize| {
            if self.namespace == FLOOR { "nowhere".to_owned() } else { format!("plant-{}", index % self.arguments.gateways) }
        };
        stream::iter(0..self.arguments.devices)
            .map(|index| {
                let spec: Result<DeviceSpec, _> =
                    serde_json::from_value(json!({"gatewayRef": GatewayReference { name: gateway_of(index) }}));
                let api = self.devices();
                async move {
                    let mut device = Device::new(&Self::name(index), spec?);
                    // The floor's Devices are not the operator's to work on.
                    if self.namespace == FLOOR {
                        device.annotations_mut().insert(PAUSE_ANNOTATION.to_owned(), "true".to_owned());
                    }
                    anyhow::Ok(api.create(&PostParams::default(), &device).await?)
                }
            })
            .buffer_unordered(self.arguments.concurrency)
            .try_for_each(|_| async { Ok(()) })
            .await?;
        Ok(begin.elapsed())
    }

    /// What no implementation can do without, in the fewest calls.
    async fn fewest_writes(&self) -> anyhow::Result<Duration> {
        let begin = Instant::now();
        let secrets = Api::<Secret>::namespaced(self.client.clone(), self.namespace);
        let data: std::collections::BTreeMap<_, _> = [("username", 13), ("password", 43), ("gateway", 23)]
            .map(|(key, length)| (key.to_owned(), ByteString(vec![b'x'; length])))
            .into();
        stream::iter(0..self.arguments.devices)
            .map(|index| {
                let metadata = ObjectMeta { name: Some(format!("{}-credentials", Self::name(index))), ..ObjectMeta::default() };
                let secret = Secret { metadata, data: Some(data.clone()), ..Secret::default() };
                let (secrets, devices) = (secrets.clone(), self.devices());
                async move {
                    secrets.create(&PostParams::default(), &secret).await?;
                    let condition = |type_| json!({"type": type_, "status": "True", "reason": "Proven", "message": "the broker of Gateway plant-1 has proven that it accepts this credential", "observedGeneration": 1, "lastTransitionTime": "2026-01-01T00:00:00Z"});
                    let status = json!({"status": {"observedGeneration": 1, "username": Self::name(index), "conditions": [condition("Accepted"), condition("CredentialsLive"), condition(READY)]}});
                    anyhow::Ok(devices.patch_status(&Self::name(index), &PatchParams::default(), &Patch::Merge(status)).await?)
                }
            })
            .buffer_unordered(self.arguments.concurrency)
            .try_for_each(|_| async { Ok(()) })
            .await?;
        Ok(begin.elapsed())
    }

    async fn await_ready(&self) -> anyhow::Result<()> {
        let deadline = Instant::now() + Duration::from_mins(10);
        let mut changes = kube::runtime::watcher(self.devices(), kube::runtime::watcher::Config::default()).boxed();
        let mut ready = std::collections::HashSet::new();
        while ready.len() < self.arguments.devices {
            let event = tokio::time::timeout_at(deadline.into(), changes.next())
                .await
                .with_context(|| format!("{} of {} Devices are Ready", ready.len(), self.arguments.devices))?;
            if let Some(Ok(kube::runtime::watcher::Event::Apply(device) | kube::runtime::watcher::Event::InitApply(device))) = event
                && is_ready(device.status.as_ref().map(|status| status.conditions.as_slice()))
            {
                ready.insert(device.name_any());
            }
        }
        Ok(())
    }

    /// From the change of a Device (its ACL) to the broker's proof.
    async fn single_changes(&self) -> anyhow::Result<Vec<Duration>> {
        let mut times = Vec::new();
        for change in 0..self.arguments.changes {
            let name = Self::name(change * self.arguments.devices / self.arguments.changes.max(1));
            let patch = json!({"spec": {"authorization": {"acls": [{"topic": format!("plants/{change}/#"), "access": "Write"}]}}});
            let begin = Instant::now();
            let patched = self.devices().patch(&name, &PatchParams::default(), &Patch::Merge(patch)).await?;
            let done = |device: Option<&Device>| {
                device.and_then(|device| device.status.as_ref()).is_some_and(|status| {
                    status.observed_generation == patched.metadata.generation.unwrap_or_default() && is_ready(Some(&status.conditions))
                })
            };
            let waiting = kube::runtime::wait::await_condition(self.devices(), &name, done);
            tokio::time::timeout(Duration::from_mins(1), waiting).await.with_context(|| format!("{name} is not Ready"))??;
            times.push(begin.elapsed());
        }
        Ok(times)
    }

    async fn clean_up(&self) -> anyhow::Result<()> {
        let namespaces = Api::<Namespace>::all(self.client.clone());
        namespaces.delete(self.namespace, &DeleteParams::default()).await?;
        tokio::time::timeout(Duration::from_mins(5), async {
            while matches!(namespaces.get_opt(self.namespace).await, Ok(Some(_))) {
                tokio::time::sleep(Duration::from_secs(1)).await;
            }
        })
        .await
        .context("the namespace does not go")
    }
}

fn is_ready(conditions: Option<&[k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition]>) -> bool {
    conditions.unwrap_or_default().iter().any(|condition| condition.type_ == READY && condition.status == "True")
}

fn row(what: &str, time: Duration, devices: usize) {
    #[allow(clippy::cast_precision_loss, reason = "a count of devices")]
    let rate = devices as f64 / time.as_secs_f64();
    report(&format!("{what:<42} {:>8.1} s {rate:>8.0} /s", time.as_secs_f64()));
}

#[allow(clippy::print_stdout, reason = "a benchmark prints")]
fn report(line: &str) {
    println!("{line}");
}
