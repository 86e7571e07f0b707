//! Presence: what brokers say of their clients ([`follow`], asking [`agent`]s) becomes `status.connection` of Devices and the
//! totals of Gateways ([`totals`]), when that is worth a write and the budget allows it ([`ledger`], [`waiting`]).
//!
//! The devices of an external broker say themselves whether they are connected ([`super::twin_sync::connections`]).
//!
//! Nothing of it goes through the reconcilers: a Device that comes or goes is one merge patch of `status.connection`.

pub mod agent;
pub mod follow;
pub mod ledger;
pub mod metrics;
pub mod totals;
pub mod waiting;

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use serde_json::json;
use tokio::sync::{Notify, mpsc};
use tokio::task::{AbortHandle, JoinSet};
use tokio::time::{Instant, MissedTickBehavior, interval, sleep_until};
use tokio_util::sync::CancellationToken;
use tracing::warn;

use self::agent::Agents;
use self::follow::{News, follow};
use self::ledger::Ledger;
use self::metrics::Metrics;
use super::context::Context;
use super::device::connection::Connection;
use super::device::key::{DeviceKey, GatewayKey};
use super::kubernetes::apply::{WriteError, Writer};
use crate::api::Device;
use crate::runtime::error::chain;

/// Writes of connections a second without a word of the user: some 2 % of what a small API server takes, and enough for
/// 15,000 devices that each come or go every five minutes.
pub const DEFAULT_WRITES_PER_SECOND: f64 = 50.0;

/// Writes at the same time: at the default budget each may take 160 ms.
const CONCURRENCY: usize = 8;

/// A write that failed is tried again after this long, and a status that someone changed is put right.
const AGAIN: Duration = Duration::from_secs(5);

/// How often is looked which Gateways there are, and what there is to say of them.
const INTERVAL: Duration = Duration::from_secs(1);

/// How often the totals of Gateways are counted for the metrics: that is a look at each Device.
const COUNT_INTERVAL: Duration = Duration::from_secs(10);

/// At most this often an agent is asked for all of its clients because of new Devices.
const LIST_AGAIN: Duration = Duration::from_mins(1);

/// Pages that wait to be taken over; those who follow wait then.
const BACKLOG: usize = 32;

/// Follows who is connected to which Gateway, and writes it. There is one for all Gateways.
pub struct Presence {
    context: Context,
    writer: Writer,
    ledger: Ledger,
    totals: mpsc::UnboundedSender<GatewayKey>,
    agents: Agents,
    followers: HashMap<GatewayKey, Follower>,
    news: mpsc::Sender<News>,
    incoming: mpsc::Receiver<News>,
    work: JoinSet<(DeviceKey, Result<Option<Device>, WriteError>)>,
    metrics: Metrics,
    counted: Option<Instant>,
    told_dropped: bool,
}

struct Follower {
    anew: Arc<Notify>,
    task: AbortHandle,
}

impl Drop for Follower {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Presence {
    /// At most `writes_per_second` for Devices. A Gateway of whose clients there is news goes to `totals`.
    ///
    /// # Errors
    /// When the registry refuses a metric.
    pub fn new(context: Context, writes_per_second: f64, totals: mpsc::UnboundedSender<GatewayKey>) -> Result<Self, prometheus::Error> {
        let metrics = Metrics::register(&context.metrics)?;
        metrics.budget.set(writes_per_second);
        let (news, incoming) = mpsc::channel(BACKLOG);
        Ok(Self {
            writer: context.writer("fleetwright/presence"),
            ledger: Ledger::new(context.fleet.clone(), writes_per_second, Instant::now()),
            context,
            totals,
            agents: Agents::new(),
            followers: HashMap::new(),
            news,
            incoming,
            work: JoinSet::new(),
            metrics,
            counted: None,
            told_dropped: false,
        })
    }

    /// Where to tell of a broker that has no agent of ours.
    #[must_use]
    pub fn news(&self) -> mpsc::Sender<News> {
        self.news.clone()
    }

    /// Runs until dropped, from the moment on that all Devices are `listed`.
    pub async fn run(mut self, listed: CancellationToken) {
        listed.cancelled().await;
        let mut ticks = interval(INTERVAL);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            let due = self.ledger.next_due().filter(|_| self.work.len() < CONCURRENCY);
            tokio::select! {
                Some(news) = self.incoming.recv() => self.observe(news),
                Some(finished) = self.work.join_next() => match finished {
                    Ok((device, result)) => self.finish(device, result),
                    Err(error) => warn!(%error, "a write of a Device's connection ended unexpectedly"),
                },
                () = sleep_until(due.unwrap_or_else(Instant::now)), if due.is_some() => {}
                _ = ticks.tick() => self.look(),
            }
            while self.work.len() < CONCURRENCY
                && let Some((device, connection)) = self.ledger.next(Instant::now())
            {
                self.write(device, connection);
            }
        }
    }

    fn observe(&mut self, news: News) {
        let (now, time) = (Instant::now(), Timestamp::now().as_second());
        match news {
            News::Page(gateway, page) => {
                self.metrics.pages.inc();
                self.ledger.page(&gateway, &page, now, time);
            }
            News::Heard { gateway, all, devices } => self.ledger.heard(&gateway, all, devices, now, time),
            News::Silent(gateway) => self.ledger.silent(&gateway),
            News::Unknown(gateway, since) => self.ledger.unknown(&gateway, since, now),
        }
    }

    fn write(&mut self, device: DeviceKey, connection: Connection) {
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
                self.context.fleet.lock().connection_written(&device, &written);
                let kept = written.status.is_some_and(|status| status.connection.is_some());
                if kept { ("written", Some(Duration::ZERO)) } else { ("dropped", None) }
            }
            // Gone; the watch is about to say so.
            Ok(None) => ("gone", None),
            Err(error) => {
                let namespace = &device.gateway.namespace;
                warn!(device = %device.name, %namespace, error = chain(&error), "failed to write a device's connection: trying again");
                ("failed", Some(AGAIN))
            }
        };
        self.metrics.writes.with_label_values(&[outcome]).inc();
        if outcome == "dropped" && !std::mem::replace(&mut self.told_dropped, true) {
            warn!(
                "the API server does not keep status.connection of Devices: install the definitions of this version (chart fleetwright-crds)"
            );
        }
        if let Some(after) = after {
            self.ledger.written(device, after, Instant::now());
        }
    }

    /// Follows the Gateways that there are, and tells what there is to say of them.
    fn look(&mut self) {
        let now = Instant::now();
        let existing = self.context.fleet.lock().existing_gateways();
        let known: HashSet<GatewayKey> = self.followers.keys().chain(self.ledger.gateways()).cloned().collect();
        let gone: Vec<GatewayKey> = known.into_iter().filter(|key| !existing.contains(key)).collect();
        for key in gone {
            self.followers.remove(&key);
            self.ledger.gone(&key, Timestamp::now().as_second(), now);
            self.context.presence.remove(&key);
            self.metrics.remove(&key);
        }
        for key in &existing {
            // Such a broker has no agent.
            if self.context.fleet.lock().is_external(key) {
                self.followers.remove(key);
            } else if !self.followers.contains_key(key) {
                let anew = Arc::new(Notify::new());
                let task = tokio::spawn(follow(
                    self.context.client.clone(),
                    self.agents.clone(),
                    key.clone(),
                    Arc::clone(&anew),
                    self.news.clone(),
                ))
                .abort_handle();
                self.followers.insert(key.clone(), Follower { anew, task });
            }
        }
        for key in self.ledger.to_list_again(now, LIST_AGAIN) {
            if let Some(follower) = self.followers.get(&key) {
                follower.anew.notify_one();
            } else if let Some(external) = self.context.externals.of(&key) {
                external.anew.notify_one();
            }
        }
        for (key, totals) in self.ledger.totals(now) {
            self.context.presence.set(&key, totals);
            // The receiver lives as long as this: both end with the lease.
            let _ = self.totals.send(key);
        }
        self.ledger.repair(AGAIN, now);
        self.ledger.forget(now);
        self.count(&existing, now);
    }

    fn count(&mut self, existing: &[GatewayKey], now: Instant) {
        let (waiting, damped, oldest) = self.ledger.backlog(now);
        self.metrics.waiting.set(i64::try_from(waiting).unwrap_or(i64::MAX));
        self.metrics.damped.set(i64::try_from(damped).unwrap_or(i64::MAX));
        self.metrics.oldest.set(oldest.as_secs_f64());
        if self.counted.is_some_and(|at| now.duration_since(at) < COUNT_INTERVAL) {
            return;
        }
        self.counted = Some(now);
        for key in existing {
            if let Some(totals) = self.context.fleet.lock().totals(key) {
                self.metrics.set(key, totals, self.context.presence.of(key).as_ref());
            }
        }
    }
}
