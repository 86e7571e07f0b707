//! A batch on its way to an output and back.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{OwnedSemaphorePermit, mpsc};
use tokio_util::sync::CancellationToken;

use super::batch::Batch;
use super::written::Written;
use crate::state::redelivery::RedeliveryEntry;
use crate::state::session::SessionKey;

/// A batch to write.
#[derive(Debug)]
pub struct Job {
    /// The batch, arranged.
    pub batch: Batch,
    /// The session whose messages it has.
    pub session: Arc<SessionKey>,
    /// Its number in the session; never used twice.
    pub number: i64,
    /// The redelivery entries to commit with it.
    pub entries: Vec<RedeliveryEntry>,
    /// Whether these are the entries of all its messages.
    pub holds_all_entries: bool,
    /// Batches whose redelivery entries are no longer needed.
    pub expired: Vec<i64>,
    /// The permit to be written now. The next batch gets it when the job is dropped.
    pub slot: OwnedSemaphorePermit,
    /// Receives the batch after its commit, or after the database has refused it.
    pub done: mpsc::UnboundedSender<Finished>,
    /// Cancelled when another process has taken the session over: nothing of the batch can be stored by this process any more.
    pub lost: CancellationToken,
}

/// A batch that comes back.
#[derive(Debug)]
pub enum Finished {
    /// It is committed.
    Committed(Done),
    /// The database refuses it: nothing of it is stored. Its halves are to be submitted as batches of their own.
    Refused(Refused),
}

/// A batch that the database refused.
#[derive(Debug)]
pub struct Refused {
    /// The batch.
    pub batch: Batch,
    /// Its number.
    pub number: i64,
    /// Batches whose redelivery entries are no longer needed.
    pub expired: Vec<i64>,
}

/// A batch that is committed.
#[derive(Debug)]
pub struct Done {
    /// The batch.
    pub batch: Batch,
    /// Its number.
    pub number: i64,
    /// What was stored.
    pub written: Written,
    /// Time from the first attempt to the commit.
    pub took: Duration,
}
