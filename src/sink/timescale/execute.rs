//! Executes a plan: the only code that changes the schema of a database.

use std::time::Duration;

use tokio_postgres::error::SqlState;
use tokio_postgres::types::Type;
use tokio_postgres::{Client, GenericClient, Transaction};
use tracing::info;

use super::observe::{ObservedSchema, observe};
use super::plan::{PlanError, SchemaChange, SchemaPlan, plan, qualified};
use super::schema::Desired;
use crate::api::pipeline::DeletionPolicy;
use crate::api::reason::Reason;
use crate::state::assignment::forget_all_sessions;
use crate::state::owner::Owner;
use crate::state::system;

/// How long reading the catalog may take. It usually takes milliseconds.
const OBSERVE_TIMEOUT: Duration = Duration::from_secs(5);

/// How long a change may take in total. Creating the index of a large table is the slowest.
const CHANGE_TIMEOUT: Duration = Duration::from_mins(2);

/// How long a change waits for a lock on a table. Short, because later statements on the table queue behind it.
const LOCK_TIMEOUT: &str = "3s";

/// Key of the advisory lock under which one process at a time changes a database: `fleetwri` in ASCII.
const ADVISORY_LOCK: i64 = 0x666c_6565_7477_7269;

/// Why the database does not have the desired state.
#[derive(Debug, thiserror::Error)]
pub enum ExecuteError {
    /// No answer in time.
    #[error("failed to get an answer from the database in {} s", waited.as_secs())]
    AwaitAnswer {
        /// The timeout.
        waited: Duration,
    },

    /// Reading failed.
    #[error("failed to read the catalog of the database")]
    ReadCatalog(#[source] tokio_postgres::Error),

    /// TimescaleDB is not installed in the database, and installing it failed.
    #[error(
        "failed to install TimescaleDB: run CREATE EXTENSION timescaledb in this database as a superuser (its library must be on the server and \
         in shared_preload_libraries)"
    )]
    CreateExtension(#[source] tokio_postgres::Error),

    /// Rows differ only in columns that the new key does not have.
    #[error(
        "failed to create a unique index of {}: rows of the table have the same values of these columns; add `key: true` or the capture of the \
         topic again, or write to another table",
        columns.join(", ")
    )]
    CreateKey {
        /// The columns of the key.
        columns: Vec<String>,
        /// The error.
        source: tokio_postgres::Error,
    },

    /// A statement failed.
    #[error("failed to change the database")]
    Change(#[source] tokio_postgres::Error),

    /// The table may not be changed.
    #[error(transparent)]
    Refuse(#[from] PlanError),

    /// All statements succeeded, but the database does not have the desired state.
    #[error("failed to bring the table to the desired state: another process changes it at the same time")]
    Settle,
}

impl ExecuteError {
    /// A reason for conditions, events and metrics.
    #[must_use]
    pub fn reason(&self) -> Reason {
        match self {
            Self::AwaitAnswer { .. } => Reason::DatabaseUnavailable,
            Self::CreateExtension(source) if !source.is_closed() => Reason::ExtensionMissing,
            Self::Refuse(refusal) => refusal.reason(),
            Self::CreateKey { .. } => Reason::KeyConflict,
            Self::Settle => Reason::TableBusy,
            Self::ReadCatalog(source) | Self::CreateExtension(source) | Self::Change(source) => match source.code() {
                None => Reason::DatabaseUnavailable,
                Some(code) if *code == SqlState::INSUFFICIENT_PRIVILEGE => Reason::PermissionDenied,
                Some(code) if *code == SqlState::LOCK_NOT_AVAILABLE => Reason::TableBusy,
                // Class 57: shutdown, crash, starting up. Class 53: out of connections, memory, disk.
                Some(code) if code.code().starts_with("57P") || code.code().starts_with("53") => Reason::DatabaseUnavailable,
                Some(_) => Reason::DatabaseRefused,
            },
        }
    }
}

/// Reads the state of the database for this table, with a timeout.
pub async fn observe_schema(client: &impl GenericClient, table: &str) -> Result<ObservedSchema, ExecuteError> {
    bounded(OBSERVE_TIMEOUT, async { observe(client, table).await.map_err(ExecuteError::ReadCatalog) }).await
}

/// Brings the database to the desired state, in one transaction and under an advisory lock. Returns the executed plan, which has no
/// steps if nothing was to be done.
///
/// # Errors
/// The transaction is rolled back.
pub async fn apply(client: &mut Client, desired: &Desired) -> Result<SchemaPlan, ExecuteError> {
    bounded(CHANGE_TIMEOUT, async {
        let transaction = begin(client).await?;
        let applied = plan(desired, &observe(&transaction, &desired.table.name).await.map_err(ExecuteError::ReadCatalog)?)?;
        for step in &applied.steps {
            execute(&transaction, step).await?;
        }
        let rest = plan(desired, &observe(&transaction, &desired.table.name).await.map_err(ExecuteError::ReadCatalog)?)?;
        if !rest.steps.is_empty() {
            return Err(ExecuteError::Settle);
        }
        transaction.commit().await.map_err(ExecuteError::Change)?;
        Ok(applied)
    })
    .await
}

/// Releases the table of a Pipeline that is being deleted: keeps it for the next owner, or drops it. Does not change a table of
/// another Pipeline. Idempotent.
///
/// # Errors
/// The transaction is rolled back.
pub async fn release(client: &mut Client, owner: &Owner, table: &str, policy: DeletionPolicy) -> Result<(), ExecuteError> {
    bounded(CHANGE_TIMEOUT, async {
        let transaction = begin(client).await?;
        let observed = observe(&transaction, table).await.map_err(ExecuteError::ReadCatalog)?;
        let claim = observed.claim.filter(|claim| claim.is_of_namespace(owner) && claim.pipeline.as_ref() == Some(&owner.pipeline));
        if claim.is_none() {
            return Ok(());
        }
        if let Some(extension) = observed.extension
            && observed.system_version.is_none_or(|version| version < system::VERSION)
        {
            // The statements below need the tables of this version.
            let upgrade = SchemaChange::CreateSystem { extension_schema: extension.schema, cluster: owner.cluster.clone() };
            execute(&transaction, &upgrade).await?;
        }
        if policy == DeletionPolicy::Delete {
            let statement = format!("DROP TABLE IF EXISTS {}", qualified(table));
            transaction.batch_execute(&statement).await.map_err(ExecuteError::Change)?;
        }
        forget(&transaction, owner, table, policy).await.map_err(ExecuteError::Change)?;
        transaction.commit().await.map_err(ExecuteError::Change)
    })
    .await
}

async fn forget(transaction: &Transaction<'_>, owner: &Owner, table: &str, policy: DeletionPolicy) -> Result<(), tokio_postgres::Error> {
    let statement = match policy {
        DeletionPolicy::Retain => format!("UPDATE {}.pipeline_table SET pipeline = NULL WHERE table_name = $1", system::SCHEMA),
        DeletionPolicy::Delete => format!("DELETE FROM {}.pipeline_table WHERE table_name = $1", system::SCHEMA),
    };
    transaction.execute_typed(&statement, &[(&table, Type::TEXT)]).await?;
    if policy == DeletionPolicy::Delete {
        // The next sweep deletes them, a few at a time: there may be millions.
        let statement = format!("UPDATE {}.dead_letter_retention SET retention = '0' WHERE {}", system::SCHEMA, Owner::CONDITION);
        transaction.execute_typed(&statement, &owner.parameters()).await?;
    }
    for of_pipeline in ["assignment", "pipeline_replay"] {
        let statement = format!("DELETE FROM {}.{of_pipeline} WHERE {}", system::SCHEMA, Owner::CONDITION);
        transaction.execute_typed(&statement, &owner.parameters()).await?;
    }
    forget_all_sessions(transaction, owner).await
}

/// A transaction with a short lock timeout and the advisory lock.
async fn begin(client: &mut Client) -> Result<Transaction<'_>, ExecuteError> {
    let transaction = client.transaction().await.map_err(ExecuteError::Change)?;
    let statement = format!(
        "SET LOCAL lock_timeout = '{LOCK_TIMEOUT}'; SET LOCAL statement_timeout = '{}s'; SET LOCAL client_min_messages = warning; \
         SELECT pg_advisory_xact_lock({ADVISORY_LOCK})",
        CHANGE_TIMEOUT.as_secs()
    );
    transaction.batch_execute(&statement).await.map_err(ExecuteError::Change)?;
    Ok(transaction)
}

async fn execute(transaction: &Transaction<'_>, step: &SchemaChange) -> Result<(), ExecuteError> {
    for statement in step.statements() {
        info!(%statement, "changing the database");
        transaction.batch_execute(&statement).await.map_err(|source| match step {
            SchemaChange::CreateExtension => ExecuteError::CreateExtension(source),
            SchemaChange::CreateKey { columns, .. } if source.code() == Some(&SqlState::UNIQUE_VIOLATION) => {
                ExecuteError::CreateKey { columns: columns.clone(), source }
            }
            _ => ExecuteError::Change(source),
        })?;
    }
    Ok(())
}

async fn bounded<T>(limit: Duration, work: impl Future<Output = Result<T, ExecuteError>>) -> Result<T, ExecuteError> {
    tokio::time::timeout(limit, work).await.unwrap_or(Err(ExecuteError::AwaitAnswer { waited: limit }))
}
