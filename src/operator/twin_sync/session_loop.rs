//! The session with one broker: it compares the retained messages with the desired states and publishes the differences.

use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt;
use futures::future::BoxFuture;
use futures::stream::FuturesUnordered;
use jiff::Timestamp;
use rumqttc::{ClientError, Publish, PublishNoticeError, PublishOptions};
use thiserror::Error;
use tokio::sync::{Notify, mpsc};
use tokio::time::{Instant, sleep_until, timeout};
use tracing::{debug, info, warn};

use super::connections::ReportedConnections;
use super::metrics::TwinSyncMetrics;
use super::reports::Report;
use super::retained::{RetainedAction, RetainedStates, device_and_leaf};
use super::session::{SessionError, TwinSession};
use crate::api::name::{desired_topic, reported_topic};
use crate::mqtt::login::Login;
use crate::operator::device::index::SharedDeviceIndex;
use crate::operator::device::key::{DeviceKey, GatewayKey};
use crate::operator::device::twin::MAX_REPORT_BYTES;
use crate::operator::presence::follow::PresenceUpdate;
use crate::runtime::error::chain;
use crate::runtime::rate_limited_queue::{Limits, RateLimitedQueue};

/// Upper limit of unconfirmed publishes: enough to hide the round trip to the broker.
const MAX_IN_FLIGHT: usize = 64;

/// Upper limit of requests queued in the client: the publishes, and as many that clear reports.
const CAPACITY: usize = 4 * MAX_IN_FLIGHT;

/// All retained messages have come once none has come for this long. If it is too short, messages are published again
/// unnecessarily.
const QUIET: Duration = Duration::from_millis(300);

/// Delay before a message that another client published at `desired` is corrected. It prevents a fast loop between two publishers.
const CORRECTION_DELAY: Duration = Duration::from_secs(1);

/// Upper limit of the time until the broker confirms a message.
const MAX_CONFIRMATION_TIME: Duration = Duration::from_secs(30);

/// Why a session ended.
#[derive(Debug, Error)]
pub enum SyncError {
    /// The session failed.
    #[error(transparent)]
    Session(#[from] SessionError),

    /// The operator is shutting down.
    #[error("the operator is shutting down: reports are no longer received")]
    Abandoned,
}

/// Why a message was not confirmed.
#[derive(Debug, Error)]
enum PublishError {
    #[error("failed to queue the message")]
    Queue(#[source] ClientError),
    #[error("the broker refused the message")]
    Confirm(#[source] PublishNoticeError),
    #[error("the broker did not confirm the message within {} s", MAX_CONFIRMATION_TIME.as_secs())]
    Timeout,
}

/// The result of a publish, with the payload and its generation.
struct PublishOutcome {
    device: Arc<str>,
    payload: Box<str>,
    generation: Option<i64>,
    result: Result<(), PublishError>,
}

/// The session with one broker.
pub struct SessionLoop {
    gateway: GatewayKey,
    index: SharedDeviceIndex,
    changes: mpsc::UnboundedReceiver<Arc<str>>,
    reports: mpsc::Sender<Report>,
    metrics: TwinSyncMetrics,
    subscription: Option<PresenceSubscription>,
}

/// Receives connection states that the devices publish.
#[derive(Debug)]
pub struct PresenceSubscription {
    /// The reported states.
    pub connections: ReportedConnections,
    /// The channel for updates.
    pub updates: mpsc::Sender<PresenceUpdate>,
    /// Notified when all states must be reported again.
    pub resync: Arc<Notify>,
}

/// The state of one session.
struct SessionState {
    retained: RetainedStates,
    queue: RateLimitedQueue<Arc<str>>,
    in_flight: FuturesUnordered<BoxFuture<'static, PublishOutcome>>,
}

impl SessionLoop {
    /// `changes` provides devices whose desired state may have changed. Reports of devices are sent to `reports`.
    #[must_use]
    pub fn new(
        gateway: GatewayKey,
        index: SharedDeviceIndex,
        changes: mpsc::UnboundedReceiver<Arc<str>>,
        reports: mpsc::Sender<Report>,
        metrics: TwinSyncMetrics,
    ) -> Self {
        metrics.connected(&gateway, false);
        Self { gateway, index, changes, reports, metrics, subscription: None }
    }

    /// Also receives connection states.
    #[must_use]
    pub fn with_presence(self, subscription: PresenceSubscription) -> Self {
        Self { subscription: Some(subscription), ..self }
    }

    /// Connects to the broker.
    ///
    /// # Errors
    /// If the broker is unreachable or refuses the login.
    pub async fn begin(&self, login: &Login) -> Result<TwinSession, SyncError> {
        Ok(TwinSession::begin(login, CAPACITY, self.subscription.is_some()).await?)
    }

    /// Publishes desired states and receives reports until the connection ends.
    pub async fn run(&mut self, mut session: TwinSession) -> SyncError {
        info!(gateway = %self.gateway.name, namespace = %self.gateway.namespace, "session with the broker started");
        self.set_connected(true);
        let Err(error) = self.serve(&mut session).await;
        self.set_connected(false);
        error
    }

    /// There is no connection to the broker.
    pub async fn away(&mut self) {
        let Some(subscription) = &mut self.subscription else { return };
        if let Some(update) = subscription.connections.away(Instant::now(), Timestamp::now().as_second()) {
            subscription.send(update).await;
        }
    }

    fn set_connected(&self, broker_connected: bool) {
        self.metrics.connected(&self.gateway, broker_connected);
        self.index.lock().broker_connection_observed(&self.gateway, broker_connected);
        self.index.wake();
    }

    async fn serve(&mut self, session: &mut TwinSession) -> Result<std::convert::Infallible, SyncError> {
        let mut state = SessionState {
            retained: RetainedStates::new(self.subscription.is_some()),
            queue: RateLimitedQueue::new(Limits::default(), Instant::now()),
            in_flight: FuturesUnordered::new(),
        };
        self.gather(session, &mut state).await?;
        let resync = self.subscription.as_ref().map(|subscription| Arc::clone(&subscription.resync));
        loop {
            let now = Instant::now();
            state.queue.advance(now);
            while state.queue.in_progress() < MAX_IN_FLIGHT
                && let Some((device, ())) = state.queue.pop(now)
            {
                self.start(session, &mut state, device, now);
            }
            let due = state.queue.next_due();
            tokio::select! {
                message = session.message() => self.observe(session, &mut state, &message?, false).await?,
                Some(device) = self.changes.recv() => state.queue.insert(device, (), now, now),
                Some(published) = state.in_flight.next() => self.finish(&mut state, published),
                () = notified(resync.as_deref()), if resync.is_some() => self.send_all().await,
                () = sleep_until(due.unwrap_or(now)), if due.is_some() => {}
            }
        }
    }

    async fn send_all(&mut self) {
        if let Some(subscription) = &mut self.subscription {
            let update = subscription.connections.all();
            subscription.send(update).await;
        }
    }

    /// Receives the retained messages, and then queues all devices that may differ.
    async fn gather(&mut self, session: &mut TwinSession, state: &mut SessionState) -> Result<(), SyncError> {
        if let Some(subscription) = &mut self.subscription {
            subscription.connections.begin();
        }
        while let Ok(message) = timeout(QUIET, session.message()).await {
            self.observe(session, state, &message?, true).await?;
        }
        self.send_all().await;
        let now = Instant::now();
        for device in self.index.lock().with_desired(&self.gateway) {
            state.queue.insert(device.name, (), now, now);
        }
        for device in state.retained.devices() {
            state.queue.insert(Arc::clone(device), (), now, now);
        }
        Ok(())
    }

    async fn observe(
        &mut self,
        session: &TwinSession,
        state: &mut SessionState,
        message: &Publish,
        gathering: bool,
    ) -> Result<(), SyncError> {
        let Some((name, leaf)) = device_and_leaf(&message.topic) else { return Ok(()) };
        let device = self.key(name.into());
        match leaf {
            "desired" => {
                state.retained.observe(name, &message.payload, self.index.lock().has_device(&device));
                if !gathering && !matches!(state.retained.action(name, self.index.lock().desired(&device)), RetainedAction::Keep(_)) {
                    let now = Instant::now();
                    state.queue.insert(device.name, (), now + CORRECTION_DELAY, now);
                }
            }
            "reported" if message.payload.is_empty() => {}
            // The report of a deleted device. A new device with that name must not receive it.
            "reported" if message.retain && !self.index.lock().has_device(&device) => self.clear_report(session, name),
            "reported" => {
                // Of a message that is too long, one byte more than allowed shows that.
                let payload = &message.payload[..message.payload.len().min(MAX_REPORT_BYTES + 1)];
                let report = Report { device, payload: payload.into() };
                self.reports.send(report).await.map_err(|_| SyncError::Abandoned)?;
            }
            "connection" => {
                let Some(subscription) = &mut self.subscription else { return Ok(()) };
                let declared = self.index.lock().has_device(&device);
                if let Some(update) = subscription.connections.observe(name, &message.payload, declared, Timestamp::now().as_second())
                    && !gathering
                {
                    subscription.send(update).await;
                }
            }
            _ => {}
        }
        Ok(())
    }

    fn clear_report(&self, session: &TwinSession, device: &str) {
        let options = PublishOptions::at_least_once().retained();
        // The next session tries again.
        if let Err(error) = session.client.try_publish(reported_topic(device), Vec::new(), options) {
            debug!(gateway = %self.gateway.name, device, error = chain(&error), "failed to clear the report of a deleted device");
        }
    }

    /// Publishes the desired message of a device, unless the broker retains it.
    fn start(&self, session: &TwinSession, state: &mut SessionState, device: Arc<str>, now: Instant) {
        let key = self.key(Arc::clone(&device));
        let (wanted, exists) = {
            let index = self.index.lock();
            (index.desired(&key), index.has_device(&key))
        };
        let (generation, payload) = match state.retained.action(&device, wanted) {
            RetainedAction::Keep(generation) => {
                state.queue.done(&device, now);
                return self.kept(&key, generation);
            }
            RetainedAction::Publish(generation, payload) => (Some(generation), payload),
            RetainedAction::Clear => (None, Box::default()),
        };
        if !exists {
            self.clear_report(session, &device);
        }
        let options = PublishOptions::at_least_once().retained();
        let notice = session.client.try_publish_tracked(desired_topic(&device), payload.as_bytes().to_vec(), options);
        match notice {
            Ok(notice) => state.in_flight.push(Box::pin(async move {
                let result = match timeout(MAX_CONFIRMATION_TIME, notice.wait_completion_async()).await {
                    Ok(result) => result.map_err(PublishError::Confirm),
                    Err(_) => Err(PublishError::Timeout),
                };
                PublishOutcome { device, payload, generation, result }
            })),
            Err(error) => self.failed(state, &device, &PublishError::Queue(error), now),
        }
    }

    fn finish(&self, state: &mut SessionState, published: PublishOutcome) {
        let PublishOutcome { device, payload, generation, result } = published;
        match result {
            Ok(()) => {
                self.metrics.publishes.with_label_values(&["confirmed"]).inc();
                let declared = self.index.lock().has_device(&self.key(Arc::clone(&device)));
                state.retained.observe(&device, payload.as_bytes(), declared);
                state.queue.done(&device, Instant::now());
                self.kept(&self.key(device), generation);
            }
            Err(error) => self.failed(state, &device, &error, Instant::now()),
        }
    }

    fn failed(&self, state: &mut SessionState, device: &Arc<str>, error: &PublishError, now: Instant) {
        self.metrics.publishes.with_label_values(&["failed"]).inc();
        let failures = state.queue.failed(device, (), now, rand::random());
        let (gateway, namespace) = (&self.gateway.name, &self.gateway.namespace);
        warn!(%gateway, %namespace, %device, failures, error = chain(error), "failed to publish a desired state: retrying");
    }

    fn kept(&self, device: &DeviceKey, generation: Option<i64>) {
        if let Some(generation) = generation {
            self.index.lock().desired_published(device, generation);
            self.index.wake();
        }
    }

    fn key(&self, name: Arc<str>) -> DeviceKey {
        DeviceKey { gateway: self.gateway.clone(), name }
    }
}

impl PresenceSubscription {
    async fn send(&self, update: PresenceUpdate) {
        // The receiver lives as long as this task: both end with the lease.
        let _ = self.updates.send(update).await;
    }
}

async fn notified(notify: Option<&Notify>) {
    match notify {
        Some(notify) => notify.notified().await,
        None => std::future::pending().await,
    }
}
