//! What the database keeps of a session between two lives of the worker.

use std::time::Duration;

use tokio::time::timeout;
use tokio_postgres::Client;

use super::SessionKey;
use super::statements::{forget_session, is_session_held, open_session, read_entries, reopen_session, set_filters};
use crate::database::connect::{ConnectError, connect, drive};
use crate::database::uri::ConnectionUri;
use crate::ingest::ledger::Entry;

/// How long a query may take. Taking a session over waits for the last transaction of the process that had it.
const TIMEOUT: Duration = Duration::from_secs(90);

/// A session, taken over.
#[derive(Debug)]
pub struct Opened {
    /// Its key, with the new generation.
    pub key: SessionKey,
    /// The topic filters that the broker may hold, the wanted one among them.
    pub filters: Vec<String>,
    /// The entries of each batch.
    pub entries: Vec<(i64, Vec<Entry>)>,
}

/// Why the database did not give or take it.
#[derive(Debug, thiserror::Error)]
pub enum SessionStoreError {
    /// No connection.
    #[error(transparent)]
    Connect(#[from] ConnectError),

    /// A query failed.
    #[error("failed to read or write the session's row in the database")]
    Query(#[from] tokio_postgres::Error),

    /// No answer in time.
    #[error("failed to get the session's row within {} s", TIMEOUT.as_secs())]
    Await,
}

/// Takes a session over: from now on no other process can commit for it. `filter` is written down before it is subscribed to; without
/// one, only a session is taken over that has begun.
pub async fn open(uri: &ConnectionUri, name: &str, gateway: &str, filter: Option<&str>) -> Result<Option<Opened>, SessionStoreError> {
    bounded(uri, async |client| {
        let row = match filter {
            Some(filter) => client.query_opt(&open_session(), &[&name, &vec![filter]]).await?,
            None => client.query_opt(&reopen_session(), &[&name]).await?,
        };
        let Some(row) = row else { return Ok(None) };
        let key = SessionKey { name: name.to_owned(), gateway: gateway.to_owned(), generation: row.get(0) };
        // After the session is ours, so that nothing is added behind our back.
        let rows = client.query(&read_entries(), &[&name]).await?;
        let entries = rows.iter().map(|row| (row.get(0), Entry::decode(row.get(1)).collect())).collect();
        Ok(Some(Opened { key, filters: row.get(1), entries }))
    })
    .await
}

/// Forgets a session that has ended, unless another process has taken it over.
pub async fn forget(uri: &ConnectionUri, key: &SessionKey) -> Result<(), SessionStoreError> {
    bounded(uri, async |client| {
        client.execute(&forget_session(), &[&key.name, &key.generation]).await?;
        Ok(())
    })
    .await
}

/// Says that the broker holds this filter and no other.
pub async fn keep_filter(uri: &ConnectionUri, key: &SessionKey, filter: &str) -> Result<(), SessionStoreError> {
    bounded(uri, async |client| {
        client.execute(&set_filters(), &[&key.name, &key.generation, &vec![filter]]).await?;
        Ok(())
    })
    .await
}

/// Whether no other process has taken the session over.
pub async fn is_held(uri: &ConnectionUri, key: &SessionKey) -> Result<bool, SessionStoreError> {
    bounded(uri, async |client| {
        let row = client.query_one(&is_session_held(), &[&key.name, &key.generation]).await?;
        Ok(row.get(0))
    })
    .await
}

async fn bounded<T>(
    uri: &ConnectionUri,
    query: impl AsyncFnOnce(&Client) -> Result<T, tokio_postgres::Error>,
) -> Result<T, SessionStoreError> {
    let (client, connection) = connect(uri, "fleetwright ingest session").await?;
    drive(connection);
    Ok(timeout(TIMEOUT, query(&client)).await.map_err(|_| SessionStoreError::Await)??)
}
