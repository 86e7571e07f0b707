//! Drives the Devices: observations in, decisions of the fleet, calls out, with bounded concurrency.

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt;
use k8s_controller::events::EventRecorder;
use k8s_openapi::jiff::Timestamp;
use prometheus::{Gauge, IntCounterVec, IntGauge, Opts};
use tokio::sync::{broadcast, mpsc};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep_until};
use tracing::{debug, info, warn};

use super::execute::{self, ActionOutcome};
use super::gateway::ShardPlan;
use super::key::{DeviceKey, GatewayKey};
use super::observe::Observer;
use super::watch::{certificate_requests, left_certificate_requests, observations, secrets};
use crate::operator::context::Context;
use crate::operator::kubernetes::apply::{WriteError, Writer};
use crate::runtime::error::chain;
use crate::runtime::rate_limited_queue::{Limits, RateLimitedQueue};

/// Changes of a Gateway's shards are gathered until none has come for this long …
const QUIET: Duration = Duration::from_millis(50);

/// … or the first of them is this old. Each write is a reload, which holds a broker of 15,000 clients for some 60 ms: under
/// steady changes that is a quarter of its time. Longer, and the gathering alone takes most of the second that a revocation has.
const MAX_SHARD_DELAY: Duration = Duration::from_millis(250);

/// Devices that no broker has held yet take nobody's access away by waiting: while there is other work to be done for Devices,
/// they are gathered for this long. Many at once are spread over all shards, and each write of a shard, with the reload that follows,
/// costs many times what one of a Device does.
const MAX_NEW_DEVICE_DELAY: Duration = Duration::from_secs(10);

/// With more Devices than this in the queue or at work, there is other work to be done …
const HIGH_LOAD_DEVICES: usize = 8;

/// … and until there have been no more for this long: who declares thousands does not keep the queue full at each moment.
const HIGH_LOAD_PERIOD: Duration = Duration::from_millis(500);

/// After this long without the broker's proof a Device's status says what it waits for. A broker proves within a second;
/// one that starts takes some ten, and a Device that becomes ready meanwhile needs one write less.
const STATUS_DELAY: Duration = Duration::from_secs(20);

/// A Gateway's totals are written at most this often …
const TOTALS_INTERVAL: Duration = Duration::from_secs(2);

/// … and this, while there is other work to be done for Devices.
const TOTALS_INTERVAL_AT_WORK: Duration = Duration::from_secs(10);

/// What is at work.
enum Finished {
    Action(DeviceKey, Result<ActionOutcome, WriteError>),
    Shards(GatewayKey, u64, Box<ShardPlan>, Result<(), WriteError>),
}

/// Who wants to know of changes.
pub struct Subscribers {
    /// Gateways whose totals changed.
    pub totals: mpsc::UnboundedSender<GatewayKey>,
    /// Devices whose row in the registry may have changed; one that lags behind starts from [`super::index::DeviceIndex::registry`].
    pub registry: broadcast::Sender<DeviceKey>,
    /// Devices whose desired state the broker may have to be given.
    pub desired: mpsc::UnboundedSender<DeviceKey>,
}

/// The state of the loop.
pub struct Driver {
    context: Context,
    writer: Writer,
    recorder: Arc<EventRecorder>,
    concurrency: usize,
    subscribers: Subscribers,
    observer: Observer,
    devices: RateLimitedQueue<DeviceKey>,
    shards: RateLimitedQueue<GatewayKey>,
    totals: RateLimitedQueue<GatewayKey>,
    gathering_until: HashMap<GatewayKey, Instant>,
    /// Gateways whose shards or totals wait until there is no other work.
    unhurried: BTreeSet<GatewayKey>,
    load: Load,
    waiting_since: HashMap<DeviceKey, Instant>,
    work: JoinSet<Finished>,
    metrics: DeviceMetrics,
}

struct DeviceMetrics {
    steps: IntCounterVec,
    queued: IntGauge,
    listing: Gauge,
}

impl DeviceMetrics {
    fn register(registry: &prometheus::Registry) -> Result<Self, prometheus::Error> {
        let steps = Opts::new("fleetwright_device_steps_total", "Steps carried out for Devices and for the shards of Gateways.");
        let steps = IntCounterVec::new(steps, &["step", "outcome"])?;
        let queued = IntGauge::new("fleetwright_device_queue_length", "Devices that wait for their turn.")?;
        let listing = Gauge::new(
            "fleetwright_device_listing_seconds",
            "From taking the lease until all Devices and what belongs to them had been listed; 0 before.",
        )?;
        registry.register(Box::new(steps.clone()))?;
        registry.register(Box::new(queued.clone()))?;
        registry.register(Box::new(listing.clone()))?;
        Ok(Self { steps, queued, listing })
    }
}

impl Driver {
    /// A driver that makes at most `concurrency` calls for Devices at once.
    ///
    /// # Errors
    /// When the registry refuses a metric.
    pub fn new(context: Context, concurrency: usize, subscribers: Subscribers) -> Result<Self, prometheus::Error> {
        let metrics = DeviceMetrics::register(&context.metrics)?;
        let now = Instant::now();
        Ok(Self {
            writer: context.writer("fleetwright/device"),
            recorder: context.recorder("fleetwright.io/device"),
            context,
            concurrency: concurrency.max(1),
            subscribers,
            observer: Observer::default(),
            devices: RateLimitedQueue::new(Limits::default(), now),
            shards: RateLimitedQueue::new(Limits::default(), now),
            totals: RateLimitedQueue::new(Limits::default(), now),
            gathering_until: HashMap::new(),
            unhurried: BTreeSet::new(),
            load: Load::default(),
            waiting_since: HashMap::new(),
            work: JoinSet::new(),
            metrics,
        })
    }

    /// Runs until dropped. `listed` is called once, when all has been seen.
    pub async fn run(mut self, listed: impl FnOnce()) {
        let begin = Instant::now();
        let mut listed = Some(listed);
        let mut observations = observations(&self.context.client);
        let mut to_follow = Some(secrets(&self.context.client));
        let mut left_requests = Some(left_certificate_requests(&self.context.client));
        let mut of_issuers = Some(certificate_requests(&self.context.client));
        loop {
            let calm = self.load.until.filter(|_| !self.unhurried.is_empty());
            let due = [self.devices.next_due(), self.shards.next_due(), self.totals.next_due(), self.next_deadline(), calm];
            // Nothing is started before all has been seen.
            let due = due.into_iter().flatten().min().filter(|_| self.observer.is_complete());
            tokio::select! {
                Some(observation) = observations.next() => {
                    let index = self.context.fleet.clone();
                    self.observer.observe(&mut index.lock(), observation);
                    if self.observer.has_devices() {
                        // Their records must exist.
                        observations.extend(to_follow.take());
                        observations.extend(left_requests.take());
                    }
                }
                Some(finished) = self.work.join_next() => match finished {
                    Ok(finished) => self.finish(finished),
                    Err(error) => warn!(%error, "a step of a Device ended unexpectedly"),
                },
                () = sleep_until(due.unwrap_or_else(Instant::now)), if due.is_some() => {}
                () = self.context.fleet.woken() => {}
            }
            if of_issuers.is_some() && self.context.fleet.lock().asks_issuers() {
                observations.extend(of_issuers.take());
            }
            self.collect();
            if !self.observer.is_complete() {
                continue;
            }
            if let Some(listed) = listed.take() {
                info!("all Devices, Gateways, Secrets and reports have been listed");
                self.metrics.listing.set(begin.elapsed().as_secs_f64());
                listed();
                let unsettled = {
                    let mut index = self.context.fleet.lock();
                    index.completed();
                    index.unsettled()
                };
                for key in unsettled {
                    self.devices.insert(key, (), Instant::now(), Instant::now());
                }
            }
            self.advance();
        }
    }

    /// When a password comes of age, or one that was replaced ceases to be accepted.
    fn next_deadline(&self) -> Option<Instant> {
        let deadline = self.context.fleet.lock().next_deadline()?;
        let seconds = u64::try_from(deadline - Timestamp::now().as_second()).unwrap_or_default();
        // The clock may be set meanwhile: looked at again every hour.
        Some(Instant::now() + Duration::from_secs(seconds.min(3600)))
    }

    /// Puts what changed into the queues.
    fn collect(&mut self) {
        let now = Instant::now();
        let changes = {
            let mut index = self.context.fleet.lock();
            index.advance(Timestamp::now().as_second());
            index.take_changes()
        };
        // All of them are looked at once all has been seen; in a fleet that is settled there is no need to line them up.
        for key in changes.devices.into_iter().filter(|_| self.observer.is_complete()) {
            self.devices.insert(key, (), now, now);
        }
        let at_work = self.load.is_high(self.devices.ready() + self.devices.in_progress(), now);
        let (quiet, longest) = gathering_of_arrivals(at_work);
        for key in changes.arrivals {
            self.gather(&key, now, quiet, longest);
            self.unhurried.insert(key);
        }
        if !at_work {
            for key in std::mem::take(&mut self.unhurried) {
                self.gather(&key, now, QUIET, MAX_SHARD_DELAY);
                self.totals.insert(key, (), now + TOTALS_INTERVAL, now);
            }
        }
        for key in changes.shards {
            self.gather(&key, now, QUIET, MAX_SHARD_DELAY);
        }
        for key in changes.totals {
            self.totals.insert(key.clone(), (), now + if at_work { TOTALS_INTERVAL_AT_WORK } else { TOTALS_INTERVAL }, now);
            if at_work {
                self.unhurried.insert(key);
            }
        }
        for key in changes.registry {
            // Nobody listens where there is no Pipeline.
            let _ = self.subscribers.registry.send(key);
        }
        for key in changes.desired {
            // The receiver lives as long as this driver: both end with the lease.
            let _ = self.subscribers.desired.send(key);
        }
    }

    /// Has the shards of a Gateway written once nothing has come for `quiet`, or the first of what is gathered is as old as it may
    /// become.
    fn gather(&mut self, key: &GatewayKey, now: Instant, quiet: Duration, longest: Duration) {
        let until = self.gathering_until.entry(key.clone()).or_insert(now + longest);
        *until = (*until).min(now + longest);
        self.shards.postpone(key.clone(), (), (now + quiet).min(*until), now);
    }

    /// Starts what is due.
    fn advance(&mut self) {
        let now = Instant::now();
        self.devices.advance(now);
        while let Some((key, ())) = self.totals.pop(now) {
            self.totals.done(&key, now);
            // The receiver lives as long as this driver: both end with the lease.
            let _ = self.subscribers.totals.send(key);
        }
        while let Some((key, ())) = self.shards.pop(now) {
            self.start_shards(key, now);
        }
        while self.devices.in_progress() < self.concurrency
            && let Some((key, ())) = self.devices.pop(now)
        {
            self.start_step(key, now);
        }
        self.metrics.queued.set(i64::try_from(self.devices.ready()).unwrap_or(i64::MAX));
    }

    fn start_shards(&mut self, key: GatewayKey, now: Instant) {
        self.gathering_until.remove(&key);
        let Some((number, plan)) = self.context.fleet.lock().plan(&key) else {
            self.shards.done(&key, now);
            return;
        };
        let writer = self.writer.clone();
        self.work.spawn(async move {
            let result = execute::write_shards(&writer, &key, &plan).await;
            Finished::Shards(key, number, Box::new(plan), result)
        });
    }

    fn start_step(&mut self, key: DeviceKey, now: Instant) {
        let waited = self.waiting_since.get(&key).is_some_and(|since| now.duration_since(*since) >= STATUS_DELAY);
        let step = self.context.fleet.lock().start_action(&key, waited, Timestamp::now().as_second());
        let (writer, recorder, index) = (self.writer.clone(), Arc::clone(&self.recorder), self.context.fleet.clone());
        self.work.spawn(async move {
            let result = execute::action(&writer, &recorder, &index, &key, step).await;
            Finished::Action(key, result)
        });
    }

    fn finish(&mut self, finished: Finished) {
        let now = Instant::now();
        match finished {
            Finished::Action(key, Ok(ActionOutcome::Waiting)) => {
                let since = *self.waiting_since.entry(key.clone()).or_insert(now);
                self.devices.done(&key, now);
                self.devices.insert(key, (), (since + STATUS_DELAY).max(now), now);
                self.count("device", "waiting");
            }
            Finished::Action(key, Ok(ActionOutcome::Done)) => {
                self.waiting_since.remove(&key);
                self.devices.done(&key, now);
                self.count("device", "done");
            }
            Finished::Action(key, Err(error)) if error.is_namespace_terminating() => {
                debug!(device = %key.name, namespace = %key.gateway.namespace, "the namespace is on its way out, and the Device with it");
                self.waiting_since.remove(&key);
                self.devices.done(&key, now);
                self.count("device", "done");
            }
            Finished::Action(key, Err(error)) => {
                let failures = self.devices.failed(&key, (), now, rand::random());
                self.count("device", "failed");
                warn!(device = %key.name, namespace = %key.gateway.namespace, failures, error = chain(&error), "a step of a Device failed: trying again");
                self.context.fleet.lock().step_failed(&key, failures, &error);
            }
            Finished::Shards(key, number, plan, Ok(())) => {
                self.context.fleet.lock().plan_applied(&key, number, *plan);
                self.shards.done(&key, now);
                self.count("shards", "done");
            }
            Finished::Shards(key, _, _, Err(error)) if error.is_namespace_terminating() => {
                debug!(gateway = %key.name, namespace = %key.namespace, "the namespace is on its way out, and the Gateway with it");
                self.shards.done(&key, now);
                self.count("shards", "done");
            }
            Finished::Shards(key, _, _, Err(error)) => {
                self.shards.failed(&key, (), now, rand::random());
                self.count("shards", "failed");
                warn!(gateway = %key.name, namespace = %key.namespace, error = chain(&error), "failed to write the credentials of a Gateway: trying again");
            }
        }
    }

    fn count(&self, step: &str, outcome: &str) {
        self.metrics.steps.with_label_values(&[step, outcome]).inc();
    }
}

/// Whether there is other work to be done for Devices.
#[derive(Debug, Default)]
struct Load {
    until: Option<Instant>,
}

impl Load {
    /// `devices` are in the queue or at work now.
    fn is_high(&mut self, devices: usize, now: Instant) -> bool {
        if devices > HIGH_LOAD_DEVICES {
            self.until = Some(now + HIGH_LOAD_PERIOD);
        }
        self.until.is_some_and(|until| now < until)
    }
}

/// How long Devices that no broker has held yet are gathered: until none has come for the first time, at most for the second.
/// `at_work`: whether there is other work to be done for Devices.
fn gathering_of_arrivals(at_work: bool) -> (Duration, Duration) {
    if at_work { (MAX_NEW_DEVICE_DELAY, MAX_NEW_DEVICE_DELAY) } else { (QUIET, MAX_SHARD_DELAY) }
}

// Else each of them would get a status of its own that says what it waits for.
const _: () = assert!(MAX_NEW_DEVICE_DELAY.as_secs() < STATUS_DELAY.as_secs());

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_device_is_let_in_at_once_and_many_together() {
        let at_once = (QUIET, MAX_SHARD_DELAY);
        let together = (MAX_NEW_DEVICE_DELAY, MAX_NEW_DEVICE_DELAY);
        let start = Instant::now();
        let mut load = Load::default();
        // Milliseconds, Devices in the queue or at work -> how long arrivals are gathered.
        for (millis, devices, expected) in [
            (0, 1, at_once),
            (10, HIGH_LOAD_DEVICES, at_once),
            (20, HIGH_LOAD_DEVICES + 1, together),
            (30, 0, together),
            (519, 0, together),
            (520, 0, at_once),
            (530, 1000, together),
            (900, 1000, together),
            (1399, 1, together),
            (1400, 1, at_once),
        ] {
            let at_work = load.is_high(devices, start + Duration::from_millis(millis));
            assert_eq!(gathering_of_arrivals(at_work), expected, "{millis} ms");
        }
    }
}
