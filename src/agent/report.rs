//! Reports the broker's verified state to the operator: one key of one ConfigMap, written only when it changes.

use std::collections::BTreeMap;
use std::time::Duration;

use k8s_openapi::api::core::v1::ConfigMap;
use kube::api::{Patch, PatchParams};
use kube::{Api, Client};
use serde_json::json;
use tokio::sync::watch;
use tokio::time::timeout;
use tracing::{debug, warn};

use super::presentation::Presented;
use crate::api::name::agent_report;
use crate::configuration::agent::{AgentConfiguration, AgentReport, Fullness, REPORT_KEY};
use crate::runtime::backoff::Backoff;
use crate::runtime::error::chain;

/// Timeout of a call to the API server.
const TIMEOUT: Duration = Duration::from_secs(10);

/// Delays after a failed call.
const INITIAL_DELAY: Duration = Duration::from_millis(200);
const MAX_DELAY: Duration = Duration::from_secs(10);

/// The inputs of the report. `None`: not known yet.
#[derive(Debug)]
pub struct ReportInputs {
    /// The verified revision of each shard.
    pub proven: watch::Receiver<Option<BTreeMap<usize, String>>>,
    /// The certificates that it presents.
    pub presented: watch::Receiver<Option<Presented>>,
    /// Whether the broker has dropped messages.
    pub has_dropped: watch::Receiver<bool>,
    /// The limit that the broker has reached.
    pub fullness: watch::Receiver<Option<Fullness>>,
}

/// A new agent keeps the values of the previous agent's report until it has its own.
struct ObservedReport {
    shards: BTreeMap<usize, String>,
    certificates: Option<Presented>,
    messages_dropped: bool,
    fullness: Option<Fullness>,
}

impl ReportInputs {
    /// `None` before the first verification.
    fn report(&mut self) -> Option<ObservedReport> {
        Some(ObservedReport {
            certificates: self.presented.borrow_and_update().clone(),
            messages_dropped: *self.has_dropped.borrow_and_update(),
            fullness: self.fullness.borrow_and_update().clone(),
            shards: self.proven.borrow_and_update().clone()?,
        })
    }

    async fn changed(&mut self) -> Result<(), watch::error::RecvError> {
        tokio::select! {
            changed = self.proven.changed() => changed,
            changed = self.presented.changed() => changed,
            changed = self.has_dropped.changed() => changed,
            changed = self.fullness.changed() => changed,
        }
    }
}

/// Reports all inputs until one of their senders is dropped.
pub async fn run(client: Client, configuration: AgentConfiguration, mut inputs: ReportInputs) {
    let api = Api::<ConfigMap>::namespaced(client, &configuration.namespace);
    let name = agent_report(&configuration.gateway);
    let mut known: Option<String> = None;
    let mut backoff = Backoff::new(INITIAL_DELAY, MAX_DELAY);
    loop {
        if let Some(report) = inputs.report()
            && let Err(error) = write(&api, &name, report, &mut known).await
        {
            warn!(error, "failed to report to the operator: trying again");
            known = None;
            backoff.wait().await;
            continue;
        }
        backoff.reset();
        if inputs.changed().await.is_err() {
            return;
        }
    }
}

/// Writes the report if the API server has a different one. `known` is the last known content there.
async fn write(api: &Api<ConfigMap>, name: &str, report: ObservedReport, known: &mut Option<String>) -> Result<(), String> {
    if known.is_none() {
        let found = call(api.get(name)).await?;
        *known = found.data.and_then(|mut data| data.remove(REPORT_KEY));
    }
    // An unreadable report counts as missing.
    let before = known.as_ref().and_then(|known| serde_json::from_str::<AgentReport>(known).ok()).unwrap_or_default();
    let wanted = AgentReport {
        shards: report.shards,
        certificates: report.certificates.unwrap_or(before.certificates),
        messages_dropped: report.messages_dropped,
        fullness: report.fullness.unwrap_or(before.fullness),
    };
    let wanted = serde_json::to_string(&wanted).map_err(|error| chain(&error))?;
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
