//! The link to one broker: what it retains is compared with what is desired, and what differs is published.

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
use super::session::{Login, Session, SessionError};
use crate::api::name::{desired_topic, reported_topic};
use crate::operator::device::index::SharedDeviceIndex;
use crate::operator::device::key::{DeviceKey, GatewayKey};
use crate::operator::device::twin::MAX_REPORT_BYTES;
use crate::operator::presence::follow::PresenceUpdate;
use crate::runtime::error::chain;
use crate::runtime::rate_limited_queue::{Limits, RateLimitedQueue};

/// Publishes under way at once: enough that the way to the broker and back does not count.
const MAX_IN_FLIGHT: usize = 64;

/// Requests that may wait in the client: those, and as many that clear what a device reported.
const CAPACITY: usize = 4 * MAX_IN_FLIGHT;

/// What the broker retains has come once nothing has come for this long. Guessed too early, something is published again that
/// was there already.
const QUIET: Duration = Duration::from_millis(300);

/// What somebody else published at `desired` is put right after this long, so that two who both insist do not race.
const CORRECTION: Duration = Duration::from_secs(1);

/// The longest that a broker may take to confirm a message.
const CONFIRMATION: Duration = Duration::from_secs(30);

/// Why a link ended.
#[derive(Debug, Error)]
pub enum SyncError {
    /// The session.
    #[error(transparent)]
    Session(#[from] SessionError),

    /// The operator is about to end.
    #[error("nobody takes the reports any more")]
    Abandoned,
}

/// Why a message was not confirmed.
#[derive(Debug, Error)]
enum PublishError {
    #[error("failed to queue the message")]
    Queue(#[source] ClientError),
    #[error("the broker did not take the message")]
    Confirm(#[source] PublishNoticeError),
    #[error("the broker did not confirm the message within {} s", CONFIRMATION.as_secs())]
    Timeout,
}

/// What came of a message, and what it was: the payload, and the generation.
struct PublishOutcome {
    device: Arc<str>,
    payload: Box<str>,
    generation: Option<i64>,
    result: Result<(), PublishError>,
}

/// The link to one broker.
pub struct SessionLoop {
    gateway: GatewayKey,
    index: SharedDeviceIndex,
    changes: mpsc::UnboundedReceiver<Arc<str>>,
    reports: mpsc::Sender<Report>,
    metrics: TwinSyncMetrics,
    subscription: Option<PresenceSubscription>,
}

/// What hears who is connected, where the devices say that themselves.
#[derive(Debug)]
pub struct PresenceSubscription {
    /// What they said.
    pub connections: ReportedConnections,
    /// Where it goes.
    pub updates: mpsc::Sender<PresenceUpdate>,
    /// Notified when all of it is to be told resync.
    pub resync: Arc<Notify>,
}

/// What holds for one session.
struct SessionState {
    retained: RetainedStates,
    queue: RateLimitedQueue<Arc<str>>,
    under_way: FuturesUnordered<BoxFuture<'static, PublishOutcome>>,
}

impl SessionLoop {
    /// Devices whose desired state may have changed come from `changes`; what devices say goes to `reports`.
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

    /// Hears who is connected, too.
    #[must_use]
    pub fn with_presence(self, subscription: PresenceSubscription) -> Self {
        Self { subscription: Some(subscription), ..self }
    }

    /// Logs in.
    ///
    /// # Errors
    /// When the broker cannot be reached, or refuses.
    pub async fn begin(login: &Login) -> Result<Session, SyncError> {
        Ok(Session::begin(login, CAPACITY).await?)
    }

    /// Keeps at the broker what is desired until the connection ends.
    pub async fn run(&mut self, mut session: Session) -> SyncError {
        info!(gateway = %self.gateway.name, namespace = %self.gateway.namespace, "linked to the broker");
        self.tell(true);
        let Err(error) = self.serve(&mut session).await;
        self.tell(false);
        error
    }

    /// There is no login, still or since now.
    pub async fn away(&mut self) {
        let Some(subscription) = &mut self.subscription else { return };
        if let Some(update) = subscription.connections.away(Instant::now(), Timestamp::now().as_second()) {
            subscription.send(update).await;
        }
    }

    fn tell(&self, broker_connected: bool) {
        self.metrics.connected(&self.gateway, broker_connected);
        self.index.lock().broker_connection_observed(&self.gateway, broker_connected);
        self.index.wake();
    }

    async fn serve(&mut self, session: &mut Session) -> Result<std::convert::Infallible, SyncError> {
        let mut state = SessionState {
            retained: RetainedStates::default(),
            queue: RateLimitedQueue::new(Limits::default(), Instant::now()),
            under_way: FuturesUnordered::new(),
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
                Some(published) = state.under_way.next() => self.finish(&mut state, published),
                () = notified(resync.as_deref()), if resync.is_some() => self.tell_all().await,
                () = sleep_until(due.unwrap_or(now)), if due.is_some() => {}
            }
        }
    }

    async fn tell_all(&mut self) {
        if let Some(subscription) = &mut self.subscription {
            let update = subscription.connections.all();
            subscription.send(update).await;
        }
    }

    /// Takes what the broker retains, and then lines up all that may differ.
    async fn gather(&mut self, session: &mut Session, state: &mut SessionState) -> Result<(), SyncError> {
        if let Some(subscription) = &mut self.subscription {
            subscription.connections.begin();
        }
        while let Ok(message) = timeout(QUIET, session.message()).await {
            self.observe(session, state, &message?, true).await?;
        }
        self.tell_all().await;
        let now = Instant::now();
        for device in self.index.lock().with_desired(&self.gateway) {
            state.queue.insert(device.name, (), now, now);
        }
        for device in state.retained.devices() {
            state.queue.insert(Arc::clone(device), (), now, now);
        }
        Ok(())
    }

    async fn observe(&mut self, session: &Session, state: &mut SessionState, message: &Publish, gathering: bool) -> Result<(), SyncError> {
        let Some((name, leaf)) = device_and_leaf(&message.topic) else { return Ok(()) };
        let device = self.key(name.into());
        match leaf {
            "desired" => {
                state.retained.observe(name, &message.payload);
                if !gathering && !matches!(state.retained.action(name, self.index.lock().desired(&device)), RetainedAction::Keep(_)) {
                    let now = Instant::now();
                    state.queue.insert(device.name, (), now + CORRECTION, now);
                }
            }
            "reported" if message.payload.is_empty() => {}
            // Of a device that is gone; another one of that name is not to be taken for it.
            "reported" if message.retain && !self.index.lock().has_device(&device) => self.clear_report(session, name),
            "reported" => {
                // Of one that is too long no more is needed than shows that.
                let payload = &message.payload[..message.payload.len().min(MAX_REPORT_BYTES + 1)];
                let report = Report { device, payload: payload.into() };
                self.reports.send(report).await.map_err(|_| SyncError::Abandoned)?;
            }
            "connection" => {
                let Some(subscription) = &mut self.subscription else { return Ok(()) };
                if let Some(update) = subscription.connections.observe(name, &message.payload, Timestamp::now().as_second())
                    && !gathering
                {
                    subscription.send(update).await;
                }
            }
            _ => {}
        }
        Ok(())
    }

    fn clear_report(&self, session: &Session, device: &str) {
        let options = PublishOptions::at_least_once().retained();
        // It is tried again with the next connection.
        if let Err(error) = session.client.try_publish(reported_topic(device), Vec::new(), options) {
            debug!(gateway = %self.gateway.name, device, error = chain(&error), "failed to clear what a device that is gone reported");
        }
    }

    /// Gives the broker what it should keep for a device.
    fn start(&self, session: &Session, state: &mut SessionState, device: Arc<str>, now: Instant) {
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
            Ok(notice) => state.under_way.push(Box::pin(async move {
                let result = match timeout(CONFIRMATION, notice.wait_completion_async()).await {
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
                state.retained.observe(&device, payload.as_bytes());
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
        warn!(%gateway, %namespace, %device, failures, error = chain(error), "failed to publish a desired state: trying again");
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
        // Who takes it lives as long as this: both end with the lease.
        let _ = self.updates.send(update).await;
    }
}

async fn notified(notify: Option<&Notify>) {
    match notify {
        Some(notify) => notify.notified().await,
        None => std::future::pending().await,
    }
}
