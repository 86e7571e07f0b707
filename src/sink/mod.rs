//! The outputs of a Pipeline.
//!
//! A batch (`batch`) is what one transaction of an output stores: rows, which the output's [`row_writer::RowWriter`] encoded, and dead letters.
//! It is passed to a [`Sink`] as a `job`, and comes back with what was stored (`written`) once it is committed. `timescale` is the first
//! output. Nothing here depends on a role.

pub mod batch;
pub mod job;
pub mod row_writer;
pub mod timescale;
pub mod written;

use tokio::sync::OwnedSemaphorePermit;

use self::job::Job;
use self::timescale::writers::TimescaleSink;

/// An output of a Pipeline. Clones share its connections.
#[derive(Clone, Debug)]
pub enum Sink {
    /// A hypertable of TimescaleDB.
    Timescale(TimescaleSink),
}

impl Sink {
    /// Waits until a batch can be written. `None` after the output has stopped. Cancel safe.
    pub async fn slot(&self) -> Option<OwnedSemaphorePermit> {
        match self {
            Self::Timescale(sink) => sink.slot().await,
        }
    }

    /// Passes a batch on. Never waits, because the job has its slot. `false` after the output has stopped.
    #[must_use]
    pub fn submit(&self, job: Job) -> bool {
        match self {
            Self::Timescale(sink) => sink.submit(job),
        }
    }
}
