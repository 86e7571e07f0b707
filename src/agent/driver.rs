//! The agent's loop: changes -> files -> reload -> verification -> report. Independent of Kubernetes.

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
use super::metrics::AgentMetrics;
use super::presence::Presence;
use super::presentation::{Presentation, Presented};
use super::process;
use super::session::{BrokerAddress, CanarySession, LoginError, end_session};
use super::state::{AgentState, BrokerContent, Change, ChangeError, MissingSecret};
use crate::api::name::CANARY_USERNAME;
use crate::broker::credential::Password;
use crate::broker::credential::entry::EntryError;
use crate::certificate::server::CertificateError;
use crate::configuration::agent::AgentConfiguration;
use crate::runtime::backoff::Backoff;
use crate::runtime::error::chain;
use crate::runtime::readiness::Readiness;
use crate::runtime::tls::ServedCertificate;

/// Check that holds while the broker accepts the agent's login.
pub const BROKER_CHECK: &str = "broker";

/// The driver collects changes until none has arrived for this long …
const BATCH_QUIET: Duration = Duration::from_millis(20);

/// … or until the first of them is this old. The operator collects changes too: this delay is for changes across several Secrets.
const MAX_BATCH_AGE: Duration = Duration::from_millis(80);

/// Delays between two verification logins. The initial delay is about the duration of a reload with few clients.
const INITIAL_DELAY: Duration = Duration::from_millis(5);
const MAX_DELAY: Duration = Duration::from_millis(250);

/// The agent repeats and logs a reload that is not verified after this long.
const REPORT_AFTER: Duration = Duration::from_secs(10);

/// The agent retries to end a session after this long.
const END_SESSION_RETRY: Duration = Duration::from_secs(5);

/// Paths and addresses.
#[derive(Clone, Debug)]
pub struct BrokerPaths {
    /// Mosquitto's configuration, by which its process is found.
    pub configuration: PathBuf,
    /// The folder of Mosquitto's files.
    pub runtime: PathBuf,
    /// The broker's volume.
    pub data: PathBuf,
    /// The broker's internal listener.
    pub broker: BrokerAddress,
}

/// An error that ends the loop.
#[derive(Debug, Error)]
pub enum DriveError {
    /// A file.
    #[error(transparent)]
    WriteFile(#[from] WriteFile),
    /// A certificate.
    #[error("failed to serve the certificate of the internal listener")]
    Certificate(#[from] CertificateError),
    /// An entry of the agent's users.
    #[error("failed to render the broker's files")]
    Render(#[from] EntryError),
}

/// The last written files.
#[derive(Debug)]
struct WrittenFiles {
    content: BrokerContent,
    canary: Password,
    /// The time of the first change in them.
    since: Instant,
    /// Whether the broker, or an earlier process of it, has loaded them.
    verified: bool,
}

/// The progress of the broker in loading the files.
#[derive(Debug)]
enum Verification {
    /// The broker has not accepted the canary's login yet.
    Pending {
        /// The time of the last reload signal, if any.
        signalled: Option<Instant>,
        backoff: Backoff,
        next: Instant,
    },
    /// The broker has accepted the canary's login. Holds the session.
    Verified(CanarySession),
}

/// The state of the loop.
pub struct Driver {
    paths: BrokerPaths,
    state: AgentState,
    changes: mpsc::Receiver<Change>,
    verified: watch::Sender<Option<BTreeMap<usize, String>>>,
    written: Option<WrittenFiles>,
    verification: Verification,
    presentation: Presentation,
    presence: Presence,
    /// Secret with the certificate of the internal listener.
    internal_secret: String,
    /// The certificate with which the agent itself serves the operator.
    served: ServedCertificate,
    generation: i64,
    end_sessions_at: Option<Instant>,
    first_written: CancellationToken,
    readiness: Readiness,
    metrics: Arc<AgentMetrics>,
}

impl Driver {
    /// A driver that receives changes from `changes`. It publishes the verified revision of each shard in `verified`, and the presented
    /// certificates in `presented`.
    #[must_use]
    pub fn new(
        paths: BrokerPaths,
        configuration: &AgentConfiguration,
        changes: mpsc::Receiver<Change>,
        verified: watch::Sender<Option<BTreeMap<usize, String>>>,
        presented: watch::Sender<Option<Presented>>,
        readiness: Readiness,
        metrics: Arc<AgentMetrics>,
    ) -> Self {
        let secrets = configuration.tls_secrets();
        let written = files::written_certificates(&paths.runtime, secrets.keys());
        let mut state = AgentState::new(secrets, files::remembered_workers(&paths.data));
        for change in written {
            // An unusable certificate counts as missing.
            let _ = state.apply(change, Timestamp::now());
        }
        let presentation = Presentation::new(&paths.broker.host, configuration.listeners().cloned().collect(), presented);
        let verification = pending(None);
        let first_written = CancellationToken::new();
        Self {
            paths,
            state,
            changes,
            verified,
            written: None,
            verification,
            presentation,
            presence: Presence::new(),
            internal_secret: configuration.internal.secret.clone(),
            served: ServedCertificate::default(),
            generation: 0,
            end_sessions_at: None,
            first_written,
            readiness,
            metrics,
        }
    }

    /// Announces its own handshakes to `presence`, and gives it the tokens of the operator.
    #[must_use]
    pub fn with_presence(mut self, presence: Presence) -> Self {
        self.presentation = self.presentation.with_presence(presence.clone());
        self.presence = presence;
        self
    }

    /// The certificate of the internal listener, for an endpoint of the agent. It changes with each renewal.
    #[must_use]
    pub fn served(&self) -> ServedCertificate {
        self.served.clone()
    }

    /// Cancelled when the files exist for the first time. Mosquitto can start afterwards.
    #[must_use]
    pub fn first_written(&self) -> CancellationToken {
        self.first_written.clone()
    }

    /// Runs until `shutdown` is cancelled.
    ///
    /// # Errors
    /// If a file cannot be written.
    pub async fn run(mut self, shutdown: CancellationToken) -> Result<(), DriveError> {
        loop {
            let next_login = match &self.verification {
                Verification::Pending { next, .. } if self.written.is_some() => Some(*next),
                _ => None,
            };
            tokio::select! {
                () = shutdown.cancelled() => return Ok(()),
                Some(change) = self.changes.recv() => {
                    let since = Instant::now();
                    self.batch(change, since).await;
                    self.write_if_changed(since)?;
                }
                reason = ended(&mut self.verification) => {
                    info!(reason, "the broker ended the agent's session: verifying again");
                    self.readiness.fails(BROKER_CHECK, "the broker ended the agent's session");
                    self.presentation.forget();
                    self.verification = pending(None);
                }
                () = until(self.state.next_due()) => {
                    for change in self.state.take_due(Timestamp::now()) {
                        self.apply(change);
                    }
                    self.write_if_changed(Instant::now())?;
                }
                () = at(self.presentation.due()) => {
                    let none = BTreeMap::new();
                    let certificates = self.written.as_ref().map_or(&none, |written| &written.content.certificates);
                    self.presentation.observe(certificates).await;
                }
                () = at(next_login) => self.verify().await?,
                () = at(self.end_sessions_at) => self.end_sessions().await?,
            }
        }
    }

    /// Applies a change and the changes that follow closely.
    async fn batch(&mut self, first: Change, since: Instant) {
        self.apply(first);
        loop {
            let until = (Instant::now() + BATCH_QUIET).min(since + MAX_BATCH_AGE);
            match timeout_at(until, self.changes.recv()).await {
                Ok(Some(change)) => self.apply(change),
                Ok(None) | Err(_) => return,
            }
        }
    }

    fn apply(&mut self, change: Change) {
        let Err(refusal) = self.state.apply(change, Timestamp::now()) else { return };
        let content = match refusal {
            ChangeError::Shard { .. } | ChangeError::ShardDeleted { .. } => "shard",
            ChangeError::Certificate { .. } | ChangeError::CertificateMissing { .. } => "certificate",
        };
        self.metrics.refused.with_label_values(&[content]).inc();
        warn!("{}", chain(&refusal));
    }

    /// Writes the files if their content has changed, and makes the broker read them.
    fn write_if_changed(&mut self, since: Instant) -> Result<(), DriveError> {
        let content = match self.state.content() {
            Ok(content) => content,
            Err(waiting) => {
                self.log_missing(&waiting);
                return Ok(());
            }
        };
        if self.written.as_ref().is_some_and(|written| written.content == content) {
            return Ok(());
        }
        self.presence.accept(self.state.presence_tokens());
        if let Some(certificate) = content.certificates.get(&self.internal_secret) {
            // It was parsed before.
            self.served.replace(certificate.certified_key()?);
        }
        let canary = Password::generate();
        let files = self.state.files(&content, &canary)?;
        // The file of workers comes first: the agent would never end the session of a worker that can log in but is not in that file.
        files::remember_workers(&self.paths.data, &self.state.workers())?;
        files::write_all(&self.paths.runtime, &content, &files)?;
        self.generation += 1;
        self.metrics.written.set(self.generation);
        info!(generation = self.generation, shards = content.revisions.len(), departed = content.departed.len(), "files written");
        // A pending change that is not verified yet keeps the time of its first change.
        let since = self.written.take().filter(|written| !written.verified).map_or(since, |written| written.since);
        self.written = Some(WrittenFiles { content, canary, since, verified: false });
        self.first_written.cancel();
        // A broker that has answered handles the signal. A broker that may still be starting gets a login first.
        let answered = match &self.verification {
            Verification::Verified(_) => true,
            Verification::Pending { signalled, .. } => signalled.is_some(),
        };
        self.verification = pending(None);
        if answered {
            self.reload();
        }
        Ok(())
    }

    fn log_missing(&self, waiting: &MissingSecret) {
        if self.written.is_none() {
            self.readiness.fails(BROKER_CHECK, waiting.to_string());
            info!("waiting: {waiting}");
        } else {
            debug!("waiting: {waiting}");
        }
    }

    fn reload(&mut self) {
        match process::reload(&self.paths.configuration) {
            Ok(()) => {
                self.metrics.reloads.inc();
                self.verification = pending(Some(Instant::now()));
            }
            Err(error) => warn!("{}", chain(&error)),
        }
    }

    /// Logs in once with the password that only the last files contain.
    async fn verify(&mut self) -> Result<(), DriveError> {
        let (Some(written), Verification::Pending { signalled, .. }) = (&self.written, &self.verification) else { return Ok(()) };
        let signalled = *signalled;
        match CanarySession::login(&self.paths.broker, CANARY_USERNAME, &written.canary, &self.metrics).await {
            Ok(session) => {
                if !written.verified {
                    self.metrics.change_to_verified.observe(written.since.elapsed().as_secs_f64());
                }
                if let Some(signalled) = signalled {
                    self.metrics.reload_to_verified.observe(signalled.elapsed().as_secs_f64());
                }
                self.verification = Verification::Verified(session);
                self.mark_verified();
                return self.end_sessions().await;
            }
            // The broker runs with older files: send the signal, or repeat it in case the first one was lost.
            Err(LoginError::Refused { .. }) if signalled.is_none_or(|at| at.elapsed() >= REPORT_AFTER) => self.reload(),
            Err(error) => debug!("{}", chain(&error)),
        }
        if time_since_written(self.written.as_ref()) >= REPORT_AFTER {
            self.readiness.fails(BROKER_CHECK, "the broker does not accept the agent's login");
        }
        if let Verification::Pending { backoff, next, .. } = &mut self.verification {
            *next = Instant::now() + backoff.next_delay();
        }
        Ok(())
    }

    fn mark_verified(&mut self) {
        let Some(written) = &mut self.written else { return };
        written.verified = true;
        info!(generation = self.generation, "verified that the broker has loaded the files");
        self.metrics.verified.set(self.generation);
        self.readiness.holds(BROKER_CHECK);
        self.presentation.expect(&written.content.certificates);
        let revisions = Some(written.content.revisions.clone());
        self.verified.send_if_modified(|known| {
            *known != revisions && {
                known.clone_from(&revisions);
                true
            }
        });
    }

    /// Ends the sessions of removed workers, so that no queue grows without a consumer, and then removes the workers from the files.
    async fn end_sessions(&mut self) -> Result<(), DriveError> {
        self.end_sessions_at = None;
        let (Some(written), Verification::Verified(_)) = (&self.written, &self.verification) else { return Ok(()) };
        let departed = written.content.departed.clone();
        for (worker, password) in &departed {
            match end_session(&self.paths.broker, worker, password).await {
                Ok(()) => {
                    info!(worker, "ended the session of a removed worker");
                    self.metrics.sessions_ended.inc();
                    self.state.session_ended(worker);
                }
                Err(error) => {
                    warn!(worker, "failed to end the session of a removed worker, retrying: {}", chain(&error));
                    self.end_sessions_at = Some(Instant::now() + END_SESSION_RETRY);
                }
            }
        }
        if departed.is_empty() { Ok(()) } else { self.write_if_changed(Instant::now()) }
    }
}

fn pending(signalled: Option<Instant>) -> Verification {
    Verification::Pending { signalled, backoff: Backoff::new(INITIAL_DELAY, MAX_DELAY), next: Instant::now() }
}

fn time_since_written(written: Option<&WrittenFiles>) -> Duration {
    written.map_or(Duration::ZERO, |written| written.since.elapsed())
}

async fn ended(verification: &mut Verification) -> String {
    match verification {
        Verification::Verified(session) => session.ended().await,
        Verification::Pending { .. } => std::future::pending().await,
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
