//! Synchronizes desired and reported states with the brokers. One session for each Gateway ([`session`], [`session_loop`])
//! publishes the desired states ([`retained`] determines the differences) and receives reports ([`reports`], with a rate limit).
//! For an external broker ([`external`]) it also proves the login and receives connection states ([`connections`]).

pub mod connections;
pub mod external;
pub mod metrics;
pub mod reports;
pub mod retained;
pub mod session;
pub mod session_loop;

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use k8s_openapi::api::core::v1::Secret;
use kube::Client;
use thiserror::Error;
use tokio::sync::mpsc;
use tokio::task::AbortHandle;
use tokio::time::{Instant, MissedTickBehavior, interval, sleep_until, timeout};
use tokio_util::sync::CancellationToken;
use tracing::info;

use self::connections::ReportedConnections;
use self::external::{External, SharedExternals, cause};
use self::metrics::TwinSyncMetrics;
use self::reports::{Report, ReportQueue};
use self::session::internal_login;
use self::session_loop::{PresenceSubscription, SessionLoop, SyncError};
use super::context::Context;
use super::device::index::SharedDeviceIndex;
use super::device::key::{DeviceKey, GatewayKey};
use super::gateway::internal::trusted;
use super::gateway::observe::link_password;
use super::kubernetes::apply::{WriteError, read};
use super::presence::follow::PresenceUpdate;
use crate::api::name::{self, INTERNAL_MQTT_PORT};
use crate::configuration::agent::TLS_AUTHORITIES;
use crate::mqtt::login::{ClientTls, Login};
use crate::runtime::backoff::Backoff;
use crate::runtime::error::chain;
use crate::runtime::tls::TlsError;

/// How often the list of Gateways is checked.
const INTERVAL: Duration = Duration::from_secs(1);

/// Upper limit of received reports that are not processed. The sessions wait when it is reached, and so do the brokers.
const BACKLOG: usize = 256;

/// Upper limit of the time to read the credentials.
const READ_TIMEOUT: Duration = Duration::from_secs(10);

/// Delays after a session has ended.
const INITIAL_RECONNECT_DELAY: Duration = Duration::from_millis(250);
const MAX_RECONNECT_DELAY: Duration = Duration::from_secs(10);

/// After a session of this duration, the delays start again at the initial one.
const STABLE_AFTER: Duration = Duration::from_secs(30);

/// Why there is no connection to a broker.
#[derive(Debug, Error)]
enum ConnectError {
    /// The API server did not return the credentials.
    #[error("failed to read the operator's credential for the Gateway")]
    Read(#[source] Box<WriteError>),

    /// The API server did not respond.
    #[error("the API server did not answer within {} s", READ_TIMEOUT.as_secs())]
    Timeout,

    /// The Secret does not exist, has no password, or no certificates.
    #[error("Secret {secret} does not exist yet, or lacks password or {TLS_AUTHORITIES}: the reconciler of Gateways writes it")]
    Missing {
        /// Name of the Secret.
        secret: String,
    },

    /// The certificates in the Secret cannot be read.
    #[error("failed to set up TLS with the {TLS_AUTHORITIES} of Secret {secret}")]
    SetUpTls {
        /// Name of the Secret.
        secret: String,
        /// The cause.
        #[source]
        source: TlsError,
    },

    /// The session failed or ended.
    #[error(transparent)]
    SessionLoop(#[from] SyncError),
}

/// Synchronizes the states of all Gateways' devices.
pub struct TwinSync {
    client: Client,
    fleet: SharedDeviceIndex,
    externals: SharedExternals,
    desired: mpsc::UnboundedReceiver<DeviceKey>,
    running: HashMap<GatewayKey, Running>,
    reports: ReportQueue,
    sender: mpsc::Sender<Report>,
    incoming: mpsc::Receiver<Report>,
    metrics: TwinSyncMetrics,
    connections: mpsc::Sender<PresenceUpdate>,
    requeue: mpsc::UnboundedSender<GatewayKey>,
}

struct Running {
    changed: mpsc::UnboundedSender<Arc<str>>,
    /// Login data of an external broker.
    login: Option<Arc<Login>>,
    task: AbortHandle,
}

impl Drop for Running {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl TwinSync {
    /// `desired` provides Devices whose desired state may have changed. Connection states of external brokers are sent to
    /// `connections`, and Gateways with a changed login result to `requeue`. At most `reports_per_second` are written.
    ///
    /// # Errors
    /// If a metric is registered twice.
    pub fn new(
        context: Context,
        desired: mpsc::UnboundedReceiver<DeviceKey>,
        reports_per_second: f64,
        connections: mpsc::Sender<PresenceUpdate>,
        requeue: mpsc::UnboundedSender<GatewayKey>,
    ) -> Result<Self, prometheus::Error> {
        let metrics = TwinSyncMetrics::register(&context.metrics)?;
        let (sender, incoming) = mpsc::channel(BACKLOG);
        let reports = ReportQueue::new(context.fleet.clone(), reports_per_second, metrics.clone(), Instant::now());
        let Context { client, fleet, externals, .. } = context;
        Ok(Self { client, fleet, externals, desired, running: HashMap::new(), reports, sender, incoming, metrics, connections, requeue })
    }

    /// Runs until dropped, once all Devices are `listed`. Before that, every device would count as deleted.
    pub async fn run(mut self, listed: CancellationToken) {
        listed.cancelled().await;
        let mut ticks = interval(INTERVAL);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            let due = self.reports.next_due();
            tokio::select! {
                Some(key) = self.desired.recv() => {
                    if let Some(running) = self.running.get(&key.gateway) {
                        // A session that ends is replaced by one that starts from all desired states.
                        let _ = running.changed.send(key.name);
                    }
                }
                Some(report) = self.incoming.recv() => self.reports.offer(report, Instant::now()),
                () = sleep_until(due.unwrap_or_else(Instant::now)), if due.is_some() => {}
                _ = ticks.tick() => self.observe_gateways(),
            }
            self.reports.advance(Instant::now());
        }
    }

    /// Starts and stops sessions according to the existing Gateways.
    fn observe_gateways(&mut self) {
        let existing = self.fleet.lock().existing_gateways();
        let gone: Vec<GatewayKey> = self.running.keys().filter(|key| !existing.contains(key)).cloned().collect();
        for key in gone {
            self.stop(&key);
            self.externals.remove(&key);
            self.metrics.remove(&key);
        }
        for key in existing {
            if !self.fleet.lock().is_external(&key) {
                if !self.running.contains_key(&key) {
                    self.start(key, None);
                }
            } else if let Some(external) = self.externals.of(&key) {
                let known = self.running.get(&key).map(|running| running.login.as_ref());
                if known.is_some_and(|known| known.map(Arc::as_ptr) != external.login.as_ref().map(Arc::as_ptr)) {
                    self.stop(&key);
                }
                if external.login.is_some() && !self.running.contains_key(&key) {
                    self.start(key, Some(external));
                }
            }
        }
    }

    fn start(&mut self, key: GatewayKey, external: Option<External>) {
        let (changed, devices) = mpsc::unbounded_channel();
        let mut session_loop = SessionLoop::new(key.clone(), self.fleet.clone(), devices, self.sender.clone(), self.metrics.clone());
        if let Some(external) = &external {
            let connections = ReportedConnections::new(key.clone(), Instant::now(), Timestamp::now().as_second());
            session_loop = session_loop.with_presence(PresenceSubscription {
                connections,
                updates: self.connections.clone(),
                resync: Arc::clone(&external.resync),
            });
        }
        let login = external.and_then(|external| external.login);
        let broker_sync = BrokerSync {
            client: self.client.clone(),
            externals: self.externals.clone(),
            gateway: key.clone(),
            requeue: self.requeue.clone(),
            login: login.clone(),
        };
        let task = tokio::spawn(broker_sync.run(session_loop)).abort_handle();
        self.running.insert(key, Running { changed, login, task });
    }

    fn stop(&mut self, key: &GatewayKey) {
        if self.running.remove(key).is_some() {
            self.fleet.lock().broker_connection_observed(key, false);
            self.fleet.wake();
        }
    }
}

/// Maintains the session with one broker.
struct BrokerSync {
    client: Client,
    externals: SharedExternals,
    gateway: GatewayKey,
    requeue: mpsc::UnboundedSender<GatewayKey>,
    /// Login data of an external broker.
    login: Option<Arc<Login>>,
}

impl BrokerSync {
    /// Connects to the broker again after each failure, until dropped.
    async fn run(self, mut session_loop: SessionLoop) {
        let (gateway, namespace) = (&self.gateway.name, &self.gateway.namespace);
        let mut backoff = Backoff::new(INITIAL_RECONNECT_DELAY, MAX_RECONNECT_DELAY);
        loop {
            let started = Instant::now();
            let error = self.run_session(&mut session_loop).await;
            if started.elapsed() >= STABLE_AFTER {
                backoff.reset();
            }
            session_loop.away().await;
            info!(%gateway, %namespace, error = chain(&error), "no session with the broker: reconnecting");
            backoff.wait().await;
        }
    }

    async fn run_session(&self, session_loop: &mut SessionLoop) -> ConnectError {
        let login = match &self.login {
            Some(login) => Ok(Arc::clone(login)),
            None => log_in(&self.client, &self.gateway).await.map(Arc::new),
        };
        let login = match login {
            Ok(login) => login,
            Err(error) => return error,
        };
        let begun = session_loop.begin(&login).await;
        // The end of a connection says nothing about the login. A failed login does.
        let outcome = begun.as_ref().map(drop).map_err(|error| cause(&login, error));
        if self.externals.record_outcome(&self.gateway, &login, outcome) {
            // The receiver lives as long as this task: both end with the lease.
            let _ = self.requeue.send(self.gateway.clone());
        }
        match begun {
            Ok(session) => session_loop.run(session).await.into(),
            Err(error) => error.into(),
        }
    }
}

async fn log_in(client: &Client, gateway: &GatewayKey) -> Result<Login, ConnectError> {
    let secret = name::link_credentials(&gateway.name);
    let found = timeout(READ_TIMEOUT, read::<Secret>(client, &gateway.namespace, &secret)).await.map_err(|_| ConnectError::Timeout)?;
    let found = found.map_err(|error| ConnectError::Read(Box::new(error)))?;
    let read = |secret: &Secret| Some((link_password(secret)?, trusted(secret)?));
    let Some((password, authorities)) = found.as_ref().and_then(read) else { return Err(ConnectError::Missing { secret }) };
    let tls = ClientTls::verified_by(Some(authorities)).map_err(|source| ConnectError::SetUpTls { secret, source })?;
    let host = name::service_host(&name::internal_service(&gateway.name), &gateway.namespace);
    // The constant 1884.
    Ok(internal_login(host, u16::try_from(INTERNAL_MQTT_PORT).unwrap_or_default(), &password, Some(tls)))
}
