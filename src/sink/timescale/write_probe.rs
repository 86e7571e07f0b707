//! The write probe: before the first batch of a connection, checks the columns of the table and writes a row of every kind in a
//! transaction that is rolled back.

use std::collections::HashMap;

use tokio_postgres::Client;
use tokio_postgres::error::SqlState;

use super::statements::{READ_COLUMNS, SETTINGS};
use super::target::Target;
use crate::state::system::SCHEMA;

/// Why nothing can be written. Messages are not acknowledged until the probe succeeds.
#[derive(Debug, thiserror::Error)]
pub enum WriteProbeError {
    /// The table does not exist.
    #[error("failed to find the table {table}: the operator creates it; nothing is acknowledged until it exists")]
    FindTable {
        /// The table.
        table: String,
    },

    /// A column does not exist, or has another type.
    #[error("failed to match the column {column} of the table {table}: expected {expected}, found {found}")]
    MatchColumn {
        /// The table.
        table: String,
        /// The column.
        column: String,
        /// The required type.
        expected: &'static str,
        /// The actual type.
        found: String,
    },

    /// A statement failed, and would fail for every row.
    #[error("failed to write")]
    Write(#[from] tokio_postgres::Error),
}

/// Applies the settings to the connection and proves that it can write.
///
/// A constraint that refuses the row of the probe (class 23) is no failure: the values of the row are made up.
pub async fn probe(client: &mut Client, target: &Target) -> Result<(), WriteProbeError> {
    client.batch_execute(SETTINGS).await?;
    let statements = &target.statements;
    let rows = client.query(READ_COLUMNS, &[&statements.table]).await?;
    let columns: HashMap<String, String> = rows.iter().map(|row| (row.get(0), row.get(1))).collect();
    if columns.is_empty() {
        return Err(WriteProbeError::FindTable { table: statements.table.clone() });
    }
    for (column, expected) in &statements.columns {
        let found = columns.get(column);
        if found.is_none_or(|found| found != expected) {
            let found = found.map_or_else(|| "no such column".to_owned(), Clone::clone);
            return Err(WriteProbeError::MatchColumn { table: statements.table.clone(), column: column.clone(), expected, found });
        }
    }
    let transaction = client.transaction().await?;
    transaction
        .batch_execute(&format!(
            "INSERT INTO {SCHEMA}.acknowledgement (cluster, session, batch, entries) VALUES ('', '', 0, '');
             DELETE FROM {SCHEMA}.acknowledgement WHERE cluster = '' AND session = '';
             INSERT INTO {SCHEMA}.dead_letter (cluster, time, namespace, pipeline, gateway, topic, payload, reason, detail, partial)
             VALUES ('', now(), '', '', '', '', '', '', '', false);
             INSERT INTO {SCHEMA}.dead_letter_count (cluster, hour, namespace, pipeline, gateway, reason, kept, kept_bytes, discarded)
             VALUES ('', now(), '', '', '', '', 0, 0, 0)"
        ))
        .await?;
    match transaction.batch_execute(&statements.probe).await {
        Err(error) if !error.code().is_some_and(is_constraint) => return Err(error.into()),
        _ => {}
    }
    Ok(transaction.rollback().await?)
}

fn is_constraint(code: &SqlState) -> bool {
    code.code().starts_with("23") || *code == SqlState::RAISE_EXCEPTION
}
