//! Changes of single Devices: time until the broker has confirmed them, and time until a revoked device is disconnected.

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use fleetwright::api::Device;
use fleetwright_e2e::audit::Mark;
use kube::api::{Patch, PatchParams};
use kube::runtime::wait::await_condition;
use serde_json::{Value, json};
use tokio::task::JoinSet;

use crate::Arguments;
use crate::clients::{Clients, Prober};
use crate::fleet::{Fleet, device_name, gateway_of, is_live};
use crate::operator::Operator;
use crate::report::{heading, progress, row, times};

/// Maximum time of a change; a longer one fails the benchmark.
const LONGEST: Duration = Duration::from_mins(1);

/// A patch that also changes a Device that another run has changed or `revoke` has disabled.
fn change(number: usize) -> Value {
    let run = std::process::id();
    json!({"spec": {"enabled": true, "authorization": {"acls": [{"topic": format!("plants/{run}-{number}/#"), "access": "Write"}]}}})
}

/// Time from the change of a Device's ACL until its status reports that the broker has confirmed it.
async fn until_live(fleet: &Fleet<'_>, name: &str, patch: &Value) -> anyhow::Result<Duration> {
    let begin = Instant::now();
    let patched = fleet.devices().patch(name, &PatchParams::default(), &Patch::Merge(patch)).await?;
    let generation = patched.metadata.generation.unwrap_or_default();
    let live = |device: Option<&Device>| {
        device
            .is_some_and(|device| is_live(device) && device.status.as_ref().is_some_and(|status| status.observed_generation == generation))
    };
    tokio::time::timeout(LONGEST, await_condition(fleet.devices(), name, live)).await.with_context(|| format!("{name} is not live"))??;
    Ok(begin.elapsed())
}

/// Measures changes one after another.
pub async fn single(fleet: &Fleet<'_>, arguments: &Arguments) -> anyhow::Result<()> {
    heading("single changes");
    let mut taken = Vec::new();
    for number in 0..arguments.changes {
        let name = device_name(number * arguments.devices / arguments.changes.max(1));
        taken.push(until_live(fleet, &name, &change(number)).await?);
    }
    times("from the change until CredentialsLive", taken);
    Ok(())
}

/// Changes one percent of the devices per minute, evenly distributed.
pub async fn churn(fleet: &Fleet<'_>, operator: &Operator, arguments: &Arguments) -> anyhow::Result<()> {
    heading(&format!("churn: one device of a hundred a minute, for {} minutes", arguments.churn_minutes));
    let a_minute = (arguments.devices / 100).max(1);
    let count = a_minute * usize::try_from(arguments.churn_minutes)?;
    let pause = Duration::from_mins(1) / u32::try_from(a_minute)?;
    let before = operator.look().await?;
    let mark = Mark::now()?;
    let begin = Instant::now();
    let shared = Arc::new(fleet.devices());
    let mut running = JoinSet::new();
    for number in 0..count {
        tokio::time::sleep_until((begin + pause * u32::try_from(number)?).into()).await;
        // A stride over the devices, so that the changes are distributed over all Gateways and shards.
        let name = device_name(number.wrapping_mul(7919) % arguments.devices);
        let devices = Arc::clone(&shared);
        running.spawn(async move { change_of(&devices, &name, number).await });
        if number % a_minute == 0 {
            progress(&format!("minute {} of {}", number / a_minute + 1, arguments.churn_minutes));
        }
    }
    let taken: Vec<Duration> = running.join_all().await.into_iter().collect::<anyhow::Result<_>>()?;
    let after = operator.look().await?;
    times("from the change until CredentialsLive", taken);
    let writes = mark.writes(fleet.namespace)?;
    #[allow(clippy::cast_precision_loss, reason = "counts of writes")]
    row("writes a change", &format!("{:.2}", writes.len() as f64 / count as f64));
    let share = (after.cpu_seconds - before.cpu_seconds) / begin.elapsed().as_secs_f64();
    row("operator: processors", &format!("{share:.3}"));
    row("operator: memory", &format!("{:.0} MiB", after.mebibytes));
    Ok(())
}

async fn change_of(devices: &kube::Api<Device>, name: &str, number: usize) -> anyhow::Result<Duration> {
    let begin = Instant::now();
    let patched = devices.patch(name, &PatchParams::default(), &Patch::Merge(change(number))).await?;
    let generation = patched.metadata.generation.unwrap_or_default();
    // A later change of the same Device also confirms this one.
    let live = |device: Option<&Device>| {
        device
            .is_some_and(|device| is_live(device) && device.status.as_ref().is_some_and(|status| status.observed_generation >= generation))
    };
    tokio::time::timeout(LONGEST, await_condition(devices.clone(), name, live)).await.with_context(|| format!("{name} is not live"))??;
    Ok(begin.elapsed())
}

/// Time from the request that disables a Device until its connection is closed, while all devices are connected. A further client
/// of the same broker sends requests continuously, to measure how long the reload blocks the broker.
pub async fn revoke(fleet: &Fleet<'_>, clients: &Clients, arguments: &Arguments) -> anyhow::Result<()> {
    heading(&format!("revocation with {} devices connected", clients.connected()));
    let mut taken = Vec::new();
    let mut held = Vec::new();
    for number in 0..arguments.changes {
        let index = number * arguments.devices / arguments.changes.max(1);
        let prober = Prober::start(clients, &gateway_of(index, arguments.gateways)).await?;
        let begin = Instant::now();
        let patch = Patch::Merge(json!({"spec": {"enabled": false}}));
        fleet.devices().patch(&device_name(index), &PatchParams::default(), &patch).await?;
        let closed = clients.closed(index, LONGEST).await.with_context(|| format!("{} is still connected", device_name(index)))?;
        taken.push(closed.duration_since(begin));
        held.push(prober.stop().await?);
    }
    times("from the call until the session's end", taken);
    times("longest answer of the broker around a reload", held);
    Ok(())
}
