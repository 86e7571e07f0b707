//! Reconciles the Devices: observations update the index, the index determines actions, and the actions run with bounded
//! concurrency.

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt;
use k8s_controller::events::EventRecorder;
use k8s_openapi::jiff::Timestamp;
use tokio::sync::{broadcast, mpsc};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep_until};
use tracing::{debug, info, warn};

use super::execute::{self, ActionOutcome};
use super::gateway::ShardPlan;
use super::index::SharedDeviceIndex;
use super::key::{DeviceKey, GatewayKey};
use super::load::{Load, MAX_NEW_DEVICE_DELAY, MAX_SHARD_DELAY, SHARD_DEBOUNCE, gathering_of_arrivals, hash_of};
use super::metrics::DeviceMetrics;
use super::observe::Observer;
use super::watch::{certificate_requests, left_certificate_requests, observations, secrets};
use crate::operator::context::Context;
use crate::operator::kubernetes::apply::{WriteError, Writer};
use crate::operator::kubernetes::namespaces::WatchedNamespaces;
use crate::runtime::error::chain;
use crate::runtime::rate_limited_queue::{Limits, RateLimitedQueue};

/// The status of a Device reports that it waits for the broker after this long. A running broker is verified within a second and a
/// starting one within some ten; a Device that becomes ready before that needs one status write less.
const STATUS_DELAY: Duration = Duration::from_secs(20);

/// Lower limit of the time between two writes of a Gateway's totals.
const TOTALS_INTERVAL: Duration = Duration::from_secs(2);

/// The same under high load.
const HIGH_LOAD_TOTALS_INTERVAL: Duration = Duration::from_secs(10);

/// A finished task.
enum Finished {
    Action(DeviceKey, Result<ActionOutcome, WriteError>),
    Shards(GatewayKey, u64, Box<ShardPlan>, Result<(), WriteError>),
}

/// Receivers of changes.
pub struct Subscribers {
    /// Gateways whose totals changed.
    pub totals: mpsc::UnboundedSender<GatewayKey>,
    /// Devices whose row in the registry may have changed. A receiver that lags behind starts again from
    /// [`super::index::DeviceIndex::registry`].
    pub registry: broadcast::Sender<DeviceKey>,
    /// Devices whose desired state the broker may not have yet.
    pub desired: mpsc::UnboundedSender<DeviceKey>,
}

/// The reconciler of all Devices.
pub struct Driver {
    watched: WatchedNamespaces,
    fleet: SharedDeviceIndex,
    writer: Writer,
    recorder: Arc<EventRecorder>,
    concurrency: usize,
    subscribers: Subscribers,
    observer: Observer,
    devices: RateLimitedQueue<DeviceKey>,
    shards: RateLimitedQueue<GatewayKey>,
    totals: RateLimitedQueue<GatewayKey>,
    gathering_until: HashMap<GatewayKey, Instant>,
    /// Gateways whose shards or totals wait for the end of their high load.
    deferred: BTreeSet<GatewayKey>,
    /// Gateways with a recent change of a Device.
    loads: HashMap<GatewayKey, Load>,
    waiting_since: HashMap<DeviceKey, Instant>,
    work: JoinSet<Finished>,
    metrics: DeviceMetrics,
}

impl Driver {
    /// A driver that runs at most `concurrency` actions for Devices at once.
    ///
    /// # Errors
    /// If a metric is registered twice.
    pub fn new(context: Context, concurrency: usize, subscribers: Subscribers) -> Result<Self, prometheus::Error> {
        let metrics = DeviceMetrics::register(&context.metrics)?;
        let now = Instant::now();
        Ok(Self {
            writer: context.writer("fleetwright/device"),
            recorder: context.recorder("fleetwright.io/device"),
            watched: context.watched,
            fleet: context.fleet,
            concurrency: concurrency.max(1),
            subscribers,
            observer: Observer::default(),
            devices: RateLimitedQueue::shared_by_groups(Limits::default(), now, |device| hash_of(&device.gateway)),
            shards: RateLimitedQueue::new(Limits::default(), now),
            totals: RateLimitedQueue::new(Limits::default(), now),
            gathering_until: HashMap::new(),
            deferred: BTreeSet::new(),
            loads: HashMap::new(),
            waiting_since: HashMap::new(),
            work: JoinSet::new(),
            metrics,
        })
    }

    /// Reconciles all Devices until dropped. Calls `listed` once all objects have been listed.
    ///
    /// For each change of a Device, its Secret, its Gateway, a proof of the broker or a deadline:
    ///
    /// 1. Observe: update the index from the watch event ([`super::observe`]).
    /// 2. Collect: queue the Devices, shards and totals that the event affects ([`super::index::Changes`]).
    /// 3. Decide: determine the one next action of a queued Device from the index alone ([`super::index::action`]).
    /// 4. Execute: prune a CertificateRequest that is no longer needed; issue a certificate; create, read, rotate or update the
    ///    Secret with the password; write the status; prune a generated Secret that is no longer needed ([`super::execute`]).
    /// 5. Write the shards of the Gateway once changes have settled ([`super::gateway`]).
    /// 6. Update the index with the results. Repeat from step 3 until no action is left, and retry after failures with a backoff.
    ///
    /// No step sleeps. A Device that waits for its broker is queued again for the time at which its status must report this.
    pub async fn run(mut self, listed: impl FnOnce()) {
        let begin = Instant::now();
        let mut listed = Some(listed);
        let mut observations = observations(&self.watched);
        let mut to_follow = Some(secrets(&self.watched));
        let mut left_requests = Some(left_certificate_requests(&self.watched));
        let mut of_issuers = Some(certificate_requests(&self.watched));
        loop {
            let calm = self.deferred.iter().filter_map(|key| self.loads.get(key)?.until()).min();
            let due = [self.devices.next_due(), self.shards.next_due(), self.totals.next_due(), self.next_deadline(), calm];
            // No action starts before all objects have been listed.
            let due = due.into_iter().flatten().min().filter(|_| self.observer.is_complete());
            tokio::select! {
                Some(observation) = observations.next() => {
                    let index = self.fleet.clone();
                    self.observer.observe(&mut index.lock(), observation);
                    if self.observer.has_devices() {
                        // The index must contain the Devices of these objects.
                        observations.extend(to_follow.take());
                        observations.extend(left_requests.take());
                    }
                }
                Some(finished) = self.work.join_next() => match finished {
                    Ok(finished) => self.finish(finished),
                    Err(error) => warn!(%error, "an action for a Device ended unexpectedly"),
                },
                () = sleep_until(due.unwrap_or_else(Instant::now)), if due.is_some() => {}
                () = self.fleet.woken() => {}
            }
            if of_issuers.is_some() && self.fleet.lock().asks_issuers() {
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
                    let mut index = self.fleet.lock();
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

    /// The next time at which a password or certificate is due, or a previous password expires.
    fn next_deadline(&self) -> Option<Instant> {
        let deadline = self.fleet.lock().next_deadline()?;
        let seconds = u64::try_from(deadline - Timestamp::now().as_second()).unwrap_or_default();
        // At most an hour, because the system clock may be set meanwhile.
        Some(Instant::now() + Duration::from_secs(seconds.min(3600)))
    }

    /// Queues the changed keys.
    fn collect(&mut self) {
        let now = Instant::now();
        let changes = {
            let mut index = self.fleet.lock();
            index.advance(Timestamp::now().as_second());
            index.take_changes()
        };
        // After the listing, [`super::index::DeviceIndex::unsettled`] is queued. Most Devices of a settled fleet need no action.
        for key in changes.devices.into_iter().filter(|_| self.observer.is_complete()) {
            self.loads.entry(key.gateway.clone()).or_default().add(now);
            self.devices.insert(key, (), now, now);
        }
        self.loads.retain(|_, load| !load.is_idle(now));
        for key in changes.arrivals {
            let (quiet, longest) = gathering_of_arrivals(self.is_high_load(&key, now));
            self.gather(&key, now, quiet, longest);
            self.deferred.insert(key);
        }
        let (deferred, calm) = std::mem::take(&mut self.deferred).into_iter().partition(|key| self.is_high_load(key, now));
        self.deferred = deferred;
        let calm: BTreeSet<GatewayKey> = calm;
        for key in calm {
            self.gather(&key, now, SHARD_DEBOUNCE, MAX_SHARD_DELAY);
            self.totals.insert(key, (), now + TOTALS_INTERVAL, now);
        }
        for key in changes.shards {
            self.gather(&key, now, SHARD_DEBOUNCE, MAX_SHARD_DELAY);
        }
        for key in changes.totals {
            let high_load = self.is_high_load(&key, now);
            self.totals.insert(key.clone(), (), now + if high_load { HIGH_LOAD_TOTALS_INTERVAL } else { TOTALS_INTERVAL }, now);
            if high_load {
                self.deferred.insert(key);
            }
        }
        for key in changes.registry {
            // There is no receiver without a Pipeline.
            let _ = self.subscribers.registry.send(key);
        }
        for key in changes.desired {
            // The receiver lives as long as this driver: both end with the lease.
            let _ = self.subscribers.desired.send(key);
        }
    }

    fn is_high_load(&self, gateway: &GatewayKey, now: Instant) -> bool {
        self.loads.get(gateway).is_some_and(|load| load.is_high(now))
    }

    /// Queues the shards of a Gateway: they are written once no change has come for `quiet`, or `longest` after the first change.
    fn gather(&mut self, key: &GatewayKey, now: Instant, quiet: Duration, longest: Duration) {
        let until = self.gathering_until.entry(key.clone()).or_insert(now + longest);
        *until = (*until).min(now + longest);
        self.shards.postpone(key.clone(), (), (now + quiet).min(*until), now);
    }

    /// Starts the actions that are due.
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
        let Some((number, plan)) = self.fleet.lock().plan(&key) else {
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
        let step = self.fleet.lock().start_action(&key, waited, Timestamp::now().as_second());
        let (writer, recorder, index) = (self.writer.clone(), Arc::clone(&self.recorder), self.fleet.clone());
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
                debug!(device = %key.name, namespace = %key.gateway.namespace, "the namespace is terminating: the Device is ignored");
                self.waiting_since.remove(&key);
                self.devices.done(&key, now);
                self.count("device", "done");
            }
            Finished::Action(key, Err(error)) => {
                let failures = self.devices.failed(&key, (), now, rand::random());
                self.count("device", "failed");
                warn!(device = %key.name, namespace = %key.gateway.namespace, failures, error = chain(&error), "an action for a Device failed: retrying");
                self.fleet.lock().action_failed(&key, failures, &error);
            }
            Finished::Shards(key, number, plan, Ok(())) => {
                self.fleet.lock().plan_applied(&key, number, *plan);
                self.shards.done(&key, now);
                self.count("shards", "done");
            }
            Finished::Shards(key, _, _, Err(error)) if error.is_namespace_terminating() => {
                debug!(gateway = %key.name, namespace = %key.namespace, "the namespace is terminating: the Gateway is ignored");
                self.shards.done(&key, now);
                self.count("shards", "done");
            }
            Finished::Shards(key, _, _, Err(error)) => {
                self.shards.failed(&key, (), now, rand::random());
                self.count("shards", "failed");
                warn!(gateway = %key.name, namespace = %key.namespace, error = chain(&error), "failed to write the credentials of a Gateway: retrying");
            }
        }
    }

    fn count(&self, step: &str, outcome: &str) {
        self.metrics.steps.with_label_values(&[step, outcome]).inc();
    }
}

// Otherwise each of them would need an additional status write.
const _: () = assert!(MAX_NEW_DEVICE_DELAY.as_secs() < STATUS_DELAY.as_secs());
