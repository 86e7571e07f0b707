//! The progress of the replay that a Pipeline requests: a row of the database, updated in the transactions of the replay.

use tokio_postgres::types::{ToSql, Type};
use tokio_postgres::{Client, Error, Transaction};

use super::owner::Owner;
pub use super::owner::Parameter;
use super::system::SCHEMA;

/// The condition that a row is the progress of a replay, with the parameters of [`of`].
const OF_TOKEN: &str = "cluster = $1 AND namespace = $2 AND pipeline = $3 AND token = $4";

/// The position of a replay in its dead letters.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct ReplayProgress {
    /// Id of the last dead letter that was replayed.
    pub done: i64,
    /// Id of the last dead letter to replay.
    pub last: i64,
    /// Whether the replay is complete.
    pub finished: bool,
}

/// The counts of one page of a replay.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct ReplayCounts {
    /// Dead letters that were read.
    pub letters: u64,
    /// Dead letters that are rows now.
    pub stored: u64,
    /// Dead letters that were refused again.
    pub refused: u64,
    /// Dead letters that were skipped because some of their readings are rows already.
    pub partial: u64,
}

/// Reads the progress of the replay with this token; `None` before its start.
pub async fn read(client: &Client, owner: &Owner, token: &str) -> Result<Option<ReplayProgress>, Error> {
    let query = format!("SELECT done_id, last_id, finished FROM {SCHEMA}.pipeline_replay WHERE {OF_TOKEN}");
    let row = client.query_typed_opt(&query, &of(owner, &token)).await?;
    row.map(|row| Ok(ReplayProgress { done: row.try_get(0)?, last: row.try_get(1)?, finished: row.try_get(2)? })).transpose()
}

/// Starts the replay with this token, for the dead letters that exist now and match `condition`, whose first three parameters are those of
/// [`Owner::parameters`]. Does nothing if it was started before.
pub async fn start<'a>(client: &Client, condition: &str, mut parameters: Vec<Parameter<'a>>, token: &'a String) -> Result<(), Error> {
    let token_parameter = parameters.len() + 1;
    let statement = format!(
        "INSERT INTO {SCHEMA}.pipeline_replay (cluster, namespace, pipeline, token, done_id, last_id, stored, refused, left_alone, remaining, finished)
         SELECT $1, $2, $3, ${token_parameter}, 0, coalesce(max(id), 0), 0, 0, 0, count(*), false FROM {SCHEMA}.dead_letter
         WHERE {condition} ON CONFLICT DO NOTHING"
    );
    parameters.push((token, Type::TEXT));
    client.execute_typed(&statement, &parameters).await.map(drop)
}

/// Stores that the dead letters from `after` to `end` were replayed. `false` if another process did it first.
pub async fn advance(
    transaction: &Transaction<'_>,
    owner: &Owner,
    token: &str,
    [after, end]: [i64; 2],
    counts: &ReplayCounts,
) -> Result<bool, Error> {
    let statement = format!(
        "UPDATE {SCHEMA}.pipeline_replay SET done_id = $6, stored = stored + $7, refused = refused + $8, left_alone = left_alone + $9,
            remaining = greatest(remaining - $10, 0), failure = NULL
         WHERE {OF_TOKEN} AND done_id = $5"
    );
    let [stored, refused, partial, letters] =
        [counts.stored, counts.refused, counts.partial, counts.letters].map(|count| i64::try_from(count).unwrap_or(i64::MAX));
    let numbers = [&after, &end, &stored, &refused, &partial, &letters].map(|number| (number as &(dyn ToSql + Sync), Type::INT8));
    let parameters: Vec<Parameter<'_>> = of(owner, &token).into_iter().chain(numbers).collect();
    Ok(transaction.execute_typed(&statement, &parameters).await? == 1)
}

/// Stores that the replay is complete.
pub async fn finish(client: &Client, owner: &Owner, token: &str) -> Result<(), Error> {
    let statement = format!("UPDATE {SCHEMA}.pipeline_replay SET finished = true, remaining = 0, failure = NULL WHERE {OF_TOKEN}");
    client.execute_typed(&statement, &of(owner, &token)).await.map(drop)
}

/// Stores why the replay does not continue.
pub async fn fail(client: &Client, owner: &Owner, token: &str, failure: &str) -> Result<(), Error> {
    let statement = format!("UPDATE {SCHEMA}.pipeline_replay SET failure = $5 WHERE {OF_TOKEN}");
    let mut parameters = of(owner, &token).to_vec();
    parameters.push((&failure, Type::TEXT));
    client.execute_typed(&statement, &parameters).await.map(drop)
}

fn of<'a>(owner: &'a Owner, token: &'a &'a str) -> [Parameter<'a>; 4] {
    let [cluster, namespace, pipeline] = owner.parameters();
    [cluster, namespace, pipeline, (token, Type::TEXT)]
}
