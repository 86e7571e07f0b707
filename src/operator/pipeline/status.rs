//! The status from the outcome of a reconciliation: pure.

use std::fmt;

use k8s_openapi::api::apps::v1::StatefulSet;

use super::build::labels;
use super::dead_letter_status::DeadLetterView;
use crate::api::condition::{ACCEPTED, Cause, Finding, Readiness, TABLE_READY, WORKERS_AVAILABLE, conditions};
use crate::api::reason::Reason;
use crate::api::{Pipeline, PipelineStatus};

/// The outcome of a reconciliation.
#[derive(Debug)]
pub enum Outcome {
    /// The spec is invalid.
    Refused(Cause),
    /// The spec is accepted.
    Accepted {
        /// The table.
        table: TableOutcome,
        /// The workers.
        workers: WorkersOutcome,
        /// The sources of the workers.
        sources: Sources,
        /// The dead letters.
        dead_letters: DeadLetterView,
    },
    /// The Pipeline is being deleted.
    Deleting,
}

/// The sources of the workers.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Sources {
    /// Number of Gateways.
    pub gateways: usize,
    /// Number of sessions with their brokers: higher than the number of Gateways if sessions share a subscription.
    pub sessions: usize,
}

/// The state of the table.
#[derive(Clone, Debug)]
pub enum TableOutcome {
    /// The state is unknown.
    Unknown(Cause),
    /// The table does not match the spec.
    Failed {
        /// The cause.
        cause: Cause,
        /// Whether only a change of the Pipeline can resolve the cause.
        stalled: bool,
    },
    /// The table matches the spec. It keeps these columns, which are no longer in the spec.
    Ready {
        /// Names of the columns.
        kept: Vec<String>,
    },
}

/// The state of the workers.
#[derive(Clone, Debug)]
pub enum WorkersOutcome {
    /// The workers were not changed, because a prerequisite is missing.
    Awaiting(Cause),
    /// The workers are applied.
    Applied {
        /// The live StatefulSet.
        live: Box<StatefulSet>,
        /// Wanted number of workers.
        wanted: i32,
        /// Whether the Pipeline is paused.
        paused: bool,
    },
}

/// The status that follows from the outcome.
#[must_use]
pub fn status(pipeline: &Pipeline, outcome: &Outcome) -> PipelineStatus {
    let previous = pipeline.status.clone().unwrap_or_default();
    let generation = pipeline.metadata.generation.unwrap_or_default();
    let mut status = PipelineStatus { observed_generation: generation, ..previous.clone() };
    let (findings, readiness) = match outcome {
        Outcome::Refused(cause) => (vec![Finding::fails(ACCEPTED, cause.clone())], Readiness::Stalled(cause.clone())),
        Outcome::Deleting => {
            let cause = Cause::new(Reason::Deleting, "the table is being released");
            (Vec::new(), Readiness::Reconciling(cause))
        }
        Outcome::Accepted { table, workers, sources, dead_letters } => {
            let name = format!("public.{}", pipeline.spec.sink.timescale.table);
            status.gateways = i64::try_from(sources.gateways).ok();
            status.workers = workers.summary().or(status.workers);
            status.replicas = workers.replicas().or(status.replicas);
            status.selector = Some(selector(pipeline));
            if matches!(table, TableOutcome::Ready { .. }) {
                status.table = Some(name.clone());
            }
            status.dead_letters = dead_letters.counts;
            status.replay.clone_from(&dead_letters.replay);
            let (mut findings, readiness) = accepted(&name, table, workers, *sources, dead_letters.write_failure.as_deref());
            findings.extend(dead_letters.findings(&pipeline.spec.dead_letters.max_bytes_per_hour.0));
            (findings, readiness)
        }
    };
    status.conditions = conditions(&previous.conditions, generation, &findings, &readiness);
    status
}

fn accepted(
    name: &str,
    table: &TableOutcome,
    workers: &WorkersOutcome,
    sources: Sources,
    write_failure: Option<&str>,
) -> (Vec<Finding>, Readiness) {
    let mut findings = vec![Finding::holds(ACCEPTED, Reason::Accepted, "the spec is valid")];
    let (table_finding, table_failure) = match table {
        TableOutcome::Unknown(cause) => (Finding::unknown(TABLE_READY, cause.clone()), Some(Readiness::Reconciling(cause.clone()))),
        TableOutcome::Failed { cause, stalled: true } => {
            (Finding::fails(TABLE_READY, cause.clone()), Some(Readiness::Stalled(cause.clone())))
        }
        TableOutcome::Failed { cause, stalled: false } => {
            (Finding::fails(TABLE_READY, cause.clone()), Some(Readiness::Reconciling(cause.clone())))
        }
        TableOutcome::Ready { kept } if kept.is_empty() => {
            (Finding::holds(TABLE_READY, Reason::TableReady, format!("{name} matches the spec")), None)
        }
        TableOutcome::Ready { kept } => {
            let message = format!("{name} matches the spec; it keeps columns that the spec does not name: {}", kept.join(", "));
            (Finding::holds(TABLE_READY, Reason::ColumnsKept, message), None)
        }
    };
    findings.push(table_finding);
    let (workers_finding, workers_failure, ready) = workers.finding(name, sources, write_failure);
    findings.push(workers_finding);
    let readiness = table_failure.or(workers_failure.map(Readiness::Reconciling)).unwrap_or(Readiness::Ready(ready));
    (findings, readiness)
}

impl fmt::Display for Sources {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{} {}", self.gateways, if self.gateways == 1 { "Gateway" } else { "Gateways" })?;
        if self.sessions > self.gateways { write!(formatter, " in {} sessions", self.sessions) } else { Ok(()) }
    }
}

/// The labels of the workers' pods, as a selector in text.
fn selector(pipeline: &Pipeline) -> String {
    labels(pipeline).iter().map(|(key, value)| format!("{key}={value}")).collect::<Vec<_>>().join(",")
}

impl WorkersOutcome {
    /// Whether exactly the wanted workers run, with the current spec.
    #[must_use]
    pub fn is_settled(&self) -> bool {
        matches!(self, Self::Applied { live, wanted, .. } if is_settled(live, *wanted))
    }

    /// Existing workers.
    fn replicas(&self) -> Option<i32> {
        match self {
            Self::Awaiting(_) => None,
            Self::Applied { live, .. } => live.status.as_ref().map(|status| status.replicas),
        }
    }

    /// Ready workers, at most the wanted number.
    fn summary(&self) -> Option<String> {
        match self {
            Self::Awaiting(_) => None,
            Self::Applied { live, wanted, .. } => Some(format!("{}/{wanted}", ready_replicas(live))),
        }
    }

    /// The condition, the cause if it is false, and the cause of `Ready` if all conditions hold.
    fn finding(&self, table: &str, sources: Sources, write_failure: Option<&str>) -> (Finding, Option<Cause>, Cause) {
        let failed = |cause: Cause| (Finding::fails(WORKERS_AVAILABLE, cause.clone()), Some(cause.clone()), cause);
        match self {
            Self::Awaiting(cause) => failed(cause.clone()),
            Self::Applied { live, wanted, paused: true } if is_settled(live, *wanted) => {
                let cause = Cause::new(Reason::Paused, "paused: no worker runs, and the brokers queue messages");
                (Finding::holds(WORKERS_AVAILABLE, cause.reason, cause.message.clone()), None, cause)
            }
            Self::Applied { paused: true, .. } => {
                failed(Cause::new(Reason::Pausing, "the workers are storing the messages that they have read"))
            }
            Self::Applied { .. } if sources.gateways == 0 => failed(Cause::new(
                Reason::NoGatewaySelected,
                "spec.source.gatewaySelector matches no Gateway of this namespace: create one, or change the labels",
            )),
            Self::Applied { .. } if let Some(failure) = write_failure => {
                let message = format!("a worker cannot store a batch of messages, and tries again: {failure}");
                failed(Cause::new(Reason::BatchFailing, message))
            }
            Self::Applied { live, wanted, .. } if is_settled(live, *wanted) => {
                let read = Cause::new(Reason::Reading, format!("reading {sources} into {table}"));
                let message = "every worker has its sessions and has verified that it can write";
                (Finding::holds(WORKERS_AVAILABLE, Reason::WorkersAvailable, message), None, read)
            }
            Self::Applied { live, wanted, .. } => {
                let name = live.metadata.name.as_deref().unwrap_or_default();
                let message = format!(
                    "{} of {wanted} workers are ready with the current spec; `kubectl describe pod {name}-0` shows the cause",
                    if is_observed(live) { ready_replicas(live) } else { 0 }
                );
                failed(Cause::new(Reason::WorkersNotReady, message))
            }
        }
    }
}

fn ready_replicas(live: &StatefulSet) -> i32 {
    live.status.as_ref().and_then(|status| status.ready_replicas).unwrap_or(0)
}

/// Whether the StatefulSet's status has observed its current generation.
fn is_observed(live: &StatefulSet) -> bool {
    let observed = live.status.as_ref().and_then(|status| status.observed_generation);
    observed.is_some() && observed >= live.metadata.generation
}

/// Whether exactly the wanted workers run with the current spec, and all are ready.
fn is_settled(live: &StatefulSet, wanted: i32) -> bool {
    let Some(status) = live.status.as_ref().filter(|_| is_observed(live)) else {
        return false;
    };
    let updated = status.current_revision == status.update_revision || status.updated_replicas == Some(wanted);
    status.replicas == wanted && updated && status.ready_replicas.unwrap_or(0) == wanted
}

#[cfg(test)]
#[path = "status_tests.rs"]
mod tests;
