//! The connections of a worker to its table. Each writes one batch at a time, and repeats it until it is committed.

use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::{Mutex, OwnedSemaphorePermit, Semaphore, mpsc};
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use super::target::Target;
use super::transaction::{InsertLock, WriteError, Writer};
use super::write_probe::{WriteProbeError, probe};
use crate::database::connect::{ConnectError, connect};
use crate::database::health::DatabaseHealth;
use crate::database::uri::ConnectionUri;
use crate::runtime::backoff::Backoff;
use crate::runtime::error::chain;
use crate::sink::job::{Done, Job};

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
        for index in 0..WRITERS {
            let (target, uri, health) = (target.clone(), uri.clone(), health.clone());
            let connection = WriterConnection { index, target, uri, health, insert_lock: insert_lock.clone() };
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
}

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
        let mut pending: Option<(Job, Instant)> = None;
        let mut backoff = Backoff::new(INITIAL_BACKOFF, MAX_BACKOFF);
        loop {
            match self.connect().await {
                Ok((mut writer, ended)) => {
                    info!(connection = self.index, "connected to the database");
                    self.health.writes(self.index);
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
        pending: &mut Option<(Job, Instant)>,
        backoff: &mut Backoff,
    ) -> Option<String> {
        loop {
            let again = pending.is_some();
            if pending.is_none() {
                let next = async { queue.lock().await.recv().await };
                tokio::select! {
                    job = next => *pending = Some((job?, Instant::now())),
                    () = ended.cancelled() => return Some("the connection to the database ended".to_owned()),
                }
            }
            let (job, started) = pending.as_ref()?;
            match timeout(WRITE_TIMEOUT, writer.write(&self.target, job, again)).await {
                Ok(Ok(written)) => {
                    backoff.reset();
                    let took = started.elapsed();
                    let (job, _) = pending.take()?;
                    // Fails only if the session has ended, which no longer needs the result.
                    let _ = job.done.send(Done { batch: job.batch, number: job.number, written, took });
                }
                Ok(Err(WriteError::HoldSession)) => {
                    info!(session = job.session.name, "{}", chain(&WriteError::HoldSession));
                    job.lost.cancel();
                    *pending = None;
                }
                Ok(Err(failure)) => return Some(chain(&failure)),
                Err(_) => return Some(format!("a batch was not written within {} s", WRITE_TIMEOUT.as_secs())),
            }
        }
    }
}
