//! Cleans up a deleted Pipeline outside the cluster within a bounded time, so that no database blocks the deletion of a namespace.

use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use k8s_openapi::api::apps::v1::StatefulSet;
use kube::api::DeleteParams;
use kube::{Client, ResourceExt};
use tokio::time::{Instant, sleep, timeout};

use super::database::{Database, Databases};
use super::observe::{cause, read_uri};
use super::sessions::{self, Unread};
use crate::api::condition::Cause;
use crate::api::reason::Reason;
use crate::api::{Pipeline, name};
use crate::operator::kubernetes::apply::{WriteError, Writer, read};
use crate::operator::twin_sync::external::SharedExternals;
use crate::runtime::error::chain;
use crate::sink::timescale::execute::{ExecuteError, release};

/// Time after the deletion of a Pipeline for which the operator tries to read its sessions and to release its table.
const PATIENCE: Duration = Duration::from_secs(30);

/// Pause between attempts.
const PAUSE: Duration = Duration::from_secs(1);

/// Timeout for the workers to end: the grace period of a pod is 30 s.
const MAX_WORKERS_END: Duration = Duration::from_secs(40);

/// Interval between checks that the workers have ended.
const REQUEUE_AFTER: Duration = Duration::from_millis(250);

/// Releases or drops the table, according to the Pipeline's deletion policy.
///
/// # Errors
/// The cause of a failure or timeout. A Pipeline that never had a table causes no error.
pub async fn release_table(client: &Client, databases: &Databases, pipeline: &Pipeline) -> Result<(), Cause> {
    persist(pipeline, || attempt(client, databases, pipeline)).await
}

/// The sessions of a Pipeline with external brokers, and the database that stores them.
///
/// # Errors
/// The cause of a failure or timeout. A Pipeline that never had a table causes no error.
pub async fn sessions(
    client: &Client,
    databases: &Databases,
    externals: &SharedExternals,
    pipeline: &Pipeline,
) -> Result<Option<(Arc<Database>, Vec<Unread>)>, Cause> {
    // Without an external broker the database is not needed.
    if externals.logins(&pipeline.namespace().unwrap_or_default()).is_empty() {
        return Ok(None);
    }
    let read = || async {
        let database = database(client, databases, pipeline).await?;
        let unread = sessions::unread(&database, externals, pipeline, &[]).await?;
        Ok((!unread.is_empty()).then_some((database, unread)))
    };
    persist(pipeline, read).await
}

/// Retries until it succeeds or [`PATIENCE`] has passed. If the Pipeline never had a table, a failure means that nothing needs
/// cleanup.
async fn persist<T: Default, F>(pipeline: &Pipeline, attempt: impl Fn() -> F) -> Result<T, Cause>
where
    F: Future<Output = Result<T, Cause>>,
{
    let deadline = Instant::now() + remaining(pipeline, Timestamp::now());
    let has_table = pipeline.status.as_ref().is_some_and(|status| status.table.is_some());
    loop {
        // An attempt in progress at the deadline may still succeed.
        let failure = match timeout(PATIENCE, attempt()).await {
            Ok(Ok(done)) => return Ok(done),
            Ok(Err(cause)) => cause,
            Err(_) => Cause::new(Reason::DatabaseUnavailable, "the database does not answer"),
        };
        if !has_table {
            return Ok(T::default());
        }
        if Instant::now() + PAUSE > deadline {
            return Err(failure);
        }
        sleep(PAUSE).await;
    }
}

/// The rest of [`PATIENCE`], robust against differences between the clocks of the API server and of this process.
fn remaining(pipeline: &Pipeline, now: Timestamp) -> Duration {
    let deleted = pipeline.metadata.deletion_timestamp.as_ref().map_or(now, |time| time.0);
    let passed = Duration::try_from(now.duration_since(deleted)).unwrap_or_default();
    PATIENCE.saturating_sub(passed)
}

/// Deletes the workers, and waits until they have ended: with a timeout, because a node may be lost.
///
/// # Errors
/// If a call to the API server fails.
pub async fn end_workers(client: &Client, writer: &Writer, pipeline: &Pipeline) -> Result<(), WriteError> {
    let (namespace, name) = (pipeline.namespace().unwrap_or_default(), name::ingest(&pipeline.name_any()));
    let until = Instant::now() + MAX_WORKERS_END;
    while let Some(workers) = read::<StatefulSet>(client, &namespace, &name).await? {
        let ours = workers.owner_references().iter().any(|reference| Some(&reference.uid) == pipeline.metadata.uid.as_ref());
        if !ours || Instant::now() > until {
            break;
        }
        if workers.metadata.deletion_timestamp.is_none() {
            // The StatefulSet remains until its pods have ended.
            writer.delete_with::<StatefulSet>(&namespace, &name, &DeleteParams::foreground()).await?;
        }
        sleep(REQUEUE_AFTER).await;
    }
    Ok(())
}

/// The Pipeline's database.
///
/// # Errors
/// The cause why its URI is not available.
pub async fn database(client: &Client, databases: &Databases, pipeline: &Pipeline) -> Result<Arc<Database>, Cause> {
    let owner = databases.owner(pipeline);
    match read_uri(client, pipeline).await.map_err(|error| Cause::new(error.reason(), chain(&error)))? {
        Ok(uri) => Ok(databases.obtain(&owner, &uri)),
        // A namespace in deletion loses its Secrets before its Pipelines are finalized.
        Err(cause) => databases.last(&owner).ok_or(cause),
    }
}

async fn attempt(client: &Client, databases: &Databases, pipeline: &Pipeline) -> Result<(), Cause> {
    let owner = databases.owner(pipeline);
    let database = database(client, databases, pipeline).await?;
    let mut session = database.session().await?;
    let spec = &pipeline.spec;
    let released = release(session.client()?, &owner, &spec.sink.timescale.table, spec.deletion_policy).await;
    released.map_err(|error| {
        if matches!(error, ExecuteError::AwaitAnswer { .. }) {
            session.discard();
        }
        cause(&error)
    })
}

#[cfg(test)]
mod tests {
    use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
    use serde_json::json;

    use super::*;
    use crate::operator::pipeline::validate::tests::pipeline;

    #[test]
    fn the_time_for_cleanup_is_bounded_for_any_clock() {
        let now = Timestamp::from_second(1_000_000).unwrap();
        for (deleted, expected) in [(1_000_000, 30), (999_990, 20), (999_000, 0), (2_000_000, 30), (0, 0)] {
            let mut pipeline = pipeline(json!({}));
            pipeline.metadata.deletion_timestamp = Some(Time(Timestamp::from_second(deleted).unwrap()));
            assert_eq!(remaining(&pipeline, now), Duration::from_secs(expected), "{deleted}");
        }
    }

    #[tokio::test]
    async fn a_database_error_is_reported_only_if_the_pipeline_had_a_table() {
        let away = || Cause::new(Reason::DatabaseUnavailable, "connection refused");
        // Whether the Pipeline had a table, the result of the last attempt -> the reported result.
        for (table, last, expected) in
            [(true, Ok(7), Ok(7)), (true, Err(away()), Err(away())), (false, Ok(7), Ok(7)), (false, Err(away()), Ok(0))]
        {
            let mut pipeline = pipeline(json!({}));
            pipeline.metadata.deletion_timestamp = Some(Time(Timestamp::UNIX_EPOCH));
            pipeline.status = Some(serde_json::from_value(json!({"table": table.then_some("public.readings"), "conditions": []})).unwrap());
            assert_eq!(persist(&pipeline, || std::future::ready(last.clone())).await, expected, "{table} {last:?}");
        }
    }
}
