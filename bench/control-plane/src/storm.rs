//! All devices lose their connections and reconnect at once: the cost for the API server.

use std::time::{Duration, Instant};

use anyhow::Context as _;
use fleetwright_e2e::audit::Mark;
use k8s_openapi::api::core::v1::ConfigMap;
use kube::Client;
use kube::api::{Api, ObjectMeta, Patch, PatchParams, PostParams};
use serde_json::json;
use tokio::sync::oneshot;

use crate::clients::Clients;
use crate::fleet::Fleet;
use crate::operator::Operator;
use crate::report::{heading, rate_row, row, times};

/// Duration of the measurement.
const WATCHED: Duration = Duration::from_mins(1);

/// Name of the object that is read and written to measure the latency of the API server.
const PROBE: &str = "bench-probe";

/// Closes all connections and opens them again, while the latency of the API server is measured.
pub async fn measure(fleet: &Fleet<'_>, operator: &Operator, clients: &mut Clients) -> anyhow::Result<()> {
    heading("storm: all devices reconnect at once");
    let mark = Mark::now()?;
    let (stop, stopped) = oneshot::channel();
    let probing = tokio::spawn(probe(fleet.cluster.client.clone(), fleet.namespace.to_owned(), stopped));
    let begin = Instant::now();
    clients.cut();
    let time = clients.reconnect().await?;
    rate_row("all connected again", time, clients.connected());
    operator.watched(tokio::time::sleep_until((begin + WATCHED).into())).await;
    let _ = stop.send(());
    let (reads, writes) = probing.await.context("the probe ended")??;
    times("API server: read", reads);
    times("API server: write", writes);
    let written = mark.writes(fleet.namespace)?.len();
    #[allow(clippy::cast_precision_loss, reason = "a count of writes")]
    row("writes in that minute", &format!("{written} ({:.1} /s)", written as f64 / WATCHED.as_secs_f64()));
    Ok(())
}

async fn probe(client: Client, namespace: String, mut stopped: oneshot::Receiver<()>) -> anyhow::Result<(Vec<Duration>, Vec<Duration>)> {
    let api = Api::<ConfigMap>::namespaced(client, &namespace);
    let metadata = ObjectMeta { name: Some(PROBE.to_owned()), ..ObjectMeta::default() };
    api.create(&PostParams::default(), &ConfigMap { metadata, ..ConfigMap::default() }).await?;
    let (mut reads, mut writes) = (Vec::new(), Vec::new());
    loop {
        let begin = Instant::now();
        api.get(PROBE).await?;
        reads.push(begin.elapsed());
        let begin = Instant::now();
        let patch = json!({"data": {"count": writes.len().to_string()}});
        api.patch(PROBE, &PatchParams::default(), &Patch::Merge(patch)).await?;
        writes.push(begin.elapsed());
        if tokio::time::timeout(Duration::from_millis(20), &mut stopped).await.is_ok() {
            return Ok((reads, writes));
        }
    }
}
