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

use super::connections::Connections;
use super::metrics::Metrics;
use super::reports::Report;
use super::retained::{Action, Retained, device_and_leaf};
use super::session::{SessionError, TwinSession};
use crate::api::name::{desired_topic, reported_topic};
use crate::mqtt::login::Login;
use crate::operator::device::fleet::SharedFleet;
use crate::operator::device::key::{DeviceKey, GatewayKey};
use crate::operator::device::queue::Queue;
use crate::operator::device::twin::MAX_REPORT_BYTES;
use crate::operator::presence::follow::News;
use crate::runtime::error::chain;

/// Publishes under way at once: enough that the way to the broker and back does not count.
const IN_FLIGHT: usize = 64;

/// Requests that may wait in the client: those, and as many that clear what a device reported.
const CAPACITY: usize = 4 * IN_FLIGHT;

/// What the broker retains has come once nothing has come for this long. Guessed too early, something is published again that
/// was there already.
const QUIET: Duration = Duration::from_millis(300);

/// What somebody else published at `desired` is put right after this long, so that two who both insist do not race.
const CORRECTION: Duration = Duration::from_secs(1);

/// The longest that a broker may take to confirm a message.
const CONFIRMATION: Duration = Duration::from_secs(30);

/// Why a link ended.
#[derive(Debug, Error)]
pub enum LinkError {
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
struct Published {
    device: Arc<str>,
    payload: Box<str>,
    generation: Option<i64>,
    result: Result<(), PublishError>,
}

/// The link to one broker.
pub struct Link {
    gateway: GatewayKey,
    fleet: SharedFleet,
    changes: mpsc::UnboundedReceiver<Arc<str>>,
    reports: mpsc::Sender<Report>,
    metrics: Metrics,
    ears: Option<Ears>,
}

/// What hears who is connected, where the devices say that themselves.
#[derive(Debug)]
pub struct Ears {
    /// What they said.
    pub connections: Connections,
    /// Where it goes.
    pub news: mpsc::Sender<News>,
    /// Notified when all of it is to be told anew.
    pub anew: Arc<Notify>,
}

/// What holds for one session.
struct State {
    retained: Retained,
    queue: Queue<Arc<str>>,
    under_way: FuturesUnordered<BoxFuture<'static, Published>>,
}

impl Link {
    /// Devices whose desired state may have changed come from `changes`; what devices say goes to `reports`.
    #[must_use]
    pub fn new(
        gateway: GatewayKey,
        fleet: SharedFleet,
        changes: mpsc::UnboundedReceiver<Arc<str>>,
        reports: mpsc::Sender<Report>,
        metrics: Metrics,
    ) -> Self {
        metrics.connected(&gateway, false);
        Self { gateway, fleet, changes, reports, metrics, ears: None }
    }

    /// Hears who is connected, too.
    #[must_use]
    pub fn with_ears(self, ears: Ears) -> Self {
        Self { ears: Some(ears), ..self }
    }

    /// Logs in.
    ///
    /// # Errors
    /// When the broker cannot be reached, or refuses.
    pub async fn begin(&self, login: &Login) -> Result<TwinSession, LinkError> {
        Ok(TwinSession::begin(login, CAPACITY, self.ears.is_some()).await?)
    }

    /// Keeps at the broker what is desired until the connection ends.
    pub async fn run(&mut self, mut session: TwinSession) -> LinkError {
        info!(gateway = %self.gateway.name, namespace = %self.gateway.namespace, "linked to the broker");
        self.tell(true);
        let Err(error) = self.serve(&mut session).await;
        self.tell(false);
        error
    }

    /// There is no login, still or since now.
    pub async fn away(&mut self) {
        let Some(ears) = &mut self.ears else { return };
        if let Some(news) = ears.connections.away(Instant::now(), Timestamp::now().as_second()) {
            ears.tell(news).await;
        }
    }

    fn tell(&self, linked: bool) {
        self.metrics.connected(&self.gateway, linked);
        self.fleet.lock().link_observed(&self.gateway, linked);
        self.fleet.wake();
    }

    async fn serve(&mut self, session: &mut TwinSession) -> Result<std::convert::Infallible, LinkError> {
        let mut state = State { retained: Retained::default(), queue: Queue::default(), under_way: FuturesUnordered::new() };
        self.gather(session, &mut state).await?;
        let anew = self.ears.as_ref().map(|ears| Arc::clone(&ears.anew));
        loop {
            let now = Instant::now();
            state.queue.advance(now);
            while state.queue.at_work() < IN_FLIGHT
                && let Some(device) = state.queue.pop()
            {
                self.start(session, &mut state, device, now);
            }
            let due = state.queue.next_due();
            tokio::select! {
                message = session.message() => self.observe(session, &mut state, &message?, false).await?,
                Some(device) = self.changes.recv() => state.queue.push(device),
                Some(published) = state.under_way.next() => self.finish(&mut state, published),
                () = notified(anew.as_deref()), if anew.is_some() => self.tell_all().await,
                () = sleep_until(due.unwrap_or(now)), if due.is_some() => {}
            }
        }
    }

    async fn tell_all(&mut self) {
        if let Some(ears) = &mut self.ears {
            let news = ears.connections.all();
            ears.tell(news).await;
        }
    }

    /// Takes what the broker retains, and then lines up all that may differ.
    async fn gather(&mut self, session: &mut TwinSession, state: &mut State) -> Result<(), LinkError> {
        if let Some(ears) = &mut self.ears {
            ears.connections.begin();
        }
        while let Ok(message) = timeout(QUIET, session.message()).await {
            self.observe(session, state, &message?, true).await?;
        }
        self.tell_all().await;
        for device in self.fleet.lock().with_desired(&self.gateway) {
            state.queue.push(device.name);
        }
        for device in state.retained.devices() {
            state.queue.push(Arc::clone(device));
        }
        Ok(())
    }

    async fn observe(&mut self, session: &TwinSession, state: &mut State, message: &Publish, gathering: bool) -> Result<(), LinkError> {
        let Some((name, leaf)) = device_and_leaf(&message.topic) else { return Ok(()) };
        let device = self.key(name.into());
        match leaf {
            "desired" => {
                state.retained.observe(name, &message.payload);
                if !gathering && !matches!(state.retained.action(name, self.fleet.lock().desired(&device)), Action::Keep(_)) {
                    state.queue.push_at(device.name, Instant::now() + CORRECTION);
                }
            }
            "reported" if message.payload.is_empty() => {}
            // Of a device that is gone; another one of that name is not to be taken for it.
            "reported" if message.retain && !self.fleet.lock().has_device(&device) => self.clear_report(session, name),
            "reported" => {
                // Of one that is too long no more is needed than shows that.
                let payload = &message.payload[..message.payload.len().min(MAX_REPORT_BYTES + 1)];
                let report = Report { device, payload: payload.into() };
                self.reports.send(report).await.map_err(|_| LinkError::Abandoned)?;
            }
            "connection" => {
                let Some(ears) = &mut self.ears else { return Ok(()) };
                if let Some(news) = ears.connections.observe(name, &message.payload, Timestamp::now().as_second())
                    && !gathering
                {
                    ears.tell(news).await;
                }
            }
            _ => {}
        }
        Ok(())
    }

    fn clear_report(&self, session: &TwinSession, device: &str) {
        let options = PublishOptions::at_least_once().retained();
        // It is tried again with the next connection.
        if let Err(error) = session.client.try_publish(reported_topic(device), Vec::new(), options) {
            debug!(gateway = %self.gateway.name, device, error = chain(&error), "failed to clear what a device that is gone reported");
        }
    }

    /// Gives the broker what it should keep for a device.
    fn start(&self, session: &TwinSession, state: &mut State, device: Arc<str>, now: Instant) {
        let key = self.key(Arc::clone(&device));
        let (wanted, exists) = {
            let fleet = self.fleet.lock();
            (fleet.desired(&key), fleet.has_device(&key))
        };
        let (generation, payload) = match state.retained.action(&device, wanted) {
            Action::Keep(generation) => {
                state.queue.done(&device);
                return self.kept(&key, generation);
            }
            Action::Publish(generation, payload) => (Some(generation), payload),
            Action::Clear => (None, Box::default()),
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
                Published { device, payload, generation, result }
            })),
            Err(error) => self.failed(state, &device, &PublishError::Queue(error), now),
        }
    }

    fn finish(&self, state: &mut State, published: Published) {
        let Published { device, payload, generation, result } = published;
        match result {
            Ok(()) => {
                self.metrics.publishes.with_label_values(&["confirmed"]).inc();
                state.retained.observe(&device, payload.as_bytes());
                state.queue.done(&device);
                self.kept(&self.key(device), generation);
            }
            Err(error) => self.failed(state, &device, &error, Instant::now()),
        }
    }

    fn failed(&self, state: &mut State, device: &Arc<str>, error: &PublishError, now: Instant) {
        self.metrics.publishes.with_label_values(&["failed"]).inc();
        let failures = state.queue.failed(device, now, rand::random());
        let (gateway, namespace) = (&self.gateway.name, &self.gateway.namespace);
        warn!(%gateway, %namespace, %device, failures, error = chain(error), "failed to publish a desired state: trying again");
    }

    fn kept(&self, device: &DeviceKey, generation: Option<i64>) {
        if let Some(generation) = generation {
            self.fleet.lock().desired_published(device, generation);
            self.fleet.wake();
        }
    }

    fn key(&self, name: Arc<str>) -> DeviceKey {
        DeviceKey { gateway: self.gateway.clone(), name }
    }
}

impl Ears {
    async fn tell(&self, news: News) {
        // Who takes it lives as long as this: both end with the lease.
        let _ = self.news.send(news).await;
    }
}

async fn notified(notify: Option<&Notify>) {
    match notify {
        Some(notify) => notify.notified().await,
        None => std::future::pending().await,
    }
}
