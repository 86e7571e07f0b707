//! The proof that batches can be written: the table is as the Pipeline says, and rows of every kind are taken, in a
//! transaction that is rolled back.

use std::collections::HashMap;

use tokio_postgres::Client;
use tokio_postgres::error::SqlState;

use super::Target;
use super::statements::{COLUMNS, SET_UP};
use crate::state::system::SCHEMA;

/// Why nothing can be written. All that arrives is held until it can.
#[derive(Debug, thiserror::Error)]
pub enum ProofError {
    /// There is no table.
    #[error("failed to find the table {table}: the operator makes it; nothing is acknowledged until it is there")]
    FindTable {
        /// The table.
        table: String,
    },

    /// A column is not there, or not of its type.
    #[error("failed to match the column {column} of the table {table}: expected {expected}, found {found}")]
    MatchColumn {
        /// The table.
        table: String,
        /// The column.
        column: String,
        /// The type it must have.
        expected: &'static str,
        /// The type it has.
        found: String,
    },

    /// A row was refused, and no row would be taken.
    #[error("failed to write")]
    Write(#[from] tokio_postgres::Error),
}

/// Sets the connection up and proves that it can write.
///
/// A constraint that refuses the made-up row (class 23) does not speak against the table: the row came as far as any other.
pub async fn prove(client: &mut Client, target: &Target) -> Result<(), ProofError> {
    client.batch_execute(SET_UP).await?;
    let statements = &target.statements;
    let rows = client.query(COLUMNS, &[&statements.table]).await?;
    let columns: HashMap<String, String> = rows.iter().map(|row| (row.get(0), row.get(1))).collect();
    if columns.is_empty() {
        return Err(ProofError::FindTable { table: statements.table.clone() });
    }
    for (column, expected) in &statements.columns {
        let found = columns.get(column);
        if found.is_none_or(|found| found != expected) {
            let found = found.map_or_else(|| "no such column".to_owned(), Clone::clone);
            return Err(ProofError::MatchColumn { table: statements.table.clone(), column: column.clone(), expected, found });
        }
    }
    let transaction = client.transaction().await?;
    transaction
        .batch_execute(&format!(
            "INSERT INTO {SCHEMA}.acknowledgement (session, batch, entries) VALUES ('', 0, '');
             DELETE FROM {SCHEMA}.acknowledgement WHERE session = '';
             INSERT INTO {SCHEMA}.dead_letter (time, namespace, pipeline, gateway, topic, payload, reason, detail, partial)
             VALUES (now(), '', '', '', '', '', '', '', false);
             INSERT INTO {SCHEMA}.dead_letter_count (hour, namespace, pipeline, gateway, reason, kept, kept_bytes, discarded)
             VALUES (now(), '', '', '', '', 0, 0, 0)"
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
