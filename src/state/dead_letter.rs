//! How many messages a Pipeline refused, and how far its replay is: what its status tells.

use tokio_postgres::types::Type;
use tokio_postgres::{Error, GenericClient};

use super::owner::Owner;
use super::system::SCHEMA;

/// What there is of dead letters.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct DeadLetters {
    /// Messages that were refused in the last 24 hours.
    pub refused: i64,
    /// Those of them that were too many to be kept.
    pub discarded: i64,
    /// The replay of the token, once a worker has begun it.
    pub replay: Option<Replay>,
}

/// A replay that was begun.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Replay {
    /// Messages that are rows now.
    pub stored: i64,
    /// Messages that were refused again.
    pub refused: i64,
    /// Messages that were left as they are.
    pub left_alone: i64,
    /// Messages that are still to be put through.
    pub remaining: i64,
    /// Whether it is done.
    pub finished: bool,
    /// Why it does not go on.
    pub failure: Option<String>,
}

/// Reads it: a few hundred rows by primary key at most.
///
/// # Errors
/// When the database does not answer it.
pub async fn read(client: &impl GenericClient, owner: &Owner, token: Option<&str>) -> Result<DeadLetters, Error> {
    let counts = format!(
        "SELECT coalesce(sum(kept + discarded), 0)::bigint, coalesce(sum(discarded), 0)::bigint FROM {SCHEMA}.dead_letter_count
         WHERE namespace = $1 AND pipeline = $2 AND hour > now() - INTERVAL '24 hours'"
    );
    let counts = client.query_typed_one(&counts, &[(&owner.namespace, Type::TEXT), (&owner.pipeline, Type::TEXT)]).await?;
    let replay = match token {
        Some(token) => replay(client, owner, token).await?,
        None => None,
    };
    Ok(DeadLetters { refused: counts.try_get(0)?, discarded: counts.try_get(1)?, replay })
}

async fn replay(client: &impl GenericClient, owner: &Owner, token: &str) -> Result<Option<Replay>, Error> {
    let query = format!(
        "SELECT stored, refused, left_alone, remaining, finished, failure FROM {SCHEMA}.pipeline_replay
         WHERE namespace = $1 AND pipeline = $2 AND token = $3"
    );
    let of_token = [(&owner.namespace as _, Type::TEXT), (&owner.pipeline as _, Type::TEXT), (&token as _, Type::TEXT)];
    let row = client.query_typed_opt(&query, &of_token).await?;
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
