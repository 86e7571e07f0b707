//! The counts of dead letters of a Pipeline, the progress of its replay, and the failures of its workers, for its status.

use tokio_postgres::types::Type;
use tokio_postgres::{Error, GenericClient};

use super::owner::Owner;
use super::system::SCHEMA;

/// The counts of dead letters.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct DeadLetters {
    /// Messages that were refused in the last 24 hours.
    pub refused: i64,
    /// Those of them that exceeded the quota and are not kept.
    pub discarded: i64,
    /// The replay with the token, once a worker has started it.
    pub replay: Option<Replay>,
    /// Why a batch of a worker keeps failing.
    pub failure: Option<String>,
}

/// A replay that was started.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Replay {
    /// Messages that are rows now.
    pub stored: i64,
    /// Messages that were refused again.
    pub refused: i64,
    /// Messages that were skipped.
    pub left_alone: i64,
    /// Messages that remain.
    pub remaining: i64,
    /// Whether it is complete.
    pub finished: bool,
    /// Why it does not continue.
    pub failure: Option<String>,
}

/// Reads the counts: at most a few hundred rows by primary key.
///
/// # Errors
/// When a query fails.
pub async fn read(client: &impl GenericClient, owner: &Owner, token: Option<&str>) -> Result<DeadLetters, Error> {
    let counts = format!(
        "SELECT coalesce(sum(kept + discarded), 0)::bigint, coalesce(sum(discarded), 0)::bigint FROM {SCHEMA}.dead_letter_count
         WHERE {} AND hour > now() - INTERVAL '24 hours'",
        Owner::CONDITION
    );
    let counts = client.query_typed_one(&counts, &owner.parameters()).await?;
    let replay = match token {
        Some(token) => replay(client, owner, token).await?,
        None => None,
    };
    let failures = format!("SELECT min(failure) FROM {SCHEMA}.session WHERE cluster = $2 AND starts_with(session, $1)");
    let failure = client.query_typed_one(&failures, &[(&owner.sessions(), Type::TEXT), (&owner.cluster, Type::TEXT)]).await?.try_get(0)?;
    Ok(DeadLetters { refused: counts.try_get(0)?, discarded: counts.try_get(1)?, replay, failure })
}

async fn replay(client: &impl GenericClient, owner: &Owner, token: &str) -> Result<Option<Replay>, Error> {
    let query = format!(
        "SELECT stored, refused, left_alone, remaining, finished, failure FROM {SCHEMA}.pipeline_replay
         WHERE {} AND token = $4",
        Owner::CONDITION
    );
    let [cluster, namespace, pipeline] = owner.parameters();
    let row = client.query_typed_opt(&query, &[cluster, namespace, pipeline, (&token, Type::TEXT)]).await?;
    row.map(|row| {
        Ok(Replay {
            stored: row.try_get(0)?,
            refused: row.try_get(1)?,
            left_alone: row.try_get(2)?,
            remaining: row.try_get(3)?,
            finished: row.try_get(4)?,
            failure: row.try_get(5)?,
        })
    })
    .transpose()
}
