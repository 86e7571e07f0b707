//! The redelivery entries of a session in the database: committed with the batch of their messages, deleted once the broker has processed
//! the acknowledgements.

use tokio_postgres::{Client, Error, Transaction};

use super::redelivery::RedeliveryEntry;
use super::session::SessionKey;
use super::system::SCHEMA;

/// Stores the entries of a batch. `false`, and stores nothing, if another process has taken the session over. The lock makes a process that
/// takes it over meanwhile wait for this transaction.
pub async fn commit(transaction: &Transaction<'_>, session: &SessionKey, batch: i64, entries: &[RedeliveryEntry]) -> Result<bool, Error> {
    let statement = format!(
        "WITH held AS (SELECT FROM {SCHEMA}.session WHERE cluster = $5 AND session = $1 AND generation = $2 FOR SHARE)
         INSERT INTO {SCHEMA}.acknowledgement (cluster, session, batch, entries) SELECT $5, $1, $3, $4 FROM held"
    );
    let entries = RedeliveryEntry::encode(entries);
    Ok(transaction.execute(&statement, &[&session.name, &session.generation, &batch, &entries, &session.cluster]).await? > 0)
}

/// Prevents that a transaction of an earlier connection commits the entries of a batch, before the batch is divided. `false` if they are
/// committed, or if another process has taken the session over. The row is deleted after the next takeover.
pub async fn fence(client: &Client, session: &SessionKey, batch: i64) -> Result<bool, Error> {
    let statement = format!(
        "WITH held AS (SELECT FROM {SCHEMA}.session WHERE cluster = $4 AND session = $1 AND generation = $2 FOR SHARE)
         INSERT INTO {SCHEMA}.acknowledgement (cluster, session, batch, entries) SELECT $4, $1, $3, '' FROM held ON CONFLICT DO NOTHING"
    );
    Ok(client.execute(&statement, &[&session.name, &session.generation, &batch, &session.cluster]).await? > 0)
}

/// Whether the entries of a batch are committed.
pub async fn is_committed(client: &Client, session: &SessionKey, batch: i64) -> Result<bool, Error> {
    let statement = format!("SELECT EXISTS (SELECT FROM {SCHEMA}.acknowledgement WHERE cluster = $3 AND session = $1 AND batch = $2)");
    client.query_one(&statement, &[&session.name, &batch, &session.cluster]).await?.try_get(0)
}

/// Deletes the entries of these batches.
pub async fn delete(transaction: &Transaction<'_>, session: &SessionKey, batches: &[i64]) -> Result<(), Error> {
    if batches.is_empty() {
        return Ok(());
    }
    let statement = format!("DELETE FROM {SCHEMA}.acknowledgement WHERE cluster = $3 AND session = $1 AND batch = ANY($2)");
    transaction.execute(&statement, &[&session.name, &batches, &session.cluster]).await.map(drop)
}

/// Reads the entries of a session, by batch, in the order of the batches.
pub async fn read(client: &Client, cluster: &str, session: &str) -> Result<Vec<(i64, Vec<RedeliveryEntry>)>, Error> {
    let statement = format!("SELECT batch, entries FROM {SCHEMA}.acknowledgement WHERE cluster = $1 AND session = $2 ORDER BY batch");
    let rows = client.query(&statement, &[&cluster, &session]).await?;
    rows.iter().map(|row| Ok((row.try_get(0)?, RedeliveryEntry::decode(row.try_get(1)?).collect()))).collect()
}
