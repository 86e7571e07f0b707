//! Carries out a plan: the only place that changes a database's schema.

use std::time::Duration;

use tokio_postgres::error::SqlState;
use tokio_postgres::types::Type;
use tokio_postgres::{Client, GenericClient, Transaction};
use tracing::info;

use super::observe::{Observed, observe};
use super::plan::{Plan, Refusal, Step, plan, qualified};
use super::schema::Desired;
use crate::api::pipeline::DeletionPolicy;
use crate::api::reason::Reason;
use crate::state::assignment::forget_all_sessions;
use crate::state::owner::Owner;
use crate::state::system;

/// How long a look at the catalog may take; it takes milliseconds.
const LOOK_TIMEOUT: Duration = Duration::from_secs(5);

/// How long a change may take in all; an index on a large table that lost it is the slowest.
const CHANGE_TIMEOUT: Duration = Duration::from_mins(2);

/// How long a change waits for a lock on a table: all who come later queue behind it, so not long.
const LOCK_TIMEOUT: &str = "3s";

/// Key of the advisory lock under which one process at a time changes a database: `fleetwri` in ASCII.
const ADVISORY_LOCK: i64 = 0x666c_6565_7477_7269;

/// Why the database is not as wanted.
#[derive(Debug, thiserror::Error)]
pub enum ExecuteError {
    /// No answer in time.
    #[error("failed to get an answer from the database in {} s", waited.as_secs())]
    AwaitAnswer {
        /// How long it was waited for.
        waited: Duration,
    },

    /// Reading failed.
    #[error("failed to read the catalog of the database")]
    ReadCatalog(#[source] tokio_postgres::Error),

    /// TimescaleDB is not in the database and could not be installed.
    #[error(
        "failed to install TimescaleDB: run CREATE EXTENSION timescaledb in this database as a superuser (its library must be on the server and \
         in shared_preload_libraries)"
    )]
    CreateExtension(#[source] tokio_postgres::Error),

    /// A statement failed.
    #[error("failed to change the database")]
    Change(#[source] tokio_postgres::Error),

    /// The table may not be changed.
    #[error(transparent)]
    Refuse(#[from] Refusal),

    /// Statements succeeded, and yet the database is not as wanted.
    #[error("failed to bring the table to what is wanted: something else changes it at the same time")]
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

/// Looks at the database around this table, within a bounded time.
pub async fn look(client: &impl GenericClient, table: &str) -> Result<Observed, ExecuteError> {
    bounded(LOOK_TIMEOUT, async { observe(client, table).await.map_err(ExecuteError::ReadCatalog) }).await
}

/// Brings the database to what is wanted, in one transaction and with nobody else doing the same meanwhile.
/// Executes nothing where nothing is to be done; what it did is returned.
///
/// # Errors
/// Nothing was changed then.
pub async fn apply(client: &mut Client, desired: &Desired) -> Result<Plan, ExecuteError> {
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

/// Lets go of the table of a Pipeline that is being deleted: leaves it for whoever claims it next, or drops it. Leaves alone
/// what belongs to another Pipeline. Does nothing the second time.
///
/// # Errors
/// Nothing was changed then.
pub async fn release(client: &mut Client, owner: &Owner, table: &str, policy: DeletionPolicy) -> Result<(), ExecuteError> {
    bounded(CHANGE_TIMEOUT, async {
        let transaction = begin(client).await?;
        let observed = observe(&transaction, table).await.map_err(ExecuteError::ReadCatalog)?;
        let claim = observed.claim.filter(|claim| claim.namespace == owner.namespace && claim.pipeline.as_ref() == Some(&owner.pipeline));
        if claim.is_none() {
            return Ok(());
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
        // Deleted at the next sweep, a few at a time: there may be millions.
        let statement =
            format!("UPDATE {}.dead_letter_retention SET retention = '0' WHERE namespace = $1 AND pipeline = $2", system::SCHEMA);
        transaction.execute_typed(&statement, &[(&owner.namespace, Type::TEXT), (&owner.pipeline, Type::TEXT)]).await?;
    }
    for of_pipeline in ["assignment", "pipeline_replay"] {
        let statement = format!("DELETE FROM {}.{of_pipeline} WHERE namespace = $1 AND pipeline = $2", system::SCHEMA);
        transaction.execute_typed(&statement, &[(&owner.namespace, Type::TEXT), (&owner.pipeline, Type::TEXT)]).await?;
    }
    forget_all_sessions(transaction, owner).await
}

/// A transaction that waits for no lock for long, and holds the one that keeps others from changing the database.
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

async fn execute(transaction: &Transaction<'_>, step: &Step) -> Result<(), ExecuteError> {
    for statement in step.statements() {
        info!(%statement, "changing the database");
        transaction.batch_execute(&statement).await.map_err(|source| match step {
            Step::CreateExtension => ExecuteError::CreateExtension(source),
            _ => ExecuteError::Change(source),
        })?;
    }
    Ok(())
}

async fn bounded<T>(limit: Duration, work: impl Future<Output = Result<T, ExecuteError>>) -> Result<T, ExecuteError> {
    tokio::time::timeout(limit, work).await.unwrap_or(Err(ExecuteError::AwaitAnswer { waited: limit }))
}
