//! The progress of a Pipeline's replay: a row of the database, written in the transactions of the replay.

use tokio_postgres::types::{ToSql, Type};
use tokio_postgres::{Client, Error, Transaction};

use super::filter::FilterCondition;
use super::outcome::ReplayOutcome;
use crate::state::owner::Owner;
use crate::state::system::SCHEMA;

/// The progress of a replay.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct ReplayProgress {
    /// The identifier of the last processed dead letter.
    pub done: i64,
    /// The identifier of the last dead letter to process.
    pub last: i64,
    /// Whether the replay is finished.
    pub finished: bool,
}

/// The progress of a token. `None` if the token has not begun.
pub async fn read(client: &Client, owner: &Owner, token: &str) -> Result<Option<ReplayProgress>, Error> {
    let query =
        format!("SELECT done_id, last_id, finished FROM {SCHEMA}.pipeline_replay WHERE namespace = $1 AND pipeline = $2 AND token = $3");
    let row = client.query_typed_opt(&query, &of(owner, &token)).await?;
    row.map(|row| Ok(ReplayProgress { done: row.try_get(0)?, last: row.try_get(1)?, finished: row.try_get(2)? })).transpose()
}

/// Begins the replay of a token with the current dead letters. Has no effect if the token has begun.
pub async fn begin(client: &Client, condition: &FilterCondition, token: &String) -> Result<(), Error> {
    let statement = format!(
        "INSERT INTO {SCHEMA}.pipeline_replay (namespace, pipeline, token, done_id, last_id, stored, refused, left_alone, remaining, finished)
         SELECT $1, $2, $9, 0, coalesce(max(id), 0), 0, 0, 0, count(*), false FROM {SCHEMA}.dead_letter WHERE {} ON CONFLICT DO NOTHING",
        FilterCondition::SQL
    );
    let mut parameters = condition.parameters();
    parameters.push((token, Type::TEXT));
    client.execute_typed(&statement, &parameters).await.map(drop)
}

/// Records that the dead letters between these identifiers were processed. `false` if another process has recorded it.
pub async fn advance(
    transaction: &Transaction<'_>,
    [namespace, pipeline]: [&String; 2],
    token: &String,
    [after, end]: [i64; 2],
    replayed: &ReplayOutcome,
) -> Result<bool, Error> {
    let statement = format!(
        "UPDATE {SCHEMA}.pipeline_replay SET done_id = $5, stored = stored + $6, refused = refused + $7, left_alone = left_alone + $8,
            remaining = greatest(remaining - $9, 0), failure = NULL
         WHERE namespace = $1 AND pipeline = $2 AND token = $3 AND done_id = $4"
    );
    let [stored, refused, partial, letters] =
        [replayed.stored, replayed.refused, replayed.partial, replayed.letters].map(|count| i64::try_from(count).unwrap_or(i64::MAX));
    let texts = [namespace, pipeline, token].map(|text| (text as &(dyn ToSql + Sync), Type::TEXT));
    let numbers = [&after, &end, &stored, &refused, &partial, &letters].map(|number| (number as &(dyn ToSql + Sync), Type::INT8));
    let parameters: Vec<_> = texts.into_iter().chain(numbers).collect();
    Ok(transaction.execute_typed(&statement, &parameters).await? == 1)
}

/// Records the end of the replay.
pub async fn finish(client: &Client, owner: &Owner, token: &str) -> Result<(), Error> {
    let statement = format!(
        "UPDATE {SCHEMA}.pipeline_replay SET finished = true, remaining = 0, failure = NULL WHERE namespace = $1 AND pipeline = $2 AND token = $3"
    );
    client.execute_typed(&statement, &of(owner, &token)).await.map(drop)
}

/// Records the cause of a failure.
pub async fn fail(client: &Client, owner: &Owner, token: &str, failure: &str) -> Result<(), Error> {
    let statement = format!("UPDATE {SCHEMA}.pipeline_replay SET failure = $4 WHERE namespace = $1 AND pipeline = $2 AND token = $3");
    let mut parameters = of(owner, &token).to_vec();
    parameters.push((&failure, Type::TEXT));
    client.execute_typed(&statement, &parameters).await.map(drop)
}

fn of<'a>(owner: &'a Owner, token: &'a &'a str) -> [(&'a (dyn ToSql + Sync), Type); 3] {
    [(&owner.namespace, Type::TEXT), (&owner.pipeline, Type::TEXT), (token, Type::TEXT)]
}
