//! From batches to the database: two connections, each with one batch at a time, which it writes until it is written.

pub mod allowance;
pub mod dead_letters;
pub mod health;
pub mod proof;
pub mod session_store;
pub mod statements;
pub mod transaction;

use std::sync::Arc;
use std::time::{Duration, Instant};

use rand::RngExt;
use tokio::sync::{Mutex, OwnedSemaphorePermit, Semaphore, mpsc};
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use self::health::Health;
use self::proof::{ProofError, prove};
use self::statements::Statements;
use self::transaction::{Turn, WriteError, Writer, Written};
use super::batch::Batch;
use super::ledger::Entry;
use super::metrics::WorkerMetrics;
use crate::database::connect::{ConnectError, connect};
use crate::database::uri::ConnectionUri;
use crate::runtime::error::chain;

/// How many batches are being written at once: while one waits for its commit, the next one's rows are inserted. More gain
/// nothing (measured).
pub const WRITERS: usize = 2;

/// How long a batch may take. Longer than the server's own limit for a statement, so that its word comes first.
const WRITE_TIMEOUT: Duration = Duration::from_secs(90);

/// How long the proof may take; it waits for whoever changes the table.
const PROOF_TIMEOUT: Duration = Duration::from_secs(30);

/// The shortest and the longest wait before the next attempt; doubled at each failure.
const BACKOFF: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(5));

/// What is written to, and for whom.
#[derive(Debug)]
pub struct Target {
    /// Namespace of the Pipeline.
    pub namespace: String,
    /// Name of the Pipeline.
    pub pipeline: String,
    /// The statements for its table.
    pub statements: Statements,
    /// The most bytes of dead letters that are kept in an hour.
    pub dead_letter_bytes_per_hour: i64,
}

/// A worker's session with a broker, as the database knows it.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct SessionKey {
    /// `<namespace>/<pipeline>/<gateway>`, and a number where the gateway has several.
    pub name: String,
    /// Name of the Gateway.
    pub gateway: String,
    /// Raised by every process that takes the session over.
    pub generation: i64,
}

/// A batch to write.
#[derive(Debug)]
pub struct Job {
    /// The batch, arranged.
    pub batch: Batch,
    /// Whose it is.
    pub session: Arc<SessionKey>,
    /// Its number in the session; never used twice.
    pub number: i64,
    /// What the ledger must hold of it.
    pub entries: Vec<Entry>,
    /// Whether that is every message of it.
    pub holds_all_entries: bool,
    /// What the ledger no longer needs.
    pub expired: Vec<i64>,
    /// The right to be written now.
    pub _slot: OwnedSemaphorePermit,
    /// Who waits for it.
    pub done: mpsc::UnboundedSender<Done>,
    /// To be cancelled where another process has taken the session over: nothing of it can be stored here any more.
    pub lost: CancellationToken,
}

/// A batch that is written.
#[derive(Debug)]
pub struct Done {
    /// The batch.
    pub batch: Batch,
    /// Its number.
    pub number: i64,
    /// What was stored.
    pub written: Written,
    /// How long it took, from the first attempt to the commit.
    pub took: Duration,
}

/// Where batches go. Clones share the two connections.
#[derive(Clone, Debug)]
pub struct Sink {
    jobs: mpsc::Sender<Job>,
    slots: Arc<Semaphore>,
}

impl Sink {
    /// Connects in the background, and writes until the last clone is dropped.
    pub fn start(target: &Arc<Target>, uri: &ConnectionUri, health: &Arc<Health>, metrics: &WorkerMetrics) -> Self {
        let (jobs, queue) = mpsc::channel(WRITERS);
        let queue = Arc::new(Mutex::new(queue));
        let turn = Arc::new(Turn::default());
        for index in 0..WRITERS {
            let (target, uri, health, metrics, turn) = (target.clone(), uri.clone(), health.clone(), metrics.clone(), turn.clone());
            let connector = Connector { index, target, uri, health, metrics, turn };
            tokio::spawn(connector.run(queue.clone()));
        }
        Self { jobs, slots: Arc::new(Semaphore::new(WRITERS)) }
    }

    /// Waits until a batch can be written. Cancel safe.
    pub async fn slot(&self) -> Option<OwnedSemaphorePermit> {
        self.slots.clone().acquire_owned().await.ok()
    }

    /// Hands a batch over. Never waits, for it has its slot.
    ///
    /// `false` when the writers are gone.
    pub fn submit(&self, job: Job) -> bool {
        self.jobs.try_send(job).is_ok()
    }
}

/// One of the connections.
struct Connector {
    index: usize,
    target: Arc<Target>,
    uri: ConnectionUri,
    health: Arc<Health>,
    metrics: WorkerMetrics,
    turn: Arc<Turn>,
}

#[derive(Debug, thiserror::Error)]
enum ConnectorError {
    #[error(transparent)]
    Connect(#[from] ConnectError),
    #[error(transparent)]
    Prove(#[from] ProofError),
    #[error("failed to prove a write within {} s", PROOF_TIMEOUT.as_secs())]
    AwaitProof,
}

impl Connector {
    async fn run(self, queue: Arc<Mutex<mpsc::Receiver<Job>>>) {
        let mut pending: Option<(Job, Instant)> = None;
        let mut backoff = BACKOFF.0;
        loop {
            match self.connect().await {
                Ok((mut writer, ended)) => {
                    info!(connection = self.index, "the database takes rows");
                    self.health.writes(self.index);
                    match self.write(&mut writer, &ended, &queue, &mut pending, &mut backoff).await {
                        // Nobody sends any more.
                        None => return,
                        Some(failure) => {
                            warn!(connection = self.index, failure, "the database does not take rows; nothing is acknowledged meanwhile");
                            self.health.fails(self.index, &failure, true);
                        }
                    }
                }
                Err(failure) => {
                    let connected = !matches!(failure, ConnectorError::Connect(_));
                    let failure = chain(&failure);
                    warn!(connection = self.index, failure, "the database does not take rows; nothing is acknowledged meanwhile");
                    self.health.fails(self.index, &failure, connected);
                }
            }
            self.metrics.database_retries.inc();
            let jitter = rand::rng().random_range(0.5..1.0);
            sleep(backoff.mul_f64(jitter)).await;
            backoff = (backoff * 2).min(BACKOFF.1);
        }
    }

    async fn connect(&self) -> Result<(Writer, CancellationToken), ConnectorError> {
        let (mut client, connection) = connect(&self.uri, "fleetwright ingest").await?;
        let ended = CancellationToken::new();
        let guard = ended.clone().drop_guard();
        tokio::spawn(async move {
            let _guard = guard;
            if let Err(error) = connection.await {
                warn!(failure = chain(&error), "a connection to the database ended");
            }
        });
        timeout(PROOF_TIMEOUT, prove(&mut client, &self.target)).await.map_err(|_| ConnectorError::AwaitProof)??;
        let writer = Writer::prepare(client, &self.target.statements, self.turn.clone()).await.map_err(ProofError::from)?;
        Ok((writer, ended))
    }

    /// Writes batches until the connection fails (why), or until there will be no more (`None`).
    async fn write(
        &self,
        writer: &mut Writer,
        ended: &CancellationToken,
        queue: &Mutex<mpsc::Receiver<Job>>,
        pending: &mut Option<(Job, Instant)>,
        backoff: &mut Duration,
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
                    *backoff = BACKOFF.0;
                    let took = started.elapsed();
                    let (job, _) = pending.take()?;
                    // A session that is gone has no use for the answer.
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
