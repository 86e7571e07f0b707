use k8s_openapi::api::apps::v1::{StatefulSet, StatefulSetStatus};
use kube::api::ObjectMeta;
use serde_json::json;

use super::*;
use crate::api::condition::{READY, RECONCILING, STALLED};
use crate::operator::pipeline::validate::tests::pipeline;

fn live(generation: i64, replicas: i32, ready: i32, updated: bool) -> Box<StatefulSet> {
    let status = StatefulSetStatus {
        observed_generation: Some(3),
        replicas,
        ready_replicas: Some(ready),
        updated_replicas: Some(if updated { replicas } else { 0 }),
        current_revision: Some("a".to_owned()),
        update_revision: Some(if updated { "a" } else { "b" }.to_owned()),
        ..StatefulSetStatus::default()
    };
    let metadata = ObjectMeta { name: Some("vibration-ingest".to_owned()), generation: Some(generation), ..ObjectMeta::default() };
    Box::new(StatefulSet { metadata, status: Some(status), ..StatefulSet::default() })
}

fn applied(live: Box<StatefulSet>, wanted: i32, paused: bool) -> WorkersOutcome {
    WorkersOutcome::Applied { live, wanted, paused }
}

fn ready_table() -> TableOutcome {
    TableOutcome::Ready { kept: vec![] }
}

fn outcome(table: TableOutcome, workers: WorkersOutcome) -> Outcome {
    Outcome::Accepted { table, workers, sources: Sources { gateways: 2, sessions: 2 }, dead_letters: DeadLetterView::default() }
}

/// Status and reason of a condition, as `True/Reading`; `None` if it is absent.
fn condition(status: &PipelineStatus, type_: &str) -> Option<String> {
    let found = status.conditions.iter().find(|condition| condition.type_ == type_)?;
    assert_eq!(found.observed_generation, Some(2), "{type_}");
    Some(format!("{}/{}", found.status, found.reason))
}

fn cause() -> Cause {
    Cause::new(Reason::DatabaseRefused, "of a reason")
}

#[test]
fn conditions_follow_from_the_outcome_of_table_and_workers() {
    let running = || applied(live(3, 1, 1, true), 1, false);
    let failed = |stalled| TableOutcome::Failed { cause: cause(), stalled };
    for (outcome, ready, kind, table, workers) in [
        (outcome(ready_table(), running()), "True/Reading", None, "True/TableReady", "True/WorkersAvailable"),
        (
            outcome(TableOutcome::Ready { kept: vec!["old".to_owned()] }, running()),
            "True/Reading",
            None,
            "True/ColumnsKept",
            "True/WorkersAvailable",
        ),
        (
            outcome(TableOutcome::Unknown(cause()), running()),
            "False/DatabaseRefused",
            Some(RECONCILING),
            "Unknown/DatabaseRefused",
            "True/WorkersAvailable",
        ),
        (outcome(failed(false), running()), "False/DatabaseRefused", Some(RECONCILING), "False/DatabaseRefused", "True/WorkersAvailable"),
        (outcome(failed(true), running()), "False/DatabaseRefused", Some(STALLED), "False/DatabaseRefused", "True/WorkersAvailable"),
        (
            outcome(ready_table(), WorkersOutcome::Awaiting(cause())),
            "False/DatabaseRefused",
            Some(RECONCILING),
            "True/TableReady",
            "False/DatabaseRefused",
        ),
        // Not observed yet, of the last revision, not ready, still scaling.
        (
            outcome(ready_table(), applied(live(4, 1, 1, true), 1, false)),
            "False/WorkersNotReady",
            Some(RECONCILING),
            "True/TableReady",
            "False/WorkersNotReady",
        ),
        (
            outcome(ready_table(), applied(live(3, 1, 1, false), 1, false)),
            "False/WorkersNotReady",
            Some(RECONCILING),
            "True/TableReady",
            "False/WorkersNotReady",
        ),
        (
            outcome(ready_table(), applied(live(3, 1, 0, true), 1, false)),
            "False/WorkersNotReady",
            Some(RECONCILING),
            "True/TableReady",
            "False/WorkersNotReady",
        ),
        (
            outcome(ready_table(), applied(live(3, 0, 0, true), 1, false)),
            "False/WorkersNotReady",
            Some(RECONCILING),
            "True/TableReady",
            "False/WorkersNotReady",
        ),
        (
            outcome(ready_table(), applied(Box::default(), 1, false)),
            "False/WorkersNotReady",
            Some(RECONCILING),
            "True/TableReady",
            "False/WorkersNotReady",
        ),
        (outcome(ready_table(), applied(live(3, 0, 0, true), 0, true)), "True/Paused", None, "True/TableReady", "True/Paused"),
        (
            outcome(ready_table(), applied(live(3, 1, 1, true), 0, true)),
            "False/Pausing",
            Some(RECONCILING),
            "True/TableReady",
            "False/Pausing",
        ),
        (
            outcome(failed(false), applied(live(3, 0, 0, true), 0, true)),
            "False/DatabaseRefused",
            Some(RECONCILING),
            "False/DatabaseRefused",
            "True/Paused",
        ),
        (
            Outcome::Accepted {
                table: ready_table(),
                workers: applied(live(3, 0, 0, true), 0, false),
                sources: Sources { gateways: 0, sessions: 0 },
                dead_letters: DeadLetterView::default(),
            },
            "False/NoGatewaySelected",
            Some(RECONCILING),
            "True/TableReady",
            "False/NoGatewaySelected",
        ),
    ] {
        let status = status(&pipeline(json!({})), &outcome);
        assert_eq!(condition(&status, READY).as_deref(), Some(ready), "{outcome:?}");
        assert_eq!(condition(&status, TABLE_READY).as_deref(), Some(table), "{outcome:?}");
        assert_eq!(condition(&status, WORKERS_AVAILABLE).as_deref(), Some(workers), "{outcome:?}");
        assert_eq!(condition(&status, ACCEPTED).as_deref(), Some("True/Accepted"));
        for other in [RECONCILING, STALLED] {
            assert_eq!(condition(&status, other).is_some(), kind == Some(other), "{other}: {outcome:?}");
        }
        assert_eq!(status.observed_generation, 2);
    }
}

#[test]
fn a_refused_spec_is_stalled() {
    let status = status(&pipeline(json!({})), &Outcome::Refused(cause()));
    assert_eq!(condition(&status, ACCEPTED).as_deref(), Some("False/DatabaseRefused"));
    assert_eq!(condition(&status, STALLED).as_deref(), Some("True/DatabaseRefused"));
    assert_eq!(condition(&status, RECONCILING), None);
}

#[test]
fn a_pipeline_that_is_deleted_is_not_ready() {
    let mut pipeline = pipeline(json!({}));
    pipeline.status = Some(status(&pipeline, &outcome(ready_table(), applied(live(3, 1, 1, true), 1, false))));
    let status = status(&pipeline, &Outcome::Deleting);
    assert_eq!(condition(&status, READY).as_deref(), Some("False/Deleting"));
    assert_eq!(condition(&status, RECONCILING).as_deref(), Some("True/Deleting"));
    assert_eq!(status.table.as_deref(), Some("public.vibration"), "the release needs the name of the table");
}

#[test]
fn unknown_numbers_keep_their_last_status() {
    let mut pipeline = pipeline(json!({}));
    let first = status(&pipeline, &outcome(ready_table(), applied(live(3, 1, 0, true), 1, false)));
    assert_eq!((first.table.as_deref(), first.gateways, first.workers.as_deref()), (Some("public.vibration"), Some(2), Some("0/1")));
    pipeline.status = Some(first.clone());
    let second = status(&pipeline, &outcome(TableOutcome::Unknown(cause()), WorkersOutcome::Awaiting(cause())));
    assert_eq!((second.table, second.workers), (first.table, first.workers));
}

#[test]
fn the_status_does_not_change_while_the_outcome_is_the_same() {
    let mut pipeline = pipeline(json!({}));
    for outcome in [
        outcome(ready_table(), applied(live(3, 1, 1, true), 1, false)),
        outcome(TableOutcome::Unknown(cause()), WorkersOutcome::Awaiting(cause())),
        Outcome::Refused(cause()),
        Outcome::Deleting,
    ] {
        let first = status(&pipeline, &outcome);
        pipeline.status = Some(first.clone());
        assert_eq!(status(&pipeline, &outcome), first);
    }
}

#[test]
fn sources_are_formatted_with_their_numbers() {
    for (gateways, sessions, expected) in [(1, 1, "1 Gateway"), (2, 2, "2 Gateways"), (2, 5, "2 Gateways in 5 sessions")] {
        assert_eq!(Sources { gateways, sessions }.to_string(), expected);
    }
}

#[test]
fn a_batch_that_keeps_failing_is_reported() {
    let of = |ready: i32, write_failure: Option<&str>| {
        let dead_letters = DeadLetterView { write_failure: write_failure.map(str::to_owned), ..DeadLetterView::default() };
        let (table, workers) = (ready_table(), applied(live(3, 1, ready, true), 1, false));
        let outcome = Outcome::Accepted { table, workers, sources: Sources { gateways: 2, sessions: 2 }, dead_letters };
        let status = status(&pipeline(json!({})), &outcome);
        (condition(&status, WORKERS_AVAILABLE).unwrap(), status.conditions.iter().any(|condition| condition.message.contains("disk full")))
    };
    assert_eq!(of(1, Some("disk full")), ("False/BatchFailing".to_owned(), true));
    assert_eq!(of(0, Some("disk full")), ("False/BatchFailing".to_owned(), true));
    assert_eq!(of(1, None), ("True/WorkersAvailable".to_owned(), false));
}
