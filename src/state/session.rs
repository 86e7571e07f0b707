//! The session of a worker with a broker in the database: its generation, and the topic filters that the broker may hold for it.
//!
//! A process that takes a session over raises its generation: from then on no other process can commit for it.

use std::time::Duration;

use tokio::time::timeout;
use tokio_postgres::Client;

use super::acknowledgement;
use super::redelivery::RedeliveryEntry;
use super::system::SCHEMA;
use crate::database::connect::{ConnectError, connect, drive};
use crate::database::uri::ConnectionUri;

/// How long a statement may take. A takeover waits for the last transaction of the previous process.
const TIMEOUT: Duration = Duration::from_secs(90);

/// The identity of a session in the database.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct SessionKey {
    /// Identity of the cluster.
    pub cluster: String,
    /// `<namespace>/<pipeline>/<gateway>`, and a number where the gateway has several.
    pub name: String,
    /// Name of the Gateway.
    pub gateway: String,
    /// Raised by every process that takes the session over.
    pub generation: i64,
}

/// A session after its takeover.
#[derive(Debug)]
pub struct OpenedSession {
    /// Its key, with the new generation.
    pub key: SessionKey,
    /// The topic filters that the broker may hold, including the wanted one.
    pub filters: Vec<String>,
    /// The redelivery entries of each batch.
    pub entries: Vec<(i64, Vec<RedeliveryEntry>)>,
}

/// Why a statement on a session failed.
#[derive(Debug, thiserror::Error)]
pub enum SessionError {
    /// No connection.
    #[error(transparent)]
    Connect(#[from] ConnectError),

    /// A statement failed.
    #[error("failed to read or write the session in the database")]
    Query(#[from] tokio_postgres::Error),

    /// No answer in time.
    #[error("failed to read or write the session in the database within {} s", TIMEOUT.as_secs())]
    Await,
}

/// Takes a session over. `filter` is stored before the worker subscribes to it; without one, only a session that exists is taken over.
pub async fn open(
    uri: &ConnectionUri,
    (cluster, name): (&str, &str),
    gateway: &str,
    filter: Option<&str>,
) -> Result<Option<OpenedSession>, SessionError> {
    let create = format!(
        "INSERT INTO {SCHEMA}.session (cluster, session, generation, topic_filters) VALUES ($1, $2, 1, $3) ON CONFLICT (cluster, session)
         DO UPDATE SET generation = session.generation + 1, failure = NULL,
                       topic_filters = (SELECT array_agg(DISTINCT filter) FROM unnest(session.topic_filters || excluded.topic_filters) filter)
         RETURNING generation, topic_filters"
    );
    let update = format!(
        "UPDATE {SCHEMA}.session SET generation = generation + 1, failure = NULL WHERE cluster = $1 AND session = $2
         RETURNING generation, topic_filters"
    );
    bounded(uri, async |client| {
        let row = match filter {
            Some(filter) => client.query_opt(&create, &[&cluster, &name, &vec![filter]]).await?,
            None => client.query_opt(&update, &[&cluster, &name]).await?,
        };
        let Some(row) = row else { return Ok(None) };
        let key =
            SessionKey { cluster: cluster.to_owned(), name: name.to_owned(), gateway: gateway.to_owned(), generation: row.try_get(0)? };
        // After the takeover, so that the previous process adds nothing any more.
        let entries = acknowledgement::read(client, cluster, name).await?;
        Ok(Some(OpenedSession { key, filters: row.try_get(1)?, entries }))
    })
    .await
}

/// Deletes a session that has ended, with its redelivery entries, unless another process has taken it over.
pub async fn delete(uri: &ConnectionUri, key: &SessionKey) -> Result<(), SessionError> {
    let statement = format!(
        "WITH ended AS (DELETE FROM {SCHEMA}.session WHERE cluster = $3 AND session = $1 AND generation = $2 RETURNING session)
         DELETE FROM {SCHEMA}.acknowledgement entry USING ended WHERE entry.cluster = $3 AND entry.session = ended.session"
    );
    bounded(uri, async |client| client.execute(&statement, &[&key.name, &key.generation, &key.cluster]).await.map(drop)).await
}

/// Stores that the broker holds this filter and no other.
pub async fn set_filter(uri: &ConnectionUri, key: &SessionKey, filter: &str) -> Result<(), SessionError> {
    let statement = format!("UPDATE {SCHEMA}.session SET topic_filters = $3 WHERE cluster = $4 AND session = $1 AND generation = $2");
    bounded(uri, async |client| client.execute(&statement, &[&key.name, &key.generation, &vec![filter], &key.cluster]).await.map(drop))
        .await
}

/// Stores why a batch of the session keeps failing, for the operator; or that none does.
pub async fn record_failure(client: &Client, key: &SessionKey, failure: Option<&str>) -> Result<(), tokio_postgres::Error> {
    let statement = format!("UPDATE {SCHEMA}.session SET failure = $3 WHERE cluster = $4 AND session = $1 AND generation = $2");
    client.execute(&statement, &[&key.name, &key.generation, &failure, &key.cluster]).await.map(drop)
}

/// Whether no other process has taken the session over. A session without a row has no other owner.
pub async fn is_held(uri: &ConnectionUri, key: &SessionKey) -> Result<bool, SessionError> {
    let statement = format!("SELECT NOT EXISTS (SELECT FROM {SCHEMA}.session WHERE cluster = $3 AND session = $1 AND generation > $2)");
    bounded(uri, async |client| client.query_one(&statement, &[&key.name, &key.generation, &key.cluster]).await?.try_get(0)).await
}

async fn bounded<T>(uri: &ConnectionUri, query: impl AsyncFnOnce(&Client) -> Result<T, tokio_postgres::Error>) -> Result<T, SessionError> {
    let (client, connection) = connect(uri, "fleetwright ingest session").await?;
    drive(connection);
    Ok(timeout(TIMEOUT, query(&client)).await.map_err(|_| SessionError::Await)??)
}
