//! The fleet under test: creates its resources and reads the status of its Devices.

use std::collections::HashSet;
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use fleetwright::api::condition::{CREDENTIALS_LIVE, READY};
use fleetwright::api::device::DeviceSpec;
use fleetwright::api::{Device, Gateway, GatewaySpec, PAUSE_ANNOTATION};
use fleetwright_e2e::audit::Mark;
use futures::{StreamExt, TryStreamExt, stream};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;
use kube::ResourceExt;
use kube::api::{Api, ListParams, PostParams};
use kube::runtime::watcher;
use serde_json::json;

use crate::Arguments;
use crate::cluster::Cluster;
use crate::operator::Operator;
use crate::report::{heading, progress, rate_row, row};

/// Time in which unnecessary writes of the operator are counted.
const SECOND_LOOK: Duration = Duration::from_secs(30);

/// A namespace with Gateways and their Devices.
pub struct Fleet<'a> {
    /// The cluster.
    pub cluster: &'a Cluster,
    /// The namespace.
    pub namespace: &'static str,
}

/// Name of a Device.
pub fn device_name(index: usize) -> String {
    format!("device-{index:06}")
}

/// Name of the Gateway of a Device.
pub fn gateway_of(index: usize, gateways: usize) -> String {
    format!("plant-{}", index % gateways)
}

/// Creates all Devices, with the concurrency of the operator. Returns the elapsed time.
pub async fn declare(
    cluster: &Cluster,
    namespace: &str,
    arguments: &Arguments,
    gateway: impl Fn(usize) -> String,
    paused: bool,
) -> anyhow::Result<Duration> {
    let begin = Instant::now();
    let api = Api::<Device>::namespaced(cluster.client.clone(), namespace);
    stream::iter(0..arguments.devices)
        .map(|index| {
            let spec: Result<DeviceSpec, _> = serde_json::from_value(json!({"gatewayRef": {"name": gateway(index)}}));
            let api = api.clone();
            async move {
                let mut device = Device::new(&device_name(index), spec?);
                if paused {
                    device.annotations_mut().insert(PAUSE_ANNOTATION.to_owned(), "true".to_owned());
                }
                anyhow::Ok(api.create(&PostParams::default(), &device).await?)
            }
        })
        .buffer_unordered(arguments.concurrency)
        .try_for_each(|_| async { Ok(()) })
        .await?;
    Ok(begin.elapsed())
}

/// Waiting fails when no further Device has met the condition for this time.
const STALLED: Duration = Duration::from_mins(5);

/// Waits until this number of Devices meets a condition.
pub async fn await_devices(api: Api<Device>, count: usize, holds: impl Fn(&Device) -> bool) -> anyhow::Result<()> {
    let mut progressed = Instant::now();
    let mut changes = watcher(api, watcher::Config::default()).boxed();
    let mut done = HashSet::new();
    let mut told = Instant::now();
    while done.len() < count {
        let event = tokio::time::timeout_at((progressed + STALLED).into(), changes.next())
            .await
            .with_context(|| format!("{} of {count} Devices are as awaited, and no more have been for {STALLED:?}", done.len()))?;
        if let Some(Ok(watcher::Event::Apply(device) | watcher::Event::InitApply(device))) = event
            && holds(&device)
            && done.insert(device.name_any())
        {
            progressed = Instant::now();
        }
        if told.elapsed() > Duration::from_secs(10) {
            told = Instant::now();
            progress(&format!("{} of {count} Devices", done.len()));
        }
    }
    Ok(())
}

impl<'a> Fleet<'a> {
    /// Creates a namespace with Gateways and waits until they are Ready.
    pub async fn prepare(cluster: &'a Cluster, namespace: &'static str, gateways: usize) -> anyhow::Result<Self> {
        cluster.create_namespace(namespace).await?;
        let api = Api::<Gateway>::namespaced(cluster.client.clone(), namespace);
        for index in 0..gateways {
            let spec: GatewaySpec =
                serde_json::from_value(json!({"resources": {"requests": {"memory": "32Mi"}, "limits": {"memory": "1Gi"}}}))?;
            api.create(&PostParams::default(), &Gateway::new(&gateway_of(index, gateways), spec)).await?;
        }
        let deadline = Instant::now() + Duration::from_mins(5);
        loop {
            let listed = api.list(&ListParams::default()).await?;
            let ready = listed.iter().filter(|gateway| holds(gateway.status.as_ref().map(|status| &*status.conditions), READY)).count();
            if ready == gateways {
                return Ok(Self { cluster, namespace });
            }
            ensure!(Instant::now() < deadline, "only {ready} of {gateways} Gateways are Ready");
            tokio::time::sleep(Duration::from_millis(500)).await;
        }
    }

    /// The API of the fleet's Devices.
    pub fn devices(&self) -> Api<Device> {
        Api::namespaced(self.cluster.client.clone(), self.namespace)
    }

    /// Measures the time from the first request until the brokers have confirmed all credentials, then counts writes while idle.
    pub async fn measure_declaration(&self, operator: &Operator, arguments: &Arguments, floor: Option<Duration>) -> anyhow::Result<()> {
        heading("fleetwright");
        let before = operator.look().await?;
        let mark = Mark::now()?;
        let begin = Instant::now();
        let of = |index| gateway_of(index, arguments.gateways);
        let (declared, live) = tokio::join!(
            declare(self.cluster, self.namespace, arguments, of, false),
            operator.watched(await_devices(self.devices(), arguments.devices, is_live)),
        );
        live?;
        let ready = begin.elapsed();
        rate_row("declare, with the operator at work", declared?, arguments.devices);
        rate_row("from the first declaration until all are CredentialsLive", ready, arguments.devices);
        if let Some(floor) = floor {
            row("of the floor (declare, Secret, status)", &format!("{:.2}", ready.as_secs_f64() / floor.as_secs_f64()));
        }
        let writes = mark.writes(self.namespace)?;
        let of_devices = writes.iter().filter(|write| write.contains("device-")).count();
        #[allow(clippy::cast_precision_loss, reason = "counts of writes")]
        row("writes a Device", &format!("{:.3}", of_devices as f64 / arguments.devices as f64));
        row("further writes (shards, proofs, totals)", &(writes.len() - of_devices).to_string());
        let after = operator.look().await?;
        row("operator: processor time", &format!("{:.1} s", after.cpu_seconds - before.cpu_seconds));
        row("operator: memory", &format!("{:.0} MiB", after.mebibytes));
        let mark = Mark::now()?;
        // The Gateways' totals are updated after two seconds. Afterwards there is no work left.
        tokio::time::sleep(Duration::from_secs(5)).await;
        let settled = Mark::now()?;
        tokio::time::sleep(SECOND_LOOK).await;
        row(
            "writes while the fleet settles",
            &mark.writes(self.namespace)?.len().saturating_sub(settled.writes(self.namespace)?.len()).to_string(),
        );
        row("writes in the 30 s after that", &settled.writes(self.namespace)?.len().to_string());
        Ok(())
    }

    /// Removes the fleet.
    pub async fn remove(&self) -> anyhow::Result<()> {
        self.cluster.delete_namespace(self.namespace).await
    }
}

/// Whether the broker has confirmed the Device's credentials.
pub fn is_live(device: &Device) -> bool {
    holds(device.status.as_ref().map(|status| &*status.conditions), CREDENTIALS_LIVE)
}

/// Whether a condition is True.
pub fn holds(conditions: Option<&[Condition]>, type_: &str) -> bool {
    conditions.unwrap_or_default().iter().any(|condition| condition.type_ == type_ && condition.status == "True")
}
