//! One batch in one transaction: rows, dead letters, and what is about to be acknowledged.
//!
//! The usual way is a COPY straight into the table. When a row of it is refused, because its key is there already or for any
//! reason of its own, nothing of that COPY is stored, and the batch goes by the staging table: rows with new keys are
//! stored, those that are there already with the same values are redeliveries, those with other values become dead letters,
//! and rows that the database refuses are found by halving.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::sync::Arc;

use bytes::Bytes;
use futures::SinkExt;
use tokio::sync::Mutex;
use tokio_postgres::error::SqlState;
use tokio_postgres::{Client, CopyInSink, Statement, Transaction};

use super::statements::{Statements, commit_entries, forget_batches, is_committed};
use super::{Job, Target};
use crate::ingest::batch::{Batch, conflict};
use crate::ingest::dead_letter::{Reason, Refusal};
use crate::ingest::decode::rows::{Key, Rows};
use crate::ingest::decode::time::Time;
use crate::ingest::ledger::Entry;
use crate::ingest::sink::dead_letters;

/// How many batches go by the staging table after one that held a redelivery: they come in swarms, and a COPY that is
/// refused leaves its dead rows in the table.
const STAGED_AFTER_DUPLICATE: u32 = 16;

/// From how many rows on the connections take turns to insert. Two COPYs at once into one table are slower than one after the
/// other (measured: each row takes PostgreSQL twice as long), presumably since rows come in the order of their times: the later
/// batch has taken the end of the index already, where inserting is cheap and pages are filled, and the earlier one splits pages
/// before it. So only the commits overlap. Fewer rows than these take less time than the statements that this needs.
const ROWS_IN_TURN: usize = 2_000;

/// Whoever holds it inserts. It is taken when a COPY has begun, so that nobody who holds it waits for a lock on the table.
pub type Turn = Mutex<()>;

/// What a transaction stored.
#[derive(Debug, Default)]
pub struct Written {
    /// Rows that are new.
    pub rows: u64,
    /// Rows that were there already, with the same values.
    pub redelivered: u64,
    /// The dead letters, by the number of their message.
    pub dead_letters: BTreeMap<u32, Refusal>,
    /// Those of them that are too many to be kept: they are counted.
    pub discarded: BTreeSet<u32>,
    /// How many rows of each message the database refused.
    pub refused_rows: BTreeMap<u32, u32>,
    /// What the ledger holds of this batch.
    pub entries: Vec<Entry>,
}

impl Written {
    /// The dead letters of which other readings are rows.
    #[must_use]
    pub fn partial(&self, batch: &Batch) -> BTreeSet<u32> {
        let rows = batch.rows.count_by_message(&self.dead_letters);
        rows.into_iter()
            .filter(|(message, rows)| *rows > self.refused_rows.get(message).copied().unwrap_or(0))
            .map(|(message, _)| message)
            .collect()
    }

    /// A refusal that the database pronounced.
    fn refuse(&mut self, message: Option<u32>, refusal: Refusal) {
        let Some(message) = message else { return };
        self.dead_letters.entry(message).and_modify(|first| first.join(&refusal)).or_insert(refusal);
        *self.refused_rows.entry(message).or_default() += 1;
    }
}

/// Why a batch is not stored. Nothing of it is, or all of it and the answer was lost.
#[derive(Debug, thiserror::Error)]
pub enum WriteError {
    /// The database.
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
    turn: Arc<Turn>,
    staging: bool,
    staged: u32,
}

impl Writer {
    /// Prepares a connection.
    pub async fn prepare(client: Client, statements: &Statements, turn: Arc<Turn>) -> Result<Self, tokio_postgres::Error> {
        let copy = client.prepare(&statements.copy).await?;
        Ok(Self { client, copy, turn, staging: false, staged: 0 })
    }

    /// Stores a batch. May be called again with the same batch after an error, with `again`.
    pub async fn write(&mut self, target: &Target, job: &Job, again: bool) -> Result<Written, WriteError> {
        if again && self.is_committed(job).await? {
            return Ok(Written { dead_letters: job.batch.dead_letters.clone(), entries: job.entries.clone(), ..Written::default() });
        }
        if self.staged > 0 {
            self.staged -= 1;
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

    async fn is_committed(&self, job: &Job) -> Result<bool, WriteError> {
        Ok(self.client.query_one(&is_committed(), &[&job.session.name, &job.number]).await?.get(0))
    }

    async fn write_straight(&mut self, target: &Target, job: &Job) -> Result<Written, WriteError> {
        let rows = &job.batch.rows;
        let turn = (rows.len() >= ROWS_IN_TURN).then_some(&*self.turn);
        if turn.is_none() && job.batch.dead_letters.is_empty() && job.entries.is_empty() && job.expired.is_empty() {
            // One statement is a transaction of its own.
            return Ok(Written {
                rows: copy_rows(Open::Nothing(&self.client), &self.copy, rows, 0..rows.len(), None).await?,
                ..Written::default()
            });
        }
        let transaction = self.client.transaction().await?;
        let stored = copy_rows(Open::Transaction(&transaction), &self.copy, rows, 0..rows.len(), turn).await?;
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
        let mut written = Written { dead_letters: job.batch.dead_letters.clone(), entries: job.entries.clone(), ..Written::default() };
        stage(&mut transaction, &target.statements, &job.batch, &mut written).await?;
        if !job.holds_all_entries {
            let fresh = written.dead_letters.keys().filter(|number| !job.batch.dead_letters.contains_key(number));
            let fresh: Vec<Entry> = fresh.filter_map(|number| job.batch.entry(*number)).collect();
            written.entries.extend(fresh);
        }
        finish(transaction, target, job, written).await
    }
}

/// Stores the rows of a batch by way of the staging table, which must be there. What the database refuses becomes a dead letter.
pub async fn stage(
    transaction: &mut Transaction<'_>,
    statements: &Statements,
    batch: &Batch,
    written: &mut Written,
) -> Result<(), tokio_postgres::Error> {
    let mut ranges = Vec::from([Range { start: 0, end: batch.rows.len() }]);
    while let Some(range) = ranges.pop() {
        if range.is_empty() {
            continue;
        }
        let attempt = transaction.savepoint("part").await?;
        match merge(&attempt, statements, &batch.rows, range.clone()).await {
            Ok(merged) => {
                attempt.commit().await?;
                merged.add_to(written, batch);
            }
            Err(error) if is_about_a_row(&error) => {
                attempt.rollback().await?;
                if range.len() == 1 {
                    written.refuse(batch.rows.message(range.start), rejection(&error));
                } else {
                    let middle = range.start + range.len() / 2;
                    // The first half is taken first.
                    ranges.extend([middle..range.end, range.start..middle]);
                }
            }
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// What became of some rows.
struct Merged {
    staged: u64,
    new: u64,
    conflicts: Vec<Key>,
}

impl Merged {
    fn add_to(&self, written: &mut Written, batch: &Batch) {
        written.rows += self.new;
        written.redelivered += self.staged.saturating_sub(self.new).saturating_sub(self.conflicts.len() as u64);
        for key in &self.conflicts {
            written.refuse(batch.rows.message_of(*key), conflict(*key));
        }
    }
}

fn rejection(error: &tokio_postgres::Error) -> Refusal {
    let detail = error.as_db_error().map_or_else(|| error.to_string(), |error| format!("{} ({})", error.message(), error.code().code()));
    Refusal::new(Reason::Rejected, &format!("the database refuses the row: {detail}"))
}

async fn merge(
    attempt: &Transaction<'_>,
    statements: &Statements,
    rows: &Rows,
    range: Range<usize>,
) -> Result<Merged, tokio_postgres::Error> {
    attempt.batch_execute(&statements.clear_staging).await?;
    let copy = attempt.prepare(&statements.copy_staging).await?;
    let span = rows.span(range.clone());
    let staged = copy_rows(Open::Transaction(attempt), &copy, rows, range, None).await?;
    let new = attempt.execute(&statements.merge, &[]).await?;
    let mut conflicts = Vec::new();
    if new < staged
        && let Some((first, last)) = span
    {
        for row in attempt.query(&statements.conflicts, &[&first, &last]).await? {
            conflicts.push(Key { time: row.get::<_, Time>(0), device: row.get(1) });
        }
    }
    Ok(Merged { staged, new, conflicts })
}

/// Dead letters and ledger, and the commit.
async fn finish(transaction: Transaction<'_>, target: &Target, job: &Job, mut written: Written) -> Result<Written, WriteError> {
    let mut counts = None;
    if !written.dead_letters.is_empty() {
        counts = Some(dead_letters::choose(&transaction, target, &job.batch, &mut written).await?);
    }
    if written.discarded.len() < written.dead_letters.len() {
        let copy = transaction.prepare(&target.statements.copy_dead_letters).await?;
        let pieces = dead_letters::copy_data(target, &job.session.gateway, &job.batch, &written);
        copy_pieces(Open::Transaction(&transaction), &copy, pieces, None).await?;
    }
    if !job.expired.is_empty() {
        transaction.execute(&forget_batches(), &[&job.session.name, &job.expired]).await?;
    }
    if !written.entries.is_empty() {
        let entries = Entry::encode(&written.entries);
        let values: [&(dyn tokio_postgres::types::ToSql + Sync); 4] = [&job.session.name, &job.session.generation, &job.number, &entries];
        if transaction.execute(&commit_entries(), &values).await? == 0 {
            return Err(WriteError::HoldSession);
        }
    }
    if let Some(counts) = counts {
        dead_letters::count(&transaction, target, &job.session.gateway, &counts).await?;
    }
    transaction.commit().await?;
    Ok(written)
}

/// What a COPY is part of.
#[derive(Clone, Copy)]
enum Open<'a> {
    /// It is a transaction of its own.
    Nothing(&'a Client),
    /// Of this transaction.
    Transaction(&'a Transaction<'a>),
}

impl Open<'_> {
    async fn copy_in(self, copy: &Statement) -> Result<CopyInSink<Bytes>, tokio_postgres::Error> {
        match self {
            Self::Nothing(client) => client.copy_in(copy).await,
            Self::Transaction(transaction) => transaction.copy_in(copy).await,
        }
    }
}

async fn copy_rows(
    open: Open<'_>,
    copy: &Statement,
    rows: &Rows,
    range: Range<usize>,
    turn: Option<&Turn>,
) -> Result<u64, tokio_postgres::Error> {
    if range.is_empty() {
        return Ok(0);
    }
    copy_pieces(open, copy, rows.copy_data(range), turn).await
}

async fn copy_pieces(
    open: Open<'_>,
    copy: &Statement,
    pieces: impl Iterator<Item = Bytes>,
    turn: Option<&Turn>,
) -> Result<u64, tokio_postgres::Error> {
    let mut sink = std::pin::pin!(open.copy_in(copy).await?);
    let _turn = match turn {
        Some(turn) => Some(turn.lock().await),
        None => None,
    };
    for piece in pieces {
        sink.feed(piece).await?;
    }
    sink.finish().await
}

/// Whether the database refuses a row, and would take another: data exceptions (class 22), violated constraints (23), a view's
/// check (44), and what a trigger raises. But not what speaks of the format of the COPY, which holds for every row.
fn is_about_a_row(error: &tokio_postgres::Error) -> bool {
    const FORMAT: [SqlState; 2] = [SqlState::INVALID_BINARY_REPRESENTATION, SqlState::BAD_COPY_FILE_FORMAT];
    error.code().is_some_and(|code| {
        let class = code.code().get(..2).unwrap_or_default();
        (matches!(class, "22" | "23" | "44") || *code == SqlState::RAISE_EXCEPTION) && !FORMAT.contains(code)
    })
}
