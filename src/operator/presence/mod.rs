//! Presence: brokers report their clients ([`follow`], through [`agent`]s), and the operator writes `status.connection` of Devices
//! and the totals of Gateways ([`totals`]) within a write budget ([`reporter`]).
//!
//! The devices of an external broker report their connection state themselves ([`super::twin_sync::connections`]).
//!
//! This does not pass through the reconcilers: a Device that connects or disconnects needs one merge patch of `status.connection`.

pub mod agent;
pub mod follow;
pub mod metrics;
pub mod reporter;
pub mod totals;

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use kube::Client;
use serde_json::json;
use tokio::sync::{Notify, mpsc};
use tokio::task::{AbortHandle, JoinSet};
use tokio::time::{Instant, MissedTickBehavior, interval, sleep_until};
use tokio_util::sync::CancellationToken;
use tracing::warn;

use self::follow::{PresenceUpdate, follow};
use self::metrics::PresenceMetrics;
use self::reporter::PresenceReporter;
use self::totals::SharedTotals;
use super::context::Context;
use super::device::connection::CompactConnection;
use super::device::index::SharedDeviceIndex;
use super::device::key::{DeviceKey, GatewayKey};
use super::kubernetes::apply::{WriteError, Writer};
use super::twin_sync::external::SharedExternals;
use crate::api::Device;
use crate::runtime::error::chain;

/// Default limit of connection writes per second: some 2 % of the capacity of a small API server, and enough for 15,000 devices
/// that each connect or disconnect every five minutes.
pub const DEFAULT_WRITES_PER_SECOND: f64 = 50.0;

/// Upper limit of concurrent writes: at the default rate each may take 160 ms.
const CONCURRENCY: usize = 8;

/// Delay before a failed write is retried, and before a status that a user changed is corrected.
const RETRY_DELAY: Duration = Duration::from_secs(5);

/// How often the list of Gateways and their totals are checked.
const INTERVAL: Duration = Duration::from_secs(1);

/// How often the totals of Gateways are counted for the metrics, which visits each Device.
const COUNT_INTERVAL: Duration = Duration::from_secs(10);

/// Lower limit of the time between two requests for all clients of an agent because of new Devices.
const RELIST_INTERVAL: Duration = Duration::from_mins(1);

/// Upper limit of queued updates. The senders wait when it is reached.
const BACKLOG: usize = 32;

/// Receives the connection states of all Gateways' clients and writes them.
pub struct PresenceController {
    client: Client,
    fleet: SharedDeviceIndex,
    clients: SharedTotals,
    externals: SharedExternals,
    writer: Writer,
    reporter: PresenceReporter,
    totals: mpsc::UnboundedSender<GatewayKey>,
    followers: HashMap<GatewayKey, AgentFollower>,
    updates: mpsc::Sender<PresenceUpdate>,
    incoming: mpsc::Receiver<PresenceUpdate>,
    work: JoinSet<(DeviceKey, Result<Option<Device>, WriteError>)>,
    metrics: PresenceMetrics,
    counted: Option<Instant>,
    warned_of_dropped_field: bool,
}

struct AgentFollower {
    resync: Arc<Notify>,
    task: AbortHandle,
}

impl Drop for AgentFollower {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl PresenceController {
    /// Writes at most `writes_per_second` to Devices. Gateways with changed totals are sent to `totals`.
    ///
    /// # Errors
    /// If a metric is registered twice.
    pub fn new(context: Context, writes_per_second: f64, totals: mpsc::UnboundedSender<GatewayKey>) -> Result<Self, prometheus::Error> {
        let metrics = PresenceMetrics::register(&context.metrics)?;
        metrics.budget.set(writes_per_second);
        let (updates, incoming) = mpsc::channel(BACKLOG);
        Ok(Self {
            writer: context.writer("fleetwright/presence"),
            reporter: PresenceReporter::new(context.fleet.clone(), writes_per_second, Instant::now()),
            client: context.client,
            fleet: context.fleet,
            clients: context.presence,
            externals: context.externals,
            totals,
            followers: HashMap::new(),
            updates,
            incoming,
            work: JoinSet::new(),
            metrics,
            counted: None,
            warned_of_dropped_field: false,
        })
    }

    /// The channel for updates from brokers without an agent.
    #[must_use]
    pub fn updates(&self) -> mpsc::Sender<PresenceUpdate> {
        self.updates.clone()
    }

    /// Runs until dropped, once all Devices are `listed`.
    pub async fn run(mut self, listed: CancellationToken) {
        listed.cancelled().await;
        let mut ticks = interval(INTERVAL);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            let due = self.reporter.next_due().filter(|_| self.work.len() < CONCURRENCY);
            tokio::select! {
                Some(update) = self.incoming.recv() => self.observe(update),
                Some(finished) = self.work.join_next() => match finished {
                    Ok((device, result)) => self.finish(device, result),
                    Err(error) => warn!(%error, "a write of a Device's connection state ended unexpectedly"),
                },
                () = sleep_until(due.unwrap_or_else(Instant::now)), if due.is_some() => {}
                _ = ticks.tick() => self.observe_gateways(),
            }
            while self.work.len() < CONCURRENCY
                && let Some((device, connection)) = self.reporter.next(Instant::now())
            {
                self.write(device, connection);
            }
        }
    }

    fn observe(&mut self, update: PresenceUpdate) {
        let (now, time) = (Instant::now(), Timestamp::now().as_second());
        match update {
            PresenceUpdate::Page(gateway, page) => {
                self.metrics.pages.inc();
                self.reporter.page(&gateway, &page, now, time);
            }
            PresenceUpdate::Heard { gateway, all, devices } => self.reporter.heard(&gateway, all, devices, now, time),
            PresenceUpdate::Silent(gateway) => self.reporter.silent(&gateway),
            PresenceUpdate::Unknown(gateway, since) => self.reporter.unknown(&gateway, since, now),
        }
    }

    fn write(&mut self, device: DeviceKey, connection: CompactConnection) {
        let writer = self.writer.clone();
        self.work.spawn(async move {
            let patch = json!({ "connection": connection.status() });
            let result = writer.patch_status::<Device>(&device.gateway.namespace, &device.name, &patch).await;
            (device, result)
        });
    }

    fn finish(&mut self, device: DeviceKey, result: Result<Option<Device>, WriteError>) {
        let (outcome, after) = match result {
            Ok(Some(written)) => {
                self.fleet.lock().connection_written(&device, &written);
                let kept = written.status.is_some_and(|status| status.connection.is_some());
                if kept { ("written", Some(Duration::ZERO)) } else { ("dropped", None) }
            }
            // Deleted; the watch reports it.
            Ok(None) => ("gone", None),
            Err(error) => {
                let namespace = &device.gateway.namespace;
                warn!(device = %device.name, %namespace, error = chain(&error), "failed to write the connection state of a Device: retrying");
                ("failed", Some(RETRY_DELAY))
            }
        };
        self.metrics.writes.with_label_values(&[outcome]).inc();
        if outcome == "dropped" && !std::mem::replace(&mut self.warned_of_dropped_field, true) {
            warn!(
                "the API server does not keep status.connection of Devices: install the definitions of this version (chart fleetwright-crds)"
            );
        }
        self.reporter.written(device, after, Instant::now());
    }

    /// Follows the agents of existing Gateways, and publishes changed totals.
    fn observe_gateways(&mut self) {
        let now = Instant::now();
        let existing = self.fleet.lock().existing_gateways();
        let known: HashSet<GatewayKey> = self.followers.keys().chain(self.reporter.gateways()).cloned().collect();
        let gone: Vec<GatewayKey> = known.into_iter().filter(|key| !existing.contains(key)).collect();
        for key in gone {
            self.followers.remove(&key);
            self.reporter.gone(&key, Timestamp::now().as_second(), now);
            self.clients.remove(&key);
            self.metrics.remove(&key);
        }
        for key in &existing {
            // An external broker has no agent.
            if self.fleet.lock().is_external(key) {
                self.followers.remove(key);
            } else if !self.followers.contains_key(key) {
                let resync = Arc::new(Notify::new());
                let task = tokio::spawn(follow(self.client.clone(), key.clone(), Arc::clone(&resync), self.updates.clone())).abort_handle();
                self.followers.insert(key.clone(), AgentFollower { resync, task });
            }
        }
        for key in self.reporter.to_list_again(now, RELIST_INTERVAL) {
            if let Some(follower) = self.followers.get(&key) {
                follower.resync.notify_one();
            } else if let Some(external) = self.externals.of(&key) {
                external.resync.notify_one();
            }
        }
        for (key, totals) in self.reporter.totals(now) {
            self.clients.set(&key, totals);
            // The receiver lives as long as this task: both end with the lease.
            let _ = self.totals.send(key);
        }
        self.reporter.repair(RETRY_DELAY, now);
        self.reporter.forget(now);
        self.count(&existing, now);
    }

    fn count(&mut self, existing: &[GatewayKey], now: Instant) {
        let (waiting, damped, oldest) = self.reporter.backlog(now);
        self.metrics.waiting.set(i64::try_from(waiting).unwrap_or(i64::MAX));
        self.metrics.damped.set(i64::try_from(damped).unwrap_or(i64::MAX));
        self.metrics.oldest.set(oldest.as_secs_f64());
        if self.counted.is_some_and(|at| now.duration_since(at) < COUNT_INTERVAL) {
            return;
        }
        self.counted = Some(now);
        for key in existing {
            if let Some(totals) = self.fleet.lock().totals(key) {
                self.metrics.set(key, totals, self.clients.of(key).as_ref());
            }
        }
    }
}
