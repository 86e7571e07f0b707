//! The running operator: its resource use and its restart.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use fleetwright_e2e::cluster::SYSTEM_NAMESPACE;
use fleetwright_e2e::fault::is_ready;
use fleetwright_e2e::metrics;
use k8s_openapi::api::core::v1::Pod;
use kube::ResourceExt;
use kube::api::{Api, DeleteParams, ListParams};

use crate::cluster::Cluster;

const SELECTOR: &str = "app.kubernetes.io/name=fleetwright,app.kubernetes.io/component=operator";

/// Resource use of the operator.
#[derive(Clone, Copy, Debug)]
pub struct Look {
    /// Resident memory.
    pub mebibytes: f64,
    /// Processor time since its start.
    pub cpu_seconds: f64,
}

/// The operator's pod.
pub struct Operator {
    pods: Api<Pod>,
    peak_bytes: AtomicU64,
}

impl Operator {
    /// The operator of the cluster.
    pub fn new(cluster: &Cluster) -> Self {
        Self { pods: Api::namespaced(cluster.client.clone(), SYSTEM_NAMESPACE), peak_bytes: AtomicU64::new(0) }
    }

    async fn pod(&self) -> anyhow::Result<Pod> {
        let listed = self.pods.list(&ListParams::default().labels(SELECTOR)).await?;
        listed.items.into_iter().find(|pod| pod.metadata.deletion_timestamp.is_none()).context("no pod of the operator")
    }

    /// Reads all metrics as text.
    async fn metrics(&self) -> anyhow::Result<String> {
        metrics::scrape(&self.pod().await?).await
    }

    /// Reads the current resource use.
    pub async fn look(&self) -> anyhow::Result<Look> {
        let text = self.metrics().await?;
        let bytes = sum(&text, "process_resident_memory_bytes");
        #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "bytes of memory")]
        self.peak_bytes.fetch_max(bytes as u64, Ordering::Relaxed);
        Ok(Look { mebibytes: bytes / 1_048_576.0, cpu_seconds: sum(&text, "process_cpu_seconds_total") })
    }

    /// The greatest memory use measured.
    #[allow(clippy::cast_precision_loss, reason = "bytes of memory")]
    pub fn peak_mebibytes(&self) -> f64 {
        self.peak_bytes.load(Ordering::Relaxed) as f64 / 1_048_576.0
    }

    /// Measures every second while the benchmark runs.
    pub async fn watched<T>(&self, work: impl Future<Output = T>) -> T {
        let looks = async {
            loop {
                tokio::time::sleep(Duration::from_secs(1)).await;
                // The operator cannot be measured during a restart.
                let _ = self.look().await;
            }
        };
        tokio::select! {
            done = work => done,
            () = looks => unreachable!("looks never end"),
        }
    }

    /// Deletes the pod, and waits until the new one has listed all objects and is ready. Returns the duration of the lists.
    pub async fn restart(&self) -> anyhow::Result<Duration> {
        let old = self.pod().await?;
        self.pods.delete(&old.name_any(), &DeleteParams::default()).await?;
        let deadline = Instant::now() + Duration::from_mins(10);
        loop {
            let new = self.pod().await.ok().filter(|pod| pod.uid() != old.uid());
            // Readiness is not sufficient: a pod that waits for the Lease is also ready.
            if new.is_some_and(|pod| is_ready(&pod))
                && let Ok(text) = self.metrics().await
                && let listing = sum(&text, "fleetwright_device_listing_seconds")
                && listing > 0.0
            {
                return Ok(Duration::from_secs_f64(listing));
            }
            ensure!(Instant::now() < deadline, "the operator is not ready again");
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
    }
}

fn sum(metrics: &str, name: &str) -> f64 {
    let of = |line: &str| {
        let rest = line.strip_prefix(name)?;
        rest.starts_with([' ', '{']).then(|| rest.rsplit(' ').next()?.parse::<f64>().ok())?
    };
    metrics.lines().filter_map(of).sum()
}
