//! The operator's links to the brokers: one login a Gateway ([`session`], [`keep`]) keeps at the broker what is desired of
//! its devices ([`retained`] says what differs), and hears what they report ([`reports`], as often as [`pace`] allows).

pub mod keep;
pub mod metrics;
pub mod pace;
pub mod reports;
pub mod retained;
pub mod session;

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::api::core::v1::Secret;
use kube::Client;
use thiserror::Error;
use tokio::sync::mpsc;
use tokio::task::AbortHandle;
use tokio::time::{Instant, MissedTickBehavior, interval, sleep, sleep_until, timeout};
use tokio_util::sync::CancellationToken;
use tracing::info;

use self::keep::{Link, LinkError};
use self::metrics::Metrics;
use self::reports::{Report, Reports};
use self::session::Login;
use super::apply::{WriteError, read};
use super::context::Context;
use super::device::key::{DeviceKey, GatewayKey};
use super::gateway::observe::link_password;
use crate::api::name::{self, INTERNAL_MQTT_PORT};
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
}

struct Running {
    changed: mpsc::UnboundedSender<Arc<str>>,
    task: AbortHandle,
}

impl Drop for Running {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Links {
    /// Devices whose desired state may have changed come from `desired`.
    ///
    /// # Errors
    /// When the registry refuses a metric.
    pub fn new(context: Context, desired: mpsc::UnboundedReceiver<DeviceKey>) -> Result<Self, prometheus::Error> {
        let metrics = Metrics::register(&context.metrics)?;
        let (sender, incoming) = mpsc::channel(BACKLOG);
        let reports = Reports::new(context.fleet.clone(), metrics.clone(), Instant::now());
        Ok(Self { context, desired, running: HashMap::new(), reports, sender, incoming, metrics })
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
            self.running.remove(&key);
            self.context.fleet.lock().link_observed(&key, false);
            self.context.fleet.wake();
            self.metrics.remove(&key);
        }
        for key in existing {
            if !self.running.contains_key(&key) {
                let (changed, devices) = mpsc::unbounded_channel();
                let link = Link::new(key.clone(), self.context.fleet.clone(), devices, self.sender.clone(), self.metrics.clone());
                let task = tokio::spawn(keep(self.context.client.clone(), key.clone(), link)).abort_handle();
                self.running.insert(key, Running { changed, task });
            }
        }
    }
}

/// Links to a broker again and again, until dropped.
async fn keep(client: Client, gateway: GatewayKey, mut link: Link) {
    let mut pause = FIRST_PAUSE;
    loop {
        let started = Instant::now();
        let error = match log_in(&client, &gateway).await {
            Ok(login) => NoLink::Link(link.run(&login).await),
            Err(error) => error,
        };
        if started.elapsed() >= GOOD {
            pause = FIRST_PAUSE;
        }
        info!(gateway = %gateway.name, namespace = %gateway.namespace, error = chain(&error), "not linked to the broker: trying again");
        sleep(pause / 2 + (pause / 2).mul_f64(rand::random())).await;
        pause = (pause * 2).min(LONGEST_PAUSE);
    }
}

async fn log_in(client: &Client, gateway: &GatewayKey) -> Result<Login, NoLink> {
    let secret = name::link_credentials(&gateway.name);
    let found = timeout(READ_TIMEOUT, read::<Secret>(client, &gateway.namespace, &secret)).await.map_err(|_| NoLink::Timeout)?;
    let found = found.map_err(|error| NoLink::Read(Box::new(error)))?;
    let password = found.as_ref().and_then(link_password).ok_or(NoLink::Missing { secret })?;
    let host = name::service_host(&name::internal_service(&gateway.name), &gateway.namespace);
    // A constant of 1884.
    Ok(Login { host, port: u16::try_from(INTERNAL_MQTT_PORT).unwrap_or_default(), password })
}
