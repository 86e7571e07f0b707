//! The connections of a worker to its table. Each writes one batch at a time, and repeats it until it is committed.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use tokio::sync::{Mutex, OwnedSemaphorePermit, Semaphore, mpsc};
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use super::fault::{Verdict, classify, judge};
use super::target::Target;
use super::transaction::{InsertLock, WriteError, Writer, rejection};
use super::write_probe::{WriteProbeError, probe};
use crate::database::connect::{ConnectError, connect};
use crate::database::health::DatabaseHealth;
use crate::database::uri::ConnectionUri;
use crate::runtime::backoff::Backoff;
use crate::runtime::error::chain;
use crate::sink::job::{Done, Finished, Job, Refused};
use crate::sink::written::Written;
use crate::state::{acknowledgement, session};

/// Number of batches that are written concurrently: while one waits for its commit, the rows of the next are inserted. More are not
/// faster (measured).
pub const WRITERS: usize = 2;

/// How long a batch may take. Longer than the statement timeout of the server, so that the server reports its error first.
const WRITE_TIMEOUT: Duration = Duration::from_secs(90);

/// How long the write probe may take. It waits for transactions that change the table.
const PROBE_TIMEOUT: Duration = Duration::from_secs(30);

/// The first delay before another attempt to connect.
const INITIAL_BACKOFF: Duration = Duration::from_millis(100);

/// The longest delay before another attempt to connect. The broker queues meanwhile.
const MAX_BACKOFF: Duration = Duration::from_secs(5);

/// How long a statement about a failed batch may take.
const RECORD_TIMEOUT: Duration = Duration::from_secs(5);

/// The queue of the connections. Clones share them.
#[derive(Clone, Debug)]
pub struct TimescaleSink {
    jobs: mpsc::Sender<Job>,
    slots: Arc<Semaphore>,
}

impl TimescaleSink {
    /// Connects in the background, and writes until the last clone is dropped.
    pub fn start(target: &Arc<Target>, uri: &ConnectionUri, health: &Arc<DatabaseHealth>) -> Self {
        let (jobs, queue) = mpsc::channel(WRITERS);
        let queue = Arc::new(Mutex::new(queue));
        let insert_lock = Arc::new(InsertLock::default());
        let stored = Arc::new(AtomicU64::new(0));
        for index in 0..WRITERS {
            let (target, uri, health) = (target.clone(), uri.clone(), health.clone());
            let connection = WriterConnection { index, target, uri, health, insert_lock: insert_lock.clone(), stored: stored.clone() };
            tokio::spawn(connection.run(queue.clone()));
        }
        Self { jobs, slots: Arc::new(Semaphore::new(WRITERS)) }
    }

    /// Waits until a batch can be written. Cancel safe.
    pub async fn slot(&self) -> Option<OwnedSemaphorePermit> {
        self.slots.clone().acquire_owned().await.ok()
    }

    /// Passes a batch to a connection. Never waits, because the job has its slot. `false` after the connections have stopped.
    #[must_use]
    pub fn submit(&self, job: Job) -> bool {
        self.jobs.try_send(job).is_ok()
    }
}

/// One of the connections.
struct WriterConnection {
    index: usize,
    target: Arc<Target>,
    uri: ConnectionUri,
    health: Arc<DatabaseHealth>,
    insert_lock: Arc<InsertLock>,
    /// Number of batches with rows that all connections have stored.
    stored: Arc<AtomicU64>,
}

/// A batch that is being written.
struct Pending {
    job: Job,
    started: Instant,
    /// Whether an attempt has failed, so that it may be committed.
    again: bool,
    /// How often the database has refused it.
    refusals: u32,
    /// Whether its failure is recorded for the operator.
    is_recorded: bool,
}

impl Pending {
    fn new(job: Job) -> Self {
        Self { job, started: Instant::now(), again: false, refusals: 0, is_recorded: false }
    }
}

/// How often a batch must fail before it is recorded: once may be the end of a connection.
const RECORDED_REFUSALS: u32 = 2;

#[derive(Debug, thiserror::Error)]
enum WriterConnectionError {
    #[error(transparent)]
    Connect(#[from] ConnectError),
    #[error(transparent)]
    Probe(#[from] WriteProbeError),
    #[error("failed to complete the write probe within {} s", PROBE_TIMEOUT.as_secs())]
    AwaitProbe,
}

impl WriterConnection {
    async fn run(self, queue: Arc<Mutex<mpsc::Receiver<Job>>>) {
        let mut pending: Option<Pending> = None;
        let mut backoff = Backoff::new(INITIAL_BACKOFF, MAX_BACKOFF);
        loop {
            match self.connect().await {
                Ok((mut writer, ended)) => {
                    info!(connection = self.index, "connected to the database");
                    // A batch that keeps failing shows that the probe does not prove enough.
                    if pending.is_none() {
                        self.health.writes(self.index);
                    }
                    match self.write(&mut writer, &ended, &queue, &mut pending, &mut backoff).await {
                        // The worker stops.
                        None => return,
                        Some(failure) => {
                            warn!(connection = self.index, failure, "failed to write to the database; nothing is acknowledged meanwhile");
                            self.health.fails(self.index, &failure, true);
                        }
                    }
                }
                Err(failure) => {
                    let connected = !matches!(failure, WriterConnectionError::Connect(_));
                    let failure = chain(&failure);
                    warn!(connection = self.index, failure, "failed to write to the database; nothing is acknowledged meanwhile");
                    self.health.fails(self.index, &failure, connected);
                }
            }
            self.health.retried();
            backoff.wait().await;
        }
    }

    async fn connect(&self) -> Result<(Writer, CancellationToken), WriterConnectionError> {
        let (mut client, connection) = connect(&self.uri, "fleetwright ingest").await?;
        let ended = CancellationToken::new();
        let guard = ended.clone().drop_guard();
        tokio::spawn(async move {
            let _guard = guard;
            if let Err(error) = connection.await {
                warn!(failure = chain(&error), "a connection to the database ended");
            }
        });
        timeout(PROBE_TIMEOUT, probe(&mut client, &self.target)).await.map_err(|_| WriterConnectionError::AwaitProbe)??;
        let writer = Writer::prepare(client, &self.target.statements, self.insert_lock.clone()).await.map_err(WriteProbeError::from)?;
        Ok((writer, ended))
    }

    /// Writes batches until the connection fails. Returns the failure, or `None` when the worker stops.
    async fn write(
        &self,
        writer: &mut Writer,
        ended: &CancellationToken,
        queue: &Mutex<mpsc::Receiver<Job>>,
        pending: &mut Option<Pending>,
        backoff: &mut Backoff,
    ) -> Option<String> {
        loop {
            if pending.is_none() {
                let next = async { queue.lock().await.recv().await };
                tokio::select! {
                    job = next => *pending = Some(Pending::new(job?)),
                    () = ended.cancelled() => return Some("the connection to the database ended".to_owned()),
                }
            }
            let current = pending.as_mut()?;
            let failure = match timeout(WRITE_TIMEOUT, writer.write(&self.target, &current.job, current.again)).await {
                Ok(Ok(written)) => {
                    backoff.reset();
                    let done = pending.take()?;
                    self.finish(writer, done, written).await;
                    continue;
                }
                Ok(Err(WriteError::HoldSession)) => {
                    info!(session = current.job.session.name, "{}", chain(&WriteError::HoldSession));
                    current.job.lost.cancel();
                    *pending = None;
                    self.health.writes(self.index);
                    continue;
                }
                Ok(Err(WriteError::Store(error))) => error,
                Err(_) => {
                    current.again = true;
                    return Some(format!("a batch was not written within {} s", WRITE_TIMEOUT.as_secs()));
                }
            };
            let mut verdict = self.judge(current, &failure);
            if verdict == Verdict::Split && !self.may_split(writer, current).await {
                verdict = Verdict::Retry;
            }
            match verdict {
                Verdict::Split => {
                    let refused = pending.take()?;
                    info!(
                        messages = refused.job.batch.len(),
                        failure = chain(&failure),
                        "the database refuses a batch: writing its halves"
                    );
                    self.give_back(refused.job);
                }
                Verdict::Reject => {
                    warn!(failure = chain(&failure), "the database refuses a message: it becomes a dead letter");
                    current.job.batch.reject(rejection(&failure));
                    current.job.entries = current.job.batch.entries(current.job.holds_all_entries);
                }
                Verdict::Retry => {
                    current.again = true;
                    let failure = chain(&failure);
                    self.record(writer, current, &failure).await;
                    return Some(failure);
                }
            }
        }
    }

    /// What to do with a batch after an error. A lost connection says nothing about the batch.
    fn judge(&self, pending: &mut Pending, error: &tokio_postgres::Error) -> Verdict {
        let Some(code) = error.code() else { return Verdict::Retry };
        let stored = self.stored.load(Ordering::Relaxed);
        pending.refusals += 1;
        let batch = &mut pending.job.batch;
        // The other parts of the same batch count too, because there may be no later message.
        let stored_before = *batch.stored_at_refusal.get_or_insert(stored);
        judge(classify(code), batch.len(), !batch.rows.is_empty(), pending.refusals, stored > stored_before)
    }

    /// Whether no earlier attempt can be committed any more, so that the halves may have numbers of their own.
    async fn may_split(&self, writer: &Writer, pending: &Pending) -> bool {
        if !pending.again || pending.job.entries.is_empty() {
            return true;
        }
        let fence = acknowledgement::fence(writer.client(), &pending.job.session, pending.job.number);
        matches!(timeout(RECORD_TIMEOUT, fence).await, Ok(Ok(true)))
    }

    async fn finish(&self, writer: &Writer, done: Pending, written: Written) {
        if !done.job.batch.rows.is_empty() {
            self.stored.fetch_add(1, Ordering::Relaxed);
        }
        if done.again {
            self.health.writes(self.index);
        }
        if done.is_recorded {
            let removal = session::record_failure(writer.client(), &done.job.session, None);
            if !matches!(timeout(RECORD_TIMEOUT, removal).await, Ok(Ok(()))) {
                // The next takeover of the session removes it.
                warn!("failed to remove the failure of a batch from the record of its session");
            }
        }
        let took = done.started.elapsed();
        // Fails only if the session has ended, which no longer needs the result.
        let _ = done.job.done.send(Finished::Committed(Done { batch: done.job.batch, number: done.job.number, written, took }));
    }

    /// Returns a batch to its session, which submits its halves.
    fn give_back(&self, job: Job) {
        self.health.writes(self.index);
        let Job { batch, number, expired, done, .. } = job;
        // Fails only if the session has ended.
        let _ = done.send(Finished::Refused(Refused { batch, number, expired }));
    }

    /// Records for the operator that a batch keeps failing, if the database answers.
    async fn record(&self, writer: &Writer, pending: &mut Pending, failure: &str) {
        if pending.refusals < RECORDED_REFUSALS || pending.is_recorded {
            return;
        }
        let recording = session::record_failure(writer.client(), &pending.job.session, Some(failure));
        match timeout(RECORD_TIMEOUT, recording).await {
            Ok(Ok(())) => pending.is_recorded = true,
            // The failure itself is in the readiness and in the log.
            Ok(Err(error)) => info!(failure = chain(&error), "failed to record that a batch keeps failing"),
            Err(_) => info!("failed to record that a batch keeps failing: no answer from the database"),
        }
    }
}
