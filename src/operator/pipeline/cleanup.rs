//! What a Pipeline leaves behind outside the cluster, undone within a bounded time: no database holds up a namespace.

use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use k8s_openapi::api::apps::v1::StatefulSet;
use kube::api::DeleteParams;
use kube::{Client, ResourceExt};
use tokio::time::{Instant, sleep, timeout};

use super::database::{Database, Databases};
use super::observe::{cause, owner, read_uri};
use super::sessions::{self, Unread};
use crate::api::condition::Cause;
use crate::api::reason::Reason;
use crate::api::{Pipeline, name};
use crate::operator::kubernetes::apply::{WriteError, Writer, read};
use crate::operator::twin_sync::external::SharedExternals;
use crate::runtime::error::chain;
use crate::sink::timescale::execute::{ExecuteError, release};

/// How long after the deletion of a Pipeline its database is still asked for its sessions, and to release its table.
const PATIENCE: Duration = Duration::from_secs(30);

/// Pause between attempts.
const PAUSE: Duration = Duration::from_secs(1);

/// How long is waited for the workers to end: a pod is given 30 s.
const MAX_WORKERS_END: Duration = Duration::from_secs(40);

/// How often is looked whether they have.
const REQUEUE_AFTER: Duration = Duration::from_millis(250);

/// Releases or drops the table, as the Pipeline says.
///
/// # Errors
/// Why it could not be done in time. A Pipeline that never had a table has no such error.
pub async fn release_table(client: &Client, databases: &Databases, pipeline: &Pipeline) -> Result<(), Cause> {
    persist(pipeline, || attempt(client, databases, pipeline)).await
}

/// The sessions of a Pipeline with brokers that run elsewhere, and the database that told of them.
///
/// # Errors
/// Why they are not known in time. A Pipeline that never had a table has no such error.
pub async fn sessions(
    client: &Client,
    databases: &Databases,
    externals: &SharedExternals,
    pipeline: &Pipeline,
) -> Result<Option<(Arc<Database>, Vec<Unread>)>, Cause> {
    // Without such a broker no database needs to answer.
    if externals.logins(&owner(pipeline).namespace).is_empty() {
        return Ok(None);
    }
    let read = || async {
        let database = database(client, databases, pipeline).await?;
        let unread = sessions::unread(&database, externals, pipeline, &[]).await?;
        Ok((!unread.is_empty()).then_some((database, unread)))
    };
    persist(pipeline, read).await
}

/// Tries again and again until it succeeds, or [`PATIENCE`] with the database is over. Where there never was a table, a failure means that
/// nothing was left behind.
async fn persist<T: Default, F>(pipeline: &Pipeline, attempt: impl Fn() -> F) -> Result<T, Cause>
where
    F: Future<Output = Result<T, Cause>>,
{
    let deadline = Instant::now() + remaining(pipeline, Timestamp::now());
    let has_table = pipeline.status.as_ref().is_some_and(|status| status.table.is_some());
    loop {
        // An attempt that is under way at the deadline may still end well.
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

/// What is left of [`PATIENCE`], whatever the clocks of the API server and of this process say.
fn remaining(pipeline: &Pipeline, now: Timestamp) -> Duration {
    let deleted = pipeline.metadata.deletion_timestamp.as_ref().map_or(now, |time| time.0);
    let passed = Duration::try_from(now.duration_since(deleted)).unwrap_or_default();
    PATIENCE.saturating_sub(passed)
}

/// Deletes the workers, and waits until they are gone: not for ever, for a node may be lost.
///
/// # Errors
/// When the API server refuses or is away.
pub async fn end_workers(client: &Client, writer: &Writer, pipeline: &Pipeline) -> Result<(), WriteError> {
    let (namespace, name) = (pipeline.namespace().unwrap_or_default(), name::ingest(&pipeline.name_any()));
    let until = Instant::now() + MAX_WORKERS_END;
    while let Some(workers) = read::<StatefulSet>(client, &namespace, &name).await? {
        let ours = workers.owner_references().iter().any(|reference| Some(&reference.uid) == pipeline.metadata.uid.as_ref());
        if !ours || Instant::now() > until {
            break;
        }
        if workers.metadata.deletion_timestamp.is_none() {
            // It stays until its pods are gone.
            writer.delete_with::<StatefulSet>(&namespace, &name, &DeleteParams::foreground()).await?;
        }
        sleep(REQUEUE_AFTER).await;
    }
    Ok(())
}

/// The Pipeline's database.
///
/// # Errors
/// Why nobody knows where it is.
pub async fn database(client: &Client, databases: &Databases, pipeline: &Pipeline) -> Result<Arc<Database>, Cause> {
    let owner = owner(pipeline);
    match read_uri(client, pipeline).await.map_err(|error| Cause::new(error.reason(), chain(&error)))? {
        Ok(uri) => Ok(databases.obtain(&owner, &uri)),
        // A namespace that is deleted loses its Secrets before its Pipelines are done.
        Err(cause) => databases.last(&owner).ok_or(cause),
    }
}

async fn attempt(client: &Client, databases: &Databases, pipeline: &Pipeline) -> Result<(), Cause> {
    let owner = owner(pipeline);
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
    fn patience_is_bounded_by_any_clock() {
        let now = Timestamp::from_second(1_000_000).unwrap();
        for (deleted, expected) in [(1_000_000, 30), (999_990, 20), (999_000, 0), (2_000_000, 30), (0, 0)] {
            let mut pipeline = pipeline(json!({}));
            pipeline.metadata.deletion_timestamp = Some(Time(Timestamp::from_second(deleted).unwrap()));
            assert_eq!(remaining(&pipeline, now), Duration::from_secs(expected), "{deleted}");
        }
    }

    #[tokio::test]
    async fn an_error_of_the_database_is_told_where_there_was_a_table() {
        let away = || Cause::new(Reason::DatabaseUnavailable, "connection refused");
        // Whether there was a table, what the last attempt comes to -> what is told.
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
