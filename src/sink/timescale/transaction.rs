//! One batch in one transaction: rows, dead letters, and the redelivery entries of its messages.
//!
//! Usually the rows are copied straight into the table. If the database refuses a row, because its key exists or for another reason,
//! it stores nothing of that COPY, and the batch is written through the staging table: rows with new keys are inserted, values that a
//! stored row does not have are added to it, rows that exist with the same values are redeliveries, for rows that exist with other values
//! the Pipeline decides, and rows that the database refuses are found by halving. What the database refuses as a whole comes back to the session, which submits its halves.

use std::ops::Range;
use std::sync::Arc;

use bytes::Bytes;
use fleetwright_copy::{Key, Rows, Timestamptz};
use futures::SinkExt;
use tokio::sync::Mutex;
use tokio_postgres::error::SqlState;
use tokio_postgres::{Client, CopyInSink, Statement, Transaction};

use super::dead_letters;
use super::fault::{Fault, classify};
use super::statements::Statements;
use super::target::Target;
use crate::api::pipeline::OnConflict;
use crate::decode::dead_letter::{DeadLetterCause, Reason};
use crate::sink::batch::conflict;
use crate::sink::job::Job;
use crate::sink::written::Written;
use crate::state::acknowledgement;
use crate::state::redelivery::RedeliveryEntry;

/// How many batches are staged after a batch with a redelivery: redeliveries come together, and a COPY that is refused leaves its dead
/// rows in the table.
const STAGED_AFTER_DUPLICATE: u32 = 16;

/// A batch with at least this many rows is inserted under the insert lock. Two concurrent COPYs into one table are slower than one after
/// the other (measured: each row costs PostgreSQL twice as much), presumably because rows are ordered by time: the later
/// batch already occupies the end of the index, where inserting is cheap, and the earlier batch splits pages before it. So only the commits
/// overlap. With fewer rows, the additional statements of an explicit transaction cost more than the lock saves.
const MIN_ROWS_FOR_LOCK: usize = 2_000;

/// The lock under which a connection inserts. It is acquired after a COPY has begun, so that its holder never waits for a lock on the
/// table.
pub type InsertLock = Mutex<()>;

/// Why a batch is not stored. Either nothing of it is stored, or all of it is and the answer was lost.
#[derive(Debug, thiserror::Error)]
pub enum WriteError {
    /// A statement failed.
    #[error("failed to store a batch")]
    Store(#[from] tokio_postgres::Error),

    /// Another process has taken the session over.
    #[error("failed to store a batch: another worker has taken over its session")]
    HoldSession,
}

/// A connection that writes batches.
#[derive(Debug)]
pub struct Writer {
    client: Client,
    copy: Statement,
    insert_lock: Arc<InsertLock>,
    staging: bool,
    staged: u32,
}

impl Writer {
    /// Prepares a connection.
    pub async fn prepare(client: Client, statements: &Statements, insert_lock: Arc<InsertLock>) -> Result<Self, tokio_postgres::Error> {
        let copy = client.prepare(&statements.copy).await?;
        Ok(Self { client, copy, insert_lock, staging: false, staged: 0 })
    }

    /// The connection.
    #[must_use]
    pub fn client(&self) -> &Client {
        &self.client
    }

    /// Stores a batch. May be called again with the same batch after an error, with `again` set.
    pub async fn write(&mut self, target: &Target, job: &Job, again: bool) -> Result<Written, WriteError> {
        if again && acknowledgement::is_committed(&self.client, &job.session, job.number).await? {
            return Ok(Written { dead_letters: job.batch.dead_letters.clone(), entries: job.entries.clone(), ..Written::default() });
        }
        let rows = &job.batch.rows;
        if self.staged > 0 || rows.contested(0..rows.len()).next().is_some() {
            self.staged = self.staged.saturating_sub(1);
            return self.write_staged(target, job).await;
        }
        match self.write_straight(target, job).await {
            Err(WriteError::Store(error)) if is_about_a_row(&error) => {
                if error.code() == Some(&SqlState::UNIQUE_VIOLATION) {
                    self.staged = STAGED_AFTER_DUPLICATE;
                }
                self.write_staged(target, job).await
            }
            other => other,
        }
    }

    async fn write_straight(&mut self, target: &Target, job: &Job) -> Result<Written, WriteError> {
        let rows = &job.batch.rows;
        let insert_lock = (rows.len() >= MIN_ROWS_FOR_LOCK).then_some(&*self.insert_lock);
        if insert_lock.is_none()
            && job.batch.stored_at_refusal.is_none()
            && job.batch.dead_letters.is_empty()
            && job.entries.is_empty()
            && job.expired.is_empty()
        {
            // A single statement is an implicit transaction.
            return Ok(Written {
                rows: copy_rows(CopyContext::Implicit(&self.client), &self.copy, rows, 0..rows.len(), None).await?,
                ..Written::default()
            });
        }
        let transaction = self.client.transaction().await?;
        shorten_timeout(&transaction, job).await?;
        let stored = copy_rows(CopyContext::Transaction(&transaction), &self.copy, rows, 0..rows.len(), insert_lock).await?;
        let written =
            Written { rows: stored, dead_letters: job.batch.dead_letters.clone(), entries: job.entries.clone(), ..Written::default() };
        finish(transaction, target, job, written).await
    }

    async fn write_staged(&mut self, target: &Target, job: &Job) -> Result<Written, WriteError> {
        if !self.staging {
            self.client.batch_execute(&target.statements.create_staging).await?;
            self.staging = true;
        }
        let mut transaction = self.client.transaction().await?;
        shorten_timeout(&transaction, job).await?;
        let mut written = Written { dead_letters: job.batch.dead_letters.clone(), entries: job.entries.clone(), ..Written::default() };
        stage(&mut transaction, &target.statements, &job.batch.rows, &mut written).await?;
        if !job.holds_all_entries {
            let fresh = written.dead_letters.keys().filter(|number| !job.batch.dead_letters.contains_key(number));
            let fresh: Vec<RedeliveryEntry> = fresh.filter_map(|number| job.batch.entry(*number)).collect();
            written.entries.extend(fresh);
        }
        finish(transaction, target, job, written).await
    }
}

/// Limits the statements of a part of a batch that was refused: it is smaller, and the faulty message is found by about 13 of them.
async fn shorten_timeout(transaction: &Transaction<'_>, job: &Job) -> Result<(), tokio_postgres::Error> {
    if job.batch.stored_at_refusal.is_some() { transaction.batch_execute("SET LOCAL statement_timeout = '10s'").await } else { Ok(()) }
}

/// Stores rows through the staging table, which must exist. Rows that the database refuses become dead letters.
pub async fn stage(
    transaction: &mut Transaction<'_>,
    statements: &Statements,
    rows: &Rows,
    written: &mut Written,
) -> Result<(), tokio_postgres::Error> {
    let mut ranges = Vec::from([Range { start: 0, end: rows.len() }]);
    while let Some(range) = ranges.pop() {
        if range.is_empty() {
            continue;
        }
        let attempt = transaction.savepoint("part").await?;
        match merge(&attempt, statements, rows, range.clone()).await {
            Ok(merged) => {
                attempt.commit().await?;
                merged.add_to(written);
                for (row, key) in merged.conflicts {
                    refuse(transaction, statements, (rows, row), conflict(key), written).await?;
                }
            }
            Err(error) if is_about_a_row(&error) => {
                attempt.rollback().await?;
                if range.len() == 1 {
                    refuse(transaction, statements, (rows, range.start), rejection(&error), written).await?;
                } else {
                    let middle = range.start + range.len() / 2;
                    // The first half is next.
                    ranges.extend([middle..range.end, range.start..middle]);
                }
            }
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// Refuses the message of a row. If several messages are in the row, each is stored or refused alone.
async fn refuse(
    transaction: &mut Transaction<'_>,
    statements: &Statements,
    (rows, row): (&Rows, usize),
    cause: DeadLetterCause,
    written: &mut Written,
) -> Result<(), tokio_postgres::Error> {
    let origins = rows.origins(row);
    if origins.is_empty() {
        written.refuse(rows.message(row), cause);
    }
    for origin in origins {
        // An origin has no origins, so that this ends.
        Box::pin(stage(transaction, statements, &origin, written)).await?;
    }
    Ok(())
}

/// The result of merging some rows.
#[derive(Default)]
struct Merged {
    new: u64,
    /// Rows that got values.
    changed: u64,
    /// Rows that contradicted stored rows, if the Pipeline keeps or replaces these.
    resolved: u64,
    /// Rows that changed nothing.
    redelivered: u64,
    /// The positions and keys of the rows that are not stored, because they contradict stored rows or have origins that contradict one another.
    conflicts: Vec<(usize, Key)>,
}

impl Merged {
    fn add_to(&self, written: &mut Written) {
        written.rows += self.new;
        written.merged += self.changed;
        written.resolved += self.resolved;
        written.redelivered += self.redelivered;
    }
}

/// The cause of what the database refuses.
#[must_use]
pub fn rejection(error: &tokio_postgres::Error) -> DeadLetterCause {
    let detail = error.as_db_error().map_or_else(|| error.to_string(), |error| format!("{} ({})", error.message(), error.code().code()));
    DeadLetterCause::new(Reason::Rejected, &format!("the database refuses it: {detail}"))
}

async fn merge(
    attempt: &Transaction<'_>,
    statements: &Statements,
    rows: &Rows,
    range: Range<usize>,
) -> Result<Merged, tokio_postgres::Error> {
    attempt.batch_execute(&statements.clear_staging).await?;
    let copy = attempt.prepare(&statements.copy_staging).await?;
    let Some((first, last)) = rows.span(range.clone()) else { return Ok(Merged::default()) };
    let span = (Timestamptz(first), Timestamptz(last));
    let staged = copy_pieces(CopyContext::Transaction(attempt), &copy, rows.numbered_copy_data(range.clone()), None).await?;
    let mut merged = Merged::default();
    if statements.on_conflict != OnConflict::DeadLetter {
        // Afterwards the rows no longer differ.
        merged.resolved = conflicts(attempt, statements, &span).await?.len() as u64;
    }
    for row in attempt.query(&statements.merge, &[]).await? {
        *if row.try_get(0)? { &mut merged.new } else { &mut merged.changed } += 1;
    }
    let mut refused = Vec::new();
    if statements.on_conflict == OnConflict::DeadLetter && merged.new + merged.changed < staged {
        // The statement above has locked the stored rows.
        refused = conflicts(attempt, statements, &span).await?;
    }
    merged.redelivered = staged.saturating_sub(merged.new + merged.changed).saturating_sub(refused.len() as u64);
    refused.extend(rows.contested(range));
    merged.conflicts = refused.into_iter().filter_map(|row| Some((row, rows.key(row)?))).collect();
    Ok(merged)
}

/// The positions of the staged rows that contradict stored rows.
async fn conflicts(
    attempt: &Transaction<'_>,
    statements: &Statements,
    (first, last): &(Timestamptz, Timestamptz),
) -> Result<Vec<usize>, tokio_postgres::Error> {
    let rows = attempt.query(&statements.conflicts, &[first, last]).await?;
    rows.iter().map(|row| Ok(usize::try_from(row.try_get::<_, i32>(0)?).unwrap_or(usize::MAX))).collect()
}

/// Writes the dead letters and the redelivery entries, and commits.
async fn finish(transaction: Transaction<'_>, target: &Target, job: &Job, mut written: Written) -> Result<Written, WriteError> {
    let mut counts = None;
    if !written.dead_letters.is_empty() {
        counts = Some(dead_letters::choose(&transaction, target, &job.batch, &mut written).await?);
    }
    if written.discarded.len() < written.dead_letters.len() {
        let copy = transaction.prepare(&target.statements.copy_dead_letters).await?;
        let pieces = dead_letters::copy_data(target, &job.session.gateway, &job.batch, &written);
        copy_pieces(CopyContext::Transaction(&transaction), &copy, pieces, None).await?;
    }
    acknowledgement::delete(&transaction, &job.session, &job.expired).await?;
    if !written.entries.is_empty() && !acknowledgement::commit(&transaction, &job.session, job.number, &written.entries).await? {
        return Err(WriteError::HoldSession);
    }
    if let Some(counts) = counts {
        dead_letters::count(&transaction, target, &job.session.gateway, &counts).await?;
    }
    transaction.commit().await?;
    Ok(written)
}

/// The transaction of a COPY.
#[derive(Clone, Copy)]
enum CopyContext<'a> {
    /// The COPY is the only statement of an implicit transaction.
    Implicit(&'a Client),
    /// An explicit transaction.
    Transaction(&'a Transaction<'a>),
}

impl CopyContext<'_> {
    async fn copy_in(self, copy: &Statement) -> Result<CopyInSink<Bytes>, tokio_postgres::Error> {
        match self {
            Self::Implicit(client) => client.copy_in(copy).await,
            Self::Transaction(transaction) => transaction.copy_in(copy).await,
        }
    }
}

async fn copy_rows(
    context: CopyContext<'_>,
    copy: &Statement,
    rows: &Rows,
    range: Range<usize>,
    insert_lock: Option<&InsertLock>,
) -> Result<u64, tokio_postgres::Error> {
    if range.is_empty() {
        return Ok(0);
    }
    copy_pieces(context, copy, rows.copy_data(range), insert_lock).await
}

async fn copy_pieces(
    context: CopyContext<'_>,
    copy: &Statement,
    pieces: impl Iterator<Item = Bytes>,
    insert_lock: Option<&InsertLock>,
) -> Result<u64, tokio_postgres::Error> {
    let mut sink = std::pin::pin!(context.copy_in(copy).await?);
    let _guard = match insert_lock {
        Some(lock) => Some(lock.lock().await),
        None => None,
    };
    for piece in pieces {
        sink.feed(piece).await?;
    }
    sink.finish().await
}

/// Whether the database refuses one row, and would accept others.
fn is_about_a_row(error: &tokio_postgres::Error) -> bool {
    error.code().is_some_and(|code| classify(code) == Fault::Data)
}
