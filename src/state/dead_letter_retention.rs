//! Deletes dead letters that are older than their Pipeline keeps them.
//!
//! All Pipelines share one hypertable with different retentions, so that a policy of TimescaleDB is not sufficient; the Apache edition has
//! none anyway. Chunks that are older than every retention are dropped; in the others rows are deleted a few at a time, so that no worker
//! waits. The retention of a deleted Pipeline is kept as long as its dead letters.

use std::time::{Duration, Instant};

use tokio::time::sleep;
use tokio_postgres::error::SqlState;
use tokio_postgres::{Client, Error};

use super::owner::Owner;
use super::system::SCHEMA;
use crate::database::identifier::identifier;

/// The most dead letters that one statement deletes, in some tens of milliseconds.
const MAX_ROWS: i64 = 5_000;

/// A chunk in use is dropped by a later sweep: other statements must not queue behind this one.
const SET_UP: &str = "SET lock_timeout = '1s'; SET statement_timeout = '60s'; SET client_min_messages = warning";

/// The result of a sweep.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Swept {
    /// Chunks that were dropped.
    pub chunks: u64,
    /// Dead letters that were deleted one by one, by their Pipeline.
    pub deleted: Vec<(Owner, u64)>,
}

/// Deletes the dead letters of all namespaces of this database that are older than the retention, by the clock of the database.
///
/// # Errors
/// The sweep is incomplete then.
pub async fn sweep(client: &Client) -> Result<Swept, Error> {
    client.batch_execute(SET_UP).await?;
    let mut swept = Swept { chunks: drop_chunks(client).await?, deleted: Vec::new() };
    let owners =
        client.query(&format!("SELECT cluster, namespace, pipeline FROM {SCHEMA}.dead_letter_retention ORDER BY 1, 2, 3"), &[]).await?;
    for owner in owners {
        let owner = Owner { cluster: owner.try_get(0)?, namespace: owner.try_get(1)?, pipeline: owner.try_get(2)? };
        let deleted = delete(client, &owner).await?;
        if deleted > 0 {
            swept.deleted.push((owner, deleted));
        }
    }
    // No dead letters remain for these.
    client.execute(&format!("DELETE FROM {SCHEMA}.dead_letter_retention WHERE retention = '0'"), &[]).await?;
    Ok(swept)
}

async fn drop_chunks(client: &Client) -> Result<u64, Error> {
    let schema = "SELECT nspname FROM pg_extension JOIN pg_namespace n ON n.oid = extnamespace WHERE extname = 'timescaledb'";
    let schema: String = client.query_one(schema, &[]).await?.try_get(0)?;
    let query = format!(
        "SELECT count(*) FROM (
            SELECT {}.drop_chunks('{SCHEMA}.dead_letter', older_than => now() - longest)
            FROM (SELECT max(retention) AS longest FROM {SCHEMA}.dead_letter_retention) kept WHERE longest IS NOT NULL
         ) dropped",
        identifier(&schema)
    );
    match client.query_one(&query, &[]).await {
        Ok(row) => Ok(row.try_get::<_, i64>(0)?.unsigned_abs()),
        Err(error) if error.code() == Some(&SqlState::LOCK_NOT_AVAILABLE) => Ok(0),
        Err(error) => Err(error),
    }
}

async fn delete(client: &Client, owner: &Owner) -> Result<u64, Error> {
    let of_owner = owner.parameters();
    let expired = |column: &str| {
        format!("{0} AND {column} < now() - (SELECT retention FROM {SCHEMA}.dead_letter_retention WHERE {0})", Owner::CONDITION)
    };
    // Rows that a replay has locked are deleted by a later sweep, if they still exist.
    let letters = format!(
        "DELETE FROM {SCHEMA}.dead_letter WHERE {0}
         AND id = ANY(ARRAY(SELECT id FROM {SCHEMA}.dead_letter WHERE {0} LIMIT {MAX_ROWS} FOR UPDATE SKIP LOCKED))",
        expired("time")
    );
    let mut deleted = 0;
    loop {
        let started = Instant::now();
        let rows = client.execute_typed(&letters, &of_owner).await?;
        deleted += rows;
        if rows < MAX_ROWS.unsigned_abs() {
            break;
        }
        // As long as the statement took: half of the time remains for the workers.
        sleep(started.elapsed().min(Duration::from_secs(1))).await;
    }
    client.execute_typed(&format!("DELETE FROM {SCHEMA}.dead_letter_count WHERE {}", expired("hour")), &of_owner).await?;
    Ok(deleted)
}
