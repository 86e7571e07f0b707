//! The operator's links to the brokers: one login a Gateway ([`session`], [`keep`]) keeps at the broker what is desired of
//! its devices ([`retained`] says what differs), and hears what they report ([`reports`], as often as [`pace`] allows). A broker
//! that runs elsewhere ([`external`]) is proven by it, and there it also hears who is connected ([`connections`]).

pub mod connections;
pub mod external;
pub mod keep;
pub mod metrics;
pub mod pace;
pub mod reports;
pub mod retained;
pub mod session;

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use k8s_openapi::api::core::v1::Secret;
use kube::Client;
use thiserror::Error;
use tokio::sync::mpsc;
use tokio::task::AbortHandle;
use tokio::time::{Instant, MissedTickBehavior, interval, sleep, sleep_until, timeout};
use tokio_util::sync::CancellationToken;
use tracing::info;

use self::connections::Connections;
use self::external::{External, cause};
use self::keep::{Ears, Link, LinkError};
use self::metrics::Metrics;
use self::reports::{Report, Reports};
use self::session::internal_login;
use super::context::Context;
use super::device::key::{DeviceKey, GatewayKey};
use super::gateway::observe::link_password;
use super::kubernetes::apply::{WriteError, read};
use super::presence::follow::News;
use crate::api::name::{self, INTERNAL_MQTT_PORT};
use crate::mqtt::login::Login;
use crate::runtime::error::chain;

/// How often is looked which Gateways there are.
const INTERVAL: Duration = Duration::from_secs(1);

/// Reports that wait to be looked at; the links wait then, and with them the brokers.
const BACKLOG: usize = 256;

/// The longest that the credential may take to be read.
const READ_TIMEOUT: Duration = Duration::from_secs(10);

/// The pauses after a link has ended: each twice the one before, and half of it by chance.
const FIRST_PAUSE: Duration = Duration::from_millis(250);
const LONGEST_PAUSE: Duration = Duration::from_secs(10);

/// A link that has held for this long was a good one: the pauses start anew.
const GOOD: Duration = Duration::from_secs(30);

/// Why there is no link to a broker.
#[derive(Debug, Error)]
enum NoLink {
    /// The API server did not give the credential.
    #[error("failed to read the operator's credential for the Gateway")]
    Read(#[source] Box<WriteError>),

    /// It did not answer.
    #[error("the API server did not answer within {} s", READ_TIMEOUT.as_secs())]
    Timeout,

    /// There is none.
    #[error("Secret {secret} is not there yet, or has no password: the reconciler of Gateways writes it")]
    Missing {
        /// Its name.
        secret: String,
    },

    /// The link failed.
    #[error(transparent)]
    Link(#[from] LinkError),
}

/// The links to all brokers. There is one for all Gateways.
pub struct Links {
    context: Context,
    desired: mpsc::UnboundedReceiver<DeviceKey>,
    running: HashMap<GatewayKey, Running>,
    reports: Reports,
    sender: mpsc::Sender<Report>,
    incoming: mpsc::Receiver<Report>,
    metrics: Metrics,
    connections: mpsc::Sender<News>,
    looks: mpsc::UnboundedSender<GatewayKey>,
}

struct Running {
    changed: mpsc::UnboundedSender<Arc<str>>,
    /// With what it logs in at a broker that runs elsewhere.
    login: Option<Arc<Login>>,
    task: AbortHandle,
}

impl Drop for Running {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Links {
    /// Devices whose desired state may have changed come from `desired`. What devices of external brokers say of their
    /// connections goes to `connections`, and a Gateway whose broker answers a login otherwise than before to `looks`. At most
    /// `reports_per_second` are written.
    ///
    /// # Errors
    /// When the registry refuses a metric.
    pub fn new(
        context: Context,
        desired: mpsc::UnboundedReceiver<DeviceKey>,
        reports_per_second: f64,
        connections: mpsc::Sender<News>,
        looks: mpsc::UnboundedSender<GatewayKey>,
    ) -> Result<Self, prometheus::Error> {
        let metrics = Metrics::register(&context.metrics)?;
        let (sender, incoming) = mpsc::channel(BACKLOG);
        let reports = Reports::new(context.fleet.clone(), reports_per_second, metrics.clone(), Instant::now());
        Ok(Self { context, desired, running: HashMap::new(), reports, sender, incoming, metrics, connections, looks })
    }

    /// Runs until dropped, from the moment on that all Devices are `listed`: before, every device would look like one that is gone.
    pub async fn run(mut self, listed: CancellationToken) {
        listed.cancelled().await;
        let mut ticks = interval(INTERVAL);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            let due = self.reports.next_due();
            tokio::select! {
                Some(key) = self.desired.recv() => {
                    if let Some(running) = self.running.get(&key.gateway) {
                        // One that ends is replaced, and starts from all that is desired.
                        let _ = running.changed.send(key.name);
                    }
                }
                Some(report) = self.incoming.recv() => self.reports.offer(report, Instant::now()),
                () = sleep_until(due.unwrap_or_else(Instant::now)), if due.is_some() => {}
                _ = ticks.tick() => self.look(),
            }
            self.reports.advance(Instant::now());
        }
    }

    /// Links to the Gateways that there are.
    fn look(&mut self) {
        let existing = self.context.fleet.lock().existing_gateways();
        let gone: Vec<GatewayKey> = self.running.keys().filter(|key| !existing.contains(key)).cloned().collect();
        for key in gone {
            self.stop(&key);
            self.context.externals.remove(&key);
            self.metrics.remove(&key);
        }
        for key in existing {
            if !self.context.fleet.lock().is_external(&key) {
                if !self.running.contains_key(&key) {
                    self.start(key, None);
                }
            } else if let Some(external) = self.context.externals.of(&key) {
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
        let mut link = Link::new(key.clone(), self.context.fleet.clone(), devices, self.sender.clone(), self.metrics.clone());
        if let Some(external) = &external {
            let connections = Connections::new(key.clone(), Instant::now(), Timestamp::now().as_second());
            link = link.with_ears(Ears { connections, news: self.connections.clone(), anew: Arc::clone(&external.anew) });
        }
        let login = external.and_then(|external| external.login);
        let keeper = Keeper { context: self.context.clone(), gateway: key.clone(), looks: self.looks.clone(), login: login.clone() };
        let task = tokio::spawn(keeper.keep(link)).abort_handle();
        self.running.insert(key, Running { changed, login, task });
    }

    fn stop(&mut self, key: &GatewayKey) {
        if self.running.remove(key).is_some() {
            self.context.fleet.lock().link_observed(key, false);
            self.context.fleet.wake();
        }
    }
}

/// What keeps the link to one broker.
struct Keeper {
    context: Context,
    gateway: GatewayKey,
    looks: mpsc::UnboundedSender<GatewayKey>,
    /// With what to log in at a broker that runs elsewhere.
    login: Option<Arc<Login>>,
}

impl Keeper {
    /// Links to a broker again and again, until dropped.
    async fn keep(self, mut link: Link) {
        let (gateway, namespace) = (&self.gateway.name, &self.gateway.namespace);
        let mut pause = FIRST_PAUSE;
        loop {
            let started = Instant::now();
            let error = self.link(&mut link).await;
            if started.elapsed() >= GOOD {
                pause = FIRST_PAUSE;
            }
            link.away().await;
            info!(%gateway, %namespace, error = chain(&error), "not linked to the broker: trying again");
            sleep(pause / 2 + (pause / 2).mul_f64(rand::random())).await;
            pause = (pause * 2).min(LONGEST_PAUSE);
        }
    }

    async fn link(&self, link: &mut Link) -> NoLink {
        let login = match &self.login {
            Some(login) => Ok(Arc::clone(login)),
            None => log_in(&self.context.client, &self.gateway).await.map(Arc::new),
        };
        let login = match login {
            Ok(login) => login,
            Err(error) => return error,
        };
        let begun = link.begin(&login).await;
        // That a connection has ended says nothing yet; that there is no other does.
        let outcome = begun.as_ref().map(drop).map_err(|error| cause(&login, error));
        if self.context.externals.tried(&self.gateway, &login, outcome) {
            // The receiver lives as long as this: both end with the lease.
            let _ = self.looks.send(self.gateway.clone());
        }
        match begun {
            Ok(session) => link.run(session).await.into(),
            Err(error) => error.into(),
        }
    }
}

async fn log_in(client: &Client, gateway: &GatewayKey) -> Result<Login, NoLink> {
    let secret = name::link_credentials(&gateway.name);
    let found = timeout(READ_TIMEOUT, read::<Secret>(client, &gateway.namespace, &secret)).await.map_err(|_| NoLink::Timeout)?;
    let found = found.map_err(|error| NoLink::Read(Box::new(error)))?;
    let password = found.as_ref().and_then(link_password).ok_or(NoLink::Missing { secret })?;
    let host = name::service_host(&name::internal_service(&gateway.name), &gateway.namespace);
    // A constant of 1884.
    Ok(internal_login(host, u16::try_from(INTERNAL_MQTT_PORT).unwrap_or_default(), &password))
}
