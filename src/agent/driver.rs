//! The agent's loop: news -> files -> reload -> proof -> report. Knows nothing of Kubernetes.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use thiserror::Error;
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, sleep_until, timeout_at};
use tokio_util::sync::CancellationToken;
use tracing::{debug, info, warn};

use super::files::{self, WriteFile};
use super::metrics::Metrics;
use super::presence::Presence;
use super::presentation::{Presentation, Presented};
use super::process;
use super::session::{BrokerAddress, CanarySession, LoginError, end_session};
use super::state::{Change, Content, Refusal, State, Waiting};
use crate::api::name::CANARY_USERNAME;
use crate::broker::credential::Password;
use crate::broker::credential::entry::EntryError;
use crate::configuration::agent::AgentConfiguration;
use crate::runtime::error::chain;
use crate::runtime::readiness::Readiness;

/// Check that holds while the broker accepts the agent's login.
pub const BROKER_CHECK: &str = "broker";

/// Changes are gathered until none has come for this long …
const QUIET: Duration = Duration::from_millis(20);

/// … or the first of them is this old. The operator gathers too: this is for what comes in several Secrets.
const LONGEST_GATHERING: Duration = Duration::from_millis(80);

/// The pauses between two logins that prove: the first is about what a reload takes with few clients, and each is twice
/// the one before.
const FIRST_PAUSE: Duration = Duration::from_millis(5);
const LONGEST_PAUSE: Duration = Duration::from_millis(250);

/// A reload that is not proven after this long is asked for again, and shows.
const WORTH_TELLING: Duration = Duration::from_secs(10);

/// A session that could not be ended is tried again after this long.
const END_SESSION_AGAIN: Duration = Duration::from_secs(5);

/// Where things are.
#[derive(Clone, Debug)]
pub struct Places {
    /// Mosquitto's configuration, by which its process is found.
    pub configuration: PathBuf,
    /// Where Mosquitto's files are written.
    pub runtime: PathBuf,
    /// The broker's volume.
    pub data: PathBuf,
    /// The broker's internal listener.
    pub broker: BrokerAddress,
}

/// What the loop cannot go on without.
#[derive(Debug, Error)]
pub enum DriveError {
    /// A file.
    #[error(transparent)]
    WriteFile(#[from] WriteFile),
    /// An entry of the agent's own.
    #[error("failed to render the broker's files")]
    Render(#[from] EntryError),
}

/// The files as they were last written.
#[derive(Debug)]
struct Written {
    content: Content,
    canary: Password,
    /// When the first change came that led to them.
    since: Instant,
    /// Whether the broker has proven them, if only an earlier process of it.
    proven: bool,
}

/// Where the broker stands with the files.
#[derive(Debug)]
enum Proof {
    /// It has not accepted the canary's login yet.
    Outstanding {
        /// When it was last told to reload, if it was.
        signalled: Option<Instant>,
        pause: Duration,
        next: Instant,
    },
    /// It has; with the session.
    Given(CanarySession),
}

/// The state of the loop.
pub struct Driver {
    places: Places,
    state: State,
    changes: mpsc::Receiver<Change>,
    proven: watch::Sender<Option<BTreeMap<usize, String>>>,
    written: Option<Written>,
    proof: Proof,
    presentation: Presentation,
    generation: i64,
    end_sessions_at: Option<Instant>,
    first_written: CancellationToken,
    readiness: Readiness,
    metrics: Arc<Metrics>,
}

impl Driver {
    /// A driver that takes news from `changes`, and tells in `proven` which revision of each shard the broker has proven, and in
    /// `presented` which certificates.
    #[must_use]
    pub fn new(
        places: Places,
        configuration: &AgentConfiguration,
        changes: mpsc::Receiver<Change>,
        proven: watch::Sender<Option<BTreeMap<usize, String>>>,
        presented: watch::Sender<Option<Presented>>,
        readiness: Readiness,
        metrics: Arc<Metrics>,
    ) -> Self {
        let secrets = configuration.tls_secrets();
        let written = files::written_certificates(&places.runtime, &secrets);
        let secrets: Vec<String> = secrets.into_iter().collect();
        let mut state = State::new(&secrets, files::remembered_workers(&places.data)).with_host_names(&configuration.host_names);
        for change in written {
            // What cannot be used is as good as not there.
            let _ = state.absorb(change, Timestamp::now());
        }
        let presentation = Presentation::new(&places.broker.host, &configuration.tls_listeners, presented);
        let proof = outstanding(None);
        let first_written = CancellationToken::new();
        Self {
            places,
            state,
            changes,
            proven,
            written: None,
            proof,
            presentation,
            generation: 0,
            end_sessions_at: None,
            first_written,
            readiness,
            metrics,
        }
    }

    /// The same, which says beforehand which refused clients are its own.
    #[must_use]
    pub fn with_presence(mut self, presence: Presence) -> Self {
        self.presentation = self.presentation.with_presence(presence);
        self
    }

    /// Cancelled once the files are there for the first time: from then on Mosquitto can start.
    #[must_use]
    pub fn first_written(&self) -> CancellationToken {
        self.first_written.clone()
    }

    /// Runs until `shutdown` is cancelled.
    ///
    /// # Errors
    /// When a file cannot be written.
    pub async fn run(mut self, shutdown: CancellationToken) -> Result<(), DriveError> {
        loop {
            let next_login = match &self.proof {
                Proof::Outstanding { next, .. } if self.written.is_some() => Some(*next),
                _ => None,
            };
            tokio::select! {
                () = shutdown.cancelled() => return Ok(()),
                Some(change) = self.changes.recv() => {
                    let since = Instant::now();
                    self.gather(change, since).await;
                    self.write_if_changed(since)?;
                }
                reason = ended(&mut self.proof) => {
                    info!(reason, "the broker ended the agent's session: proving again");
                    self.readiness.fails(BROKER_CHECK, "the broker ended the agent's session");
                    self.presentation.forget();
                    self.proof = outstanding(None);
                }
                () = until(self.state.next_due()) => {
                    for change in self.state.take_due(Timestamp::now()) {
                        self.absorb(change);
                    }
                    self.write_if_changed(Instant::now())?;
                }
                () = at(self.presentation.due()) => {
                    let none = BTreeMap::new();
                    let certificates = self.written.as_ref().map_or(&none, |written| &written.content.certificates);
                    self.presentation.look(certificates).await;
                }
                () = at(next_login) => self.prove().await?,
                () = at(self.end_sessions_at) => self.end_sessions().await?,
            }
        }
    }

    /// Takes over a change, and those that follow closely.
    async fn gather(&mut self, first: Change, since: Instant) {
        self.absorb(first);
        loop {
            let until = (Instant::now() + QUIET).min(since + LONGEST_GATHERING);
            match timeout_at(until, self.changes.recv()).await {
                Ok(Some(change)) => self.absorb(change),
                Ok(None) | Err(_) => return,
            }
        }
    }

    fn absorb(&mut self, change: Change) {
        let Err(refusal) = self.state.absorb(change, Timestamp::now()) else { return };
        let content = match refusal {
            Refusal::Shard { .. } | Refusal::ShardDeleted { .. } => "shard",
            Refusal::Certificate { .. } | Refusal::CertificateMissing { .. } => "certificate",
        };
        self.metrics.refused.with_label_values(&[content]).inc();
        warn!("{}", chain(&refusal));
    }

    /// Writes the files where they should be others, and has the broker read them.
    fn write_if_changed(&mut self, since: Instant) -> Result<(), DriveError> {
        let content = match self.state.content() {
            Ok(content) => content,
            Err(waiting) => {
                self.tell_waiting(&waiting);
                return Ok(());
            }
        };
        if self.written.as_ref().is_some_and(|written| written.content == content) {
            return Ok(());
        }
        let canary = Password::generate();
        let files = self.state.files(&content, &canary)?;
        // Remembered first: a worker that could log in and is not remembered might leave a session for good.
        files::remember_workers(&self.places.data, &self.state.workers())?;
        files::write_all(&self.places.runtime, &content, &files)?;
        self.generation += 1;
        self.metrics.written.set(self.generation);
        info!(generation = self.generation, shards = content.revisions.len(), departed = content.departed.len(), "files written");
        // What was on its way and is not proven yet is as old as its own first change.
        let since = self.written.take().filter(|written| !written.proven).map_or(since, |written| written.since);
        self.written = Some(Written { content, canary, since, proven: false });
        self.first_written.cancel();
        // A broker that has answered takes the signal; another may be starting, and is asked first.
        let answered = match &self.proof {
            Proof::Given(_) => true,
            Proof::Outstanding { signalled, .. } => signalled.is_some(),
        };
        self.proof = outstanding(None);
        if answered {
            self.reload();
        }
        Ok(())
    }

    fn tell_waiting(&self, waiting: &Waiting) {
        if self.written.is_none() {
            self.readiness.fails(BROKER_CHECK, waiting.to_string());
            info!("waiting: {waiting}");
        } else {
            debug!("waiting: {waiting}");
        }
    }

    fn reload(&mut self) {
        match process::reload(&self.places.configuration) {
            Ok(()) => {
                self.metrics.reloads.inc();
                self.proof = outstanding(Some(Instant::now()));
            }
            Err(error) => warn!("{}", chain(&error)),
        }
    }

    /// One login with the password that only the last files have.
    async fn prove(&mut self) -> Result<(), DriveError> {
        let (Some(written), Proof::Outstanding { signalled, pause, .. }) = (&self.written, &self.proof) else { return Ok(()) };
        let (signalled, pause) = (*signalled, *pause);
        match CanarySession::login(&self.places.broker, CANARY_USERNAME, &written.canary, &self.metrics).await {
            Ok(session) => {
                if !written.proven {
                    self.metrics.change_to_proof.observe(written.since.elapsed().as_secs_f64());
                }
                if let Some(signalled) = signalled {
                    self.metrics.reload_to_proof.observe(signalled.elapsed().as_secs_f64());
                }
                self.proof = Proof::Given(session);
                self.proven_now();
                return self.end_sessions().await;
            }
            // It runs and has read other files: told now, or (should the signal have been lost) told again.
            Err(LoginError::Refused { .. }) if signalled.is_none_or(|at| at.elapsed() >= WORTH_TELLING) => self.reload(),
            Err(error) => debug!("{}", chain(&error)),
        }
        if written_for(self.written.as_ref()) >= WORTH_TELLING {
            self.readiness.fails(BROKER_CHECK, "the broker does not accept the agent's login");
        }
        if let Proof::Outstanding { pause: next_pause, next, .. } = &mut self.proof {
            *next = Instant::now() + pause;
            *next_pause = (pause * 2).min(LONGEST_PAUSE);
        }
        Ok(())
    }

    fn proven_now(&mut self) {
        let Some(written) = &mut self.written else { return };
        written.proven = true;
        info!(generation = self.generation, "the broker has proven to hold the files");
        self.metrics.proven.set(self.generation);
        self.readiness.holds(BROKER_CHECK);
        self.presentation.expect(&written.content.certificates);
        let revisions = Some(written.content.revisions.clone());
        self.proven.send_if_modified(|known| {
            *known != revisions && {
                known.clone_from(&revisions);
                true
            }
        });
    }

    /// Ends the sessions of workers that are gone, so that no queue grows for nobody; then they vanish from the files.
    async fn end_sessions(&mut self) -> Result<(), DriveError> {
        self.end_sessions_at = None;
        let (Some(written), Proof::Given(_)) = (&self.written, &self.proof) else { return Ok(()) };
        let departed = written.content.departed.clone();
        for (worker, password) in &departed {
            match end_session(&self.places.broker, worker, password).await {
                Ok(()) => {
                    info!(worker, "ended the session of a worker that is gone");
                    self.metrics.sessions_ended.inc();
                    self.state.session_ended(worker);
                }
                Err(error) => {
                    warn!(worker, "failed to end the session of a worker that is gone, trying again: {}", chain(&error));
                    self.end_sessions_at = Some(Instant::now() + END_SESSION_AGAIN);
                }
            }
        }
        if departed.is_empty() { Ok(()) } else { self.write_if_changed(Instant::now()) }
    }
}

fn outstanding(signalled: Option<Instant>) -> Proof {
    Proof::Outstanding { signalled, pause: FIRST_PAUSE, next: Instant::now() }
}

fn written_for(written: Option<&Written>) -> Duration {
    written.map_or(Duration::ZERO, |written| written.since.elapsed())
}

async fn ended(proof: &mut Proof) -> String {
    match proof {
        Proof::Given(session) => session.ended().await,
        Proof::Outstanding { .. } => std::future::pending().await,
    }
}

async fn until(time: Option<Timestamp>) {
    let wait = time.map(|time| Duration::try_from(time.duration_since(Timestamp::now())).unwrap_or_default());
    at(wait.map(|wait| Instant::now() + wait)).await;
}

async fn at(time: Option<Instant>) {
    match time {
        Some(time) => sleep_until(time).await,
        None => std::future::pending().await,
    }
}
