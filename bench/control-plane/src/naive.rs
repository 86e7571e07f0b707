//! A naive controller as in tutorials: a Controller with whole objects in its stores, a Secret for each Device, and a status
//! update by server-side apply at every reconciliation. It does less than Fleetwright (it configures no broker), and shows the
//! cost of the writes and stores alone.

use std::collections::BTreeMap;
use std::process::Stdio;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use fleetwright::api::Device;
use fleetwright::api::condition::READY;
use futures::StreamExt;
use k8s_openapi::ByteString;
use k8s_openapi::api::core::v1::Secret;
use kube::api::{Api, ObjectMeta, Patch, PatchParams};
use kube::runtime::controller::{Action, Controller};
use kube::runtime::watcher;
use kube::{Client, Resource, ResourceExt};
use serde_json::json;
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::{Child, Command};

use crate::Arguments;
use crate::cluster::Cluster;
use crate::fleet::{self, await_devices, holds};
use crate::report::{heading, rate_row, row};

const NAMESPACE: &str = "bench-naive";

/// A restarted controller that has written nothing for this time has finished its first reconciliations.
const QUIET: Duration = Duration::from_secs(5);

/// Creates the Devices, waits until the naive controller has set Ready on each, and restarts it.
pub async fn measure(cluster: &Cluster, arguments: &Arguments, floor: Option<Duration>) -> anyhow::Result<()> {
    heading("a naive controller (a Secret and a status each, whole objects in its stores)");
    cluster.create_namespace(NAMESPACE).await?;
    let mut first = Process::start().await?;
    let begin = Instant::now();
    let devices = Api::<Device>::namespaced(cluster.client.clone(), NAMESPACE);
    let of = |_| "nowhere".to_owned();
    let ready = |device: &Device| holds(device.status.as_ref().map(|status| &*status.conditions), READY);
    // Paused, so that Fleetwright ignores them.
    let (declared, done) =
        tokio::join!(fleet::declare(cluster, NAMESPACE, arguments, of, true), await_devices(devices, arguments.devices, ready),);
    declared?;
    done?;
    let time = begin.elapsed();
    rate_row("from the first declaration until all are Ready", time, arguments.devices);
    if let Some(floor) = floor {
        row("of the floor (declare, Secret, status)", &format!("{:.2}", time.as_secs_f64() / floor.as_secs_f64()));
    }
    let writes = first.settle().await?;
    #[allow(clippy::cast_precision_loss, reason = "counts of writes")]
    let a_device = |writes: u64| format!("{:.3}", writes as f64 / arguments.devices as f64);
    row("writes a Device", &a_device(writes));
    row("memory", &format!("{:.0} MiB", first.mebibytes()?));
    first.stop().await?;
    let mut second = Process::start().await?;
    let begin = Instant::now();
    let writes = second.settle().await?;
    row("restart: writes a Device", &a_device(writes));
    row("restart: busy for", &format!("{:.1} s", begin.elapsed().saturating_sub(QUIET).as_secs_f64()));
    row("restart: memory", &format!("{:.0} MiB", second.mebibytes()?));
    second.stop().await?;
    cluster.delete_namespace(NAMESPACE).await
}

/// The naive controller as a separate process, which prints its number of writes every second.
struct Process {
    child: Child,
    lines: tokio::io::Lines<BufReader<tokio::process::ChildStdout>>,
}

impl Process {
    async fn start() -> anyhow::Result<Self> {
        let program = std::env::current_exe().context("failed to find this program")?;
        let mut child = Command::new(program).args(["naive", NAMESPACE]).stdout(Stdio::piped()).kill_on_drop(true).spawn()?;
        let output = child.stdout.take().context("no output of the naive controller")?;
        let mut lines = BufReader::new(output).lines();
        lines.next_line().await?.context("the naive controller ended")?;
        Ok(Self { child, lines })
    }

    /// Waits until it writes no more. Returns the number of its writes.
    async fn settle(&mut self) -> anyhow::Result<u64> {
        let (mut writes, mut since) = (0, Instant::now());
        loop {
            let line = self.lines.next_line().await?.context("the naive controller ended")?;
            let now: u64 = line.parse()?;
            if now != writes {
                (writes, since) = (now, Instant::now());
            } else if since.elapsed() >= QUIET && writes > 0 {
                return Ok(writes);
            }
        }
    }

    /// Its resident memory (proc(5), VmRSS).
    fn mebibytes(&self) -> anyhow::Result<f64> {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.child.id().context("it ended")?))?;
        let line = status.lines().find(|line| line.starts_with("VmRSS:")).context("no VmRSS")?;
        let kibibytes: f64 = line.split_whitespace().nth(1).context("no number")?.parse()?;
        Ok(kibibytes / 1024.0)
    }

    async fn stop(mut self) -> anyhow::Result<()> {
        Ok(self.child.kill().await?)
    }
}

struct Context {
    client: Client,
    writes: AtomicU64,
}

/// The naive controller.
#[allow(clippy::print_stdout, reason = "its parent reads the number of writes")]
pub async fn run(namespace: &str) -> anyhow::Result<()> {
    let client = Client::try_default().await?;
    let context = Arc::new(Context { client: client.clone(), writes: AtomicU64::new(0) });
    let shared = Arc::clone(&context);
    let tell = async move {
        loop {
            println!("{}", shared.writes.load(Ordering::Relaxed));
            tokio::time::sleep(Duration::from_secs(1)).await;
        }
    };
    let work = Controller::new(Api::<Device>::namespaced(client.clone(), namespace), watcher::Config::default())
        .owns(Api::<Secret>::namespaced(client, namespace), watcher::Config::default())
        .run(reconcile, |_, _: &kube::Error, _| Action::requeue(Duration::from_secs(5)), context)
        .for_each(|_| async {});
    tokio::select! {
        () = work => Ok(()),
        () = tell => Ok(()),
    }
}

async fn reconcile(device: Arc<Device>, context: Arc<Context>) -> Result<Action, kube::Error> {
    let namespace = device.namespace().unwrap_or_default();
    let secrets = Api::<Secret>::namespaced(context.client.clone(), &namespace);
    let devices = Api::<Device>::namespaced(context.client.clone(), &namespace);
    let name = format!("{}-credentials", device.name_any());
    let known = secrets.get_opt(&name).await?.and_then(|secret| secret.data);
    let data = known.unwrap_or_else(|| BTreeMap::from([("password".to_owned(), ByteString(rand::random::<[u8; 32]>().to_vec()))]));
    let secret = Secret {
        metadata: ObjectMeta {
            name: Some(name.clone()),
            owner_references: device.controller_owner_ref(&()).map(|owner| vec![owner]),
            ..ObjectMeta::default()
        },
        data: Some(data),
        ..Secret::default()
    };
    let parameters = PatchParams::apply("naive").force();
    secrets.patch(&name, &parameters, &Patch::Apply(&secret)).await?;
    context.writes.fetch_add(1, Ordering::Relaxed);
    let condition = json!({
        "type": READY, "status": "True", "reason": "Reconciled", "message": "", "observedGeneration": device.metadata.generation,
        // A new time would change the object and cause endless reconciliations.
        "lastTransitionTime": device.metadata.creation_timestamp,
    });
    let status = json!({
        "apiVersion": Device::api_version(&()), "kind": Device::kind(&()),
        "status": {"observedGeneration": device.metadata.generation, "conditions": [condition]},
    });
    devices.patch_status(&device.name_any(), &parameters, &Patch::Apply(status)).await?;
    context.writes.fetch_add(1, Ordering::Relaxed);
    Ok(Action::requeue(Duration::from_mins(5)))
}
