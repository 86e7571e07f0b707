//! Tells the operator what the broker has proven: one key of one ConfigMap, written only when it changes.

use std::collections::BTreeMap;
use std::time::Duration;

use k8s_openapi::api::core::v1::ConfigMap;
use kube::api::{Patch, PatchParams};
use kube::{Api, Client};
use serde_json::json;
use tokio::sync::watch;
use tokio::time::{sleep, timeout};
use tracing::{debug, warn};

use super::presentation::Presented;
use crate::api::name::agent_report;
use crate::configuration::agent::{AgentConfiguration, AgentReport, REPORT_KEY};
use crate::runtime::error::chain;

/// The longest a call to the API server may take.
const TIMEOUT: Duration = Duration::from_secs(10);

/// The pauses after a failure: each twice the one before, and half of it by chance.
const FIRST_PAUSE: Duration = Duration::from_millis(200);
const LONGEST_PAUSE: Duration = Duration::from_secs(10);

/// Follows what is proven and what was dropped, until either sender is gone.
pub async fn run(
    client: Client,
    configuration: AgentConfiguration,
    mut proven: watch::Receiver<Option<BTreeMap<usize, String>>>,
    mut presented: watch::Receiver<Option<Presented>>,
    mut has_dropped: watch::Receiver<bool>,
) {
    let api = Api::<ConfigMap>::namespaced(client, &configuration.namespace);
    let name = agent_report(&configuration.gateway);
    let mut known: Option<String> = None;
    let mut pause = FIRST_PAUSE;
    loop {
        let shards = proven.borrow_and_update().clone();
        let certificates = presented.borrow_and_update().clone();
        let messages_dropped = *has_dropped.borrow_and_update();
        if let Some(shards) = shards
            && let Err(error) =
                tell(&api, &name, AgentReport { shards, messages_dropped, ..AgentReport::default() }, certificates, &mut known).await
        {
            warn!(error, "failed to report to the operator: trying again");
            known = None;
            sleep(pause / 2 + (pause / 2).mul_f64(rand::random())).await;
            pause = (pause * 2).min(LONGEST_PAUSE);
            continue;
        }
        pause = FIRST_PAUSE;
        let changed = tokio::select! {
            changed = proven.changed() => changed,
            changed = presented.changed() => changed,
            changed = has_dropped.changed() => changed,
        };
        if changed.is_err() {
            return;
        }
    }
}

/// Writes the report where the API server has another. `known` is what it has, as far as that is known. Before an agent that has
/// just started knows what the broker presents, that stays as the one before it said.
async fn tell(
    api: &Api<ConfigMap>,
    name: &str,
    mut report: AgentReport,
    certificates: Option<Presented>,
    known: &mut Option<String>,
) -> Result<(), String> {
    if known.is_none() {
        let found = call(api.get(name)).await?;
        *known = found.data.and_then(|mut data| data.remove(REPORT_KEY));
    }
    let before = || known.as_ref().and_then(|known| serde_json::from_str::<AgentReport>(known).ok());
    report.certificates = certificates.or_else(|| before().map(|report| report.certificates)).unwrap_or_default();
    let wanted = serde_json::to_string(&report).map_err(|error| chain(&error))?;
    if known.as_ref() != Some(&wanted) {
        let patch = Patch::Merge(json!({"data": {REPORT_KEY: wanted}}));
        call(api.patch(name, &PatchParams::default(), &patch)).await?;
        debug!(report = wanted, "reported");
        *known = Some(wanted);
    }
    Ok(())
}

async fn call<T>(request: impl Future<Output = kube::Result<T>>) -> Result<T, String> {
    match timeout(TIMEOUT, request).await {
        Ok(result) => result.map_err(|error| chain(&error)),
        Err(_) => Err(format!("no answer from the API server in {} s", TIMEOUT.as_secs())),
    }
}
