//! Drives the Devices: observations in, decisions of the fleet, calls out, with bounded concurrency.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt;
use k8s_controller::events::EventRecorder;
use k8s_openapi::jiff::Timestamp;
use prometheus::{IntCounterVec, IntGauge, Opts};
use tokio::sync::{broadcast, mpsc};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep_until};
use tracing::{debug, info, warn};

use super::carry_out::{self, Done};
use super::gateway::ShardPlan;
use super::key::{DeviceKey, GatewayKey};
use super::observe::Observer;
use super::queue::Queue;
use super::watch::observations;
use crate::operator::apply::{WriteError, Writer};
use crate::operator::context::Context;
use crate::runtime::error::chain;

/// Changes of a Gateway's shards are gathered until none has come for this long …
const QUIET: Duration = Duration::from_millis(50);

/// … or the first of them is this old. Each write is a reload, which holds a broker of 15,000 clients for some 60 ms: under
/// steady changes that is a quarter of its time. Longer, and the gathering alone takes most of the second that a revocation has.
const LONGEST_GATHERING: Duration = Duration::from_millis(250);

/// After this long without the broker's proof a Device's status says what it waits for. A broker proves within a second;
/// one that starts takes some ten, and a Device that becomes ready meanwhile needs one write less.
const WORTH_A_STATUS: Duration = Duration::from_secs(15);

/// A Gateway's totals are written at most this often.
const TOTALS_INTERVAL: Duration = Duration::from_secs(2);

/// What is at work.
enum Finished {
    Step(DeviceKey, Result<Done, WriteError>),
    Shards(GatewayKey, u64, Box<ShardPlan>, Result<(), WriteError>),
}

/// Who wants to know of changes.
pub struct Subscribers {
    /// Gateways whose totals changed.
    pub totals: mpsc::UnboundedSender<GatewayKey>,
    /// Devices whose row in the registry may have changed; one that lags behind starts from [`super::fleet::Fleet::registry`].
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
    devices: Queue<DeviceKey>,
    shards: Queue<GatewayKey>,
    totals: Queue<GatewayKey>,
    gathering_since: HashMap<GatewayKey, Instant>,
    waiting_since: HashMap<DeviceKey, Instant>,
    work: JoinSet<Finished>,
    metrics: Metrics,
}

struct Metrics {
    steps: IntCounterVec,
    queued: IntGauge,
}

impl Metrics {
    fn register(registry: &prometheus::Registry) -> Result<Self, prometheus::Error> {
        let steps = Opts::new("fleetwright_device_steps_total", "Steps carried out for Devices and for the shards of Gateways.");
        let steps = IntCounterVec::new(steps, &["step", "outcome"])?;
        let queued = IntGauge::new("fleetwright_device_queue_length", "Devices that wait for their turn.")?;
        registry.register(Box::new(steps.clone()))?;
        registry.register(Box::new(queued.clone()))?;
        Ok(Self { steps, queued })
    }
}

impl Driver {
    /// A driver that makes at most `concurrency` calls for Devices at once.
    ///
    /// # Errors
    /// When the registry refuses a metric.
    pub fn new(context: Context, concurrency: usize, subscribers: Subscribers) -> Result<Self, prometheus::Error> {
        let metrics = Metrics::register(&context.metrics)?;
        Ok(Self {
            writer: context.writer("fleetwright/device"),
            recorder: context.recorder("fleetwright.io/device"),
            context,
            concurrency: concurrency.max(1),
            subscribers,
            observer: Observer::default(),
            devices: Queue::default(),
            shards: Queue::default(),
            totals: Queue::default(),
            gathering_since: HashMap::new(),
            waiting_since: HashMap::new(),
            work: JoinSet::new(),
            metrics,
        })
    }

    /// Runs until dropped. `listed` is called once, when all has been seen.
    pub async fn run(mut self, listed: impl FnOnce()) {
        let mut listed = Some(listed);
        let mut observations = observations(&self.context.client);
        loop {
            let due = [self.devices.next_due(), self.shards.next_due(), self.totals.next_due(), self.next_deadline()];
            let due = due.into_iter().flatten().min();
            tokio::select! {
                Some(observation) = observations.next() => {
                    let fleet = self.context.fleet.clone();
                    self.observer.observe(&mut fleet.lock(), observation);
                }
                Some(finished) = self.work.join_next() => match finished {
                    Ok(finished) => self.finish(finished),
                    Err(error) => warn!(%error, "a step of a Device ended unexpectedly"),
                },
                () = sleep_until(due.unwrap_or_else(Instant::now)), if due.is_some() => {}
                () = self.context.fleet.woken() => {}
            }
            self.collect();
            if !self.observer.is_complete() {
                continue;
            }
            if let Some(listed) = listed.take() {
                info!(devices = self.devices.len(), "all Devices, Gateways, Secrets and reports have been listed");
                listed();
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
            let mut fleet = self.context.fleet.lock();
            fleet.advance(Timestamp::now().as_second());
            fleet.take_changes()
        };
        for key in changes.devices {
            self.devices.push(key);
        }
        for key in changes.shards {
            let since = *self.gathering_since.entry(key.clone()).or_insert(now);
            self.shards.postpone(&key, (now + QUIET).min(since + LONGEST_GATHERING));
        }
        for key in changes.totals {
            self.totals.push_at(key, now + TOTALS_INTERVAL);
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

    /// Starts what is due.
    fn advance(&mut self) {
        let now = Instant::now();
        self.devices.advance(now);
        self.shards.advance(now);
        self.totals.advance(now);
        while let Some(key) = self.totals.pop() {
            self.totals.done(&key);
            // The receiver lives as long as this driver: both end with the lease.
            let _ = self.subscribers.totals.send(key);
        }
        while let Some(key) = self.shards.pop() {
            self.start_shards(key);
        }
        while self.devices.at_work() < self.concurrency
            && let Some(key) = self.devices.pop()
        {
            self.start_step(key, now);
        }
        self.metrics.queued.set(i64::try_from(self.devices.len()).unwrap_or(i64::MAX));
    }

    fn start_shards(&mut self, key: GatewayKey) {
        self.gathering_since.remove(&key);
        let Some((number, plan)) = self.context.fleet.lock().plan(&key) else {
            self.shards.done(&key);
            return;
        };
        let writer = self.writer.clone();
        self.work.spawn(async move {
            let result = carry_out::write_shards(&writer, &key, &plan).await;
            Finished::Shards(key, number, Box::new(plan), result)
        });
    }

    fn start_step(&mut self, key: DeviceKey, now: Instant) {
        let waited = self.waiting_since.get(&key).is_some_and(|since| now.duration_since(*since) >= WORTH_A_STATUS);
        let step = self.context.fleet.lock().step(&key, waited);
        let (writer, recorder, fleet) = (self.writer.clone(), Arc::clone(&self.recorder), self.context.fleet.clone());
        self.work.spawn(async move {
            let result = carry_out::step(&writer, &recorder, &fleet, &key, step).await;
            Finished::Step(key, result)
        });
    }

    fn finish(&mut self, finished: Finished) {
        let now = Instant::now();
        match finished {
            Finished::Step(key, Ok(Done::Waiting)) => {
                let since = *self.waiting_since.entry(key.clone()).or_insert(now);
                self.devices.done(&key);
                self.devices.push_at(key, (since + WORTH_A_STATUS).max(now));
                self.count("device", "waiting");
            }
            Finished::Step(key, Ok(Done::Done)) => {
                self.waiting_since.remove(&key);
                self.devices.done(&key);
                self.count("device", "done");
            }
            Finished::Step(key, Err(error)) if error.is_namespace_terminating() => {
                debug!(device = %key.name, namespace = %key.gateway.namespace, "the namespace is on its way out, and the Device with it");
                self.waiting_since.remove(&key);
                self.devices.done(&key);
                self.count("device", "done");
            }
            Finished::Step(key, Err(error)) => {
                let failures = self.devices.failed(&key, now, rand::random());
                self.count("device", "failed");
                warn!(device = %key.name, namespace = %key.gateway.namespace, failures, error = chain(&error), "a step of a Device failed: trying again");
                self.context.fleet.lock().step_failed(&key, failures, &error);
            }
            Finished::Shards(key, number, plan, Ok(())) => {
                self.context.fleet.lock().plan_carried_out(&key, number, *plan);
                self.shards.done(&key);
                self.count("shards", "done");
            }
            Finished::Shards(key, _, _, Err(error)) if error.is_namespace_terminating() => {
                debug!(gateway = %key.name, namespace = %key.namespace, "the namespace is on its way out, and the Gateway with it");
                self.shards.done(&key);
                self.count("shards", "done");
            }
            Finished::Shards(key, _, _, Err(error)) => {
                self.shards.failed(&key, now, rand::random());
                self.count("shards", "failed");
                warn!(gateway = %key.name, namespace = %key.namespace, error = chain(&error), "failed to write the credentials of a Gateway: trying again");
            }
        }
    }

    fn count(&self, step: &str, outcome: &str) {
        self.metrics.steps.with_label_values(&[step, outcome]).inc();
    }
}
