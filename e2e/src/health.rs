//! The health of objects as Flux, Helm and Argo CD compute it, with their own code (`e2e/health`).

use std::process::Stdio;

use anyhow::{Context, Result, ensure};
use kube::api::DynamicObject;
use serde::Deserialize;
use tokio::io::AsyncWriteExt;
use tokio::process::Command;

use crate::cluster::health_script;

/// A health assessment.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq)]
pub struct Verdict {
    /// kstatus: `Current`, `InProgress`, `Failed`, `Terminating`, `NotFound`, `Unknown`; Argo CD: `Healthy`, `Progressing`,
    /// `Degraded`, `Suspended`, `Missing`, `Unknown`.
    pub status: String,

    /// The reason for the assessment.
    pub message: String,
}

/// The assessments of all tools.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq)]
pub struct Health {
    /// Flux and Helm.
    pub kstatus: Verdict,

    /// Argo CD, with the script that Fleetwright ships.
    pub argocd: Verdict,
}

impl Health {
    /// Whether any tool reports the object as healthy.
    #[must_use]
    pub fn is_healthy_to_anyone(&self) -> bool {
        self.kstatus.status == "Current" || self.argocd.status == "Healthy"
    }

    /// Whether all tools report the object as healthy.
    #[must_use]
    pub fn is_healthy_to_all(&self) -> bool {
        self.kstatus.status == "Current" && self.argocd.status == "Healthy"
    }

    /// Whether all tools report the object as failed.
    #[must_use]
    pub fn has_failed_to_all(&self) -> bool {
        self.kstatus.status == "Failed" && self.argocd.status == "Degraded"
    }
}

/// Computes the health of an object.
pub async fn judge(object: &DynamicObject) -> Result<Health> {
    let mut child =
        Command::new(health_script()).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().context("failed to start health.sh")?;
    let mut input = child.stdin.take().context("no standard input")?;
    input.write_all(&serde_json::to_vec(object)?).await?;
    drop(input);
    let output = child.wait_with_output().await?;
    ensure!(output.status.success(), "health.sh failed with {}", output.status);
    serde_json::from_slice(&output.stdout).context("failed to parse the output of health.sh")
}
