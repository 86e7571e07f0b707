//! One gateway's session: reads, hands batches over, acknowledges; comes back after every failure.
//!
//! The loop of a connection never waits for the database: reading, pings and acknowledgements go on while batches are being
//! written. Only when what it holds reaches its bound of memory does it stop reading, and the broker queues.
//! After a connection has ended, all that was read is committed before the next one begins: what the broker then sends again
//! is known to the table's key or to the ledger.

mod backoff;
mod leave;
mod pulse;
mod row;
mod store;

use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use rumqttc::mqttbytes::QoS;
use rumqttc::mqttbytes::v5::{Packet, SubscribeReasonCode};
use tokio::sync::mpsc;
use tokio::time::{sleep_until, timeout};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use self::backoff::Backoff;
use self::leave::{Leaving, Next};
use self::pulse::Pulse;
use self::store::Store;
use super::metrics::SessionMetrics;
use super::processor::Processor;
use crate::configuration::ingest::IngestGateway;
use crate::database::uri::ConnectionUri;
use crate::decode::sparkplug::rebirth;
use crate::decode::time::Time;
use crate::mqtt::connection::{Connection, ConnectionError, packets};
use crate::mqtt::frame::{Frame, Publish};
use crate::mqtt::login::Access;
use crate::runtime::error::chain;
use crate::runtime::readiness::Readiness;
use crate::sink::Sink;
use crate::sink::job::Done;
use crate::state::registry::follow::DeviceRegistry;

/// How long an orderly stop waits for the commits; less than a pod is given to end (30 s). What is not committed by then
/// stays with the broker.
const STOP_WITHIN: Duration = Duration::from_secs(20);

/// What a session needs.
pub struct Session {
    /// The broker.
    pub gateway: IngestGateway,
    /// Whom to log in as.
    pub access: Access,
    /// `<namespace>/<pipeline>/<gateway>`, and a number where the gateway has several.
    pub name: String,
    /// Its readiness check.
    pub check: String,
    /// What to subscribe to; `None`: it is no longer wanted, and is read until it is empty, and ended.
    pub filter: Option<String>,
    /// What takes messages apart.
    pub processor: Processor,
    /// The devices.
    pub registry: Arc<DeviceRegistry>,
    /// Where batches go.
    pub sink: Sink,
    /// The database, for the session's own row.
    pub uri: ConnectionUri,
    /// The most memory that its messages may hold, in bytes.
    pub budget: usize,
    /// The checks of the process.
    pub readiness: Readiness,
    /// What it counts.
    pub metrics: SessionMetrics,
    /// Ends it.
    pub shutdown: CancellationToken,
}

/// The readiness check of a session.
#[must_use]
pub fn check(session: &str) -> String {
    format!("gateway {session}")
}

impl Session {
    /// Runs until `shutdown`, until another worker has taken the session over, or until one that is not wanted has ended.
    pub async fn run(self) -> End {
        let opened = match self.open().await {
            Ok(opened) => opened,
            Err(end) => return end,
        };
        let stale: Vec<String> = opened.filters.into_iter().filter(|known| Some(known) != self.filter.as_ref()).collect();
        let store = Store::new(self.processor, self.registry.clone(), self.metrics.clone(), opened.key, opened.entries);
        let (done, committed) = mpsc::unbounded_channel();
        let running = Running {
            check: self.check,
            leaving: self.filter.is_none().then(Leaving::default),
            filter: self.filter.unwrap_or_default(),
            stale,
            store,
            done,
            committed,
            lost: CancellationToken::new(),
            gateway: self.gateway,
            access: self.access,
            registry: self.registry,
            sink: self.sink,
            uri: self.uri,
            budget: self.budget,
            readiness: self.readiness,
            metrics: self.metrics,
            shutdown: self.shutdown,
        };
        running.run().await
    }
}

/// A session that is taken over.
struct Running {
    check: String,
    /// Where it is on its way out.
    leaving: Option<Leaving>,
    filter: String,
    /// Filters that the broker may still hold.
    stale: Vec<String>,
    store: Store,
    done: mpsc::UnboundedSender<Done>,
    committed: mpsc::UnboundedReceiver<Done>,
    /// Cancelled once another worker has taken the session over.
    lost: CancellationToken,
    gateway: IngestGateway,
    access: Access,
    registry: Arc<DeviceRegistry>,
    sink: Sink,
    uri: ConnectionUri,
    budget: usize,
    readiness: Readiness,
    metrics: SessionMetrics,
    shutdown: CancellationToken,
}

impl Running {
    async fn run(mut self) -> End {
        let (lost, metrics) = (self.lost.clone(), self.metrics.clone());
        tokio::select! {
            // Nothing that is held can be stored here any more; the broker sends it to whoever has the session.
            () = lost.cancelled() => {
                metrics.end();
                End::Lost
            }
            end = self.work() => end,
        }
    }

    async fn work(&mut self) -> End {
        let mut backoff = Backoff::default();
        while !self.shutdown.is_cancelled() {
            let opened = tokio::select! {
                () = self.shutdown.cancelled() => break,
                opened = self.connect() => opened,
            };
            let ended = match opened {
                Ok((mut connection, present)) => {
                    info!(gateway = self.gateway.name, present, "logged in");
                    self.metrics.connections.inc();
                    match self.serve(&mut connection, present, &mut backoff).await {
                        Ok(End::Left) => match connection.end().await {
                            Ok(()) => return self.forget().await,
                            Err(failure) => failure,
                        },
                        Ok(end) => {
                            self.stop(connection).await;
                            return end;
                        }
                        Err(failure) => {
                            self.take_rest(&mut connection, &mut backoff).await;
                            failure
                        }
                    }
                }
                Err(failure) => failure,
            };
            let failure = chain(&ended);
            warn!(gateway = self.gateway.name, failure, "the broker's session is interrupted");
            self.readiness.fails(&self.check, failure);
            if !self.settle().await || !backoff.wait(&self.shutdown).await {
                break;
            }
            self.store.disconnected();
            self.look_for_another().await;
        }
        End::Stopped
    }

    async fn connect(&self) -> Result<(Connection, bool), ConnectionError> {
        Connection::open(&self.gateway.host, self.gateway.port, &self.access.login()?).await
    }

    /// Works a connection until it fails; `Ok` when the worker is to stop, or the session to be ended.
    async fn serve(&mut self, connection: &mut Connection, present: bool, backoff: &mut Backoff) -> Result<End, ConnectionError> {
        connection.ping()?;
        self.store.connected(present);
        match &mut self.leaving {
            Some(leaving) => leaving.begin(!self.stale.is_empty()),
            None => connection.subscribe(&self.filter)?,
        }
        if !self.stale.is_empty() {
            connection.unsubscribe(self.stale.clone())?;
        }
        let mut devices = self.registry.watch();
        let mut pulse = Pulse::new();
        if let Some(block) = connection.take_whole()? {
            self.take(&block, backoff)?;
        }
        loop {
            self.acknowledge(connection)?;
            for topic in self.store.take_rebirths() {
                connection.publish(topic, rebirth(Time::now()))?;
            }
            let now = Instant::now();
            let leave = match self.leave(now) {
                Next::End => return Ok(End::Left),
                Next::Ping => {
                    connection.ping()?;
                    self.store.fence();
                    None
                }
                Next::Wait(until) => until,
            };
            connection.flush()?;
            self.store.gauge(self.budget);
            let reads = self.store.has_room(self.budget);
            let due = self.store.due();
            let is_due = due.is_some_and(|due| due <= now);
            let next = pulse.next(reads, now);
            let wake = due.filter(|_| !is_due).into_iter().chain(leave).fold(next, Instant::min);
            tokio::select! {
                () = self.shutdown.cancelled() => return Ok(End::Stopped),
                readable = connection.ready(reads && pulse.may_read(now)) => if readable? {
                    let block = connection.read()?;
                    pulse.heard(block.as_ref().map_or(0, Bytes::len));
                    if let Some(block) = block {
                        self.take(&block, backoff)?;
                    }
                },
                Some(done) = self.committed.recv() => self.store.committed(done),
                Some(slot) = self.sink.slot(), if is_due => self.submit(slot),
                Ok(()) = devices.changed() => self.store.take_parked(),
                () = sleep_until(wake.into()) => {}
            }
            if pulse.wants_ping(Instant::now(), reads)? {
                connection.ping()?;
                self.store.pulse();
            }
        }
    }

    fn leave(&mut self, now: Instant) -> Next {
        let (idle, pings) = (self.store.is_idle(), self.store.pings());
        self.leaving.as_mut().map_or(Next::Wait(None), |leaving| leaving.next(idle, pings, now))
    }

    /// Takes the packets of a block.
    fn take(&mut self, block: &Bytes, backoff: &mut Backoff) -> Result<(), ConnectionError> {
        let mut messages = Vec::new();
        for packet in packets(block) {
            match packet? {
                Frame::Publish(publish) => messages.push(publish),
                Frame::Other(packet) => {
                    // An answer speaks of what came before it.
                    self.take_messages(block, &std::mem::take(&mut messages));
                    self.answer(*packet, backoff)?;
                }
            }
        }
        self.take_messages(block, &messages);
        Ok(())
    }

    fn take_messages(&mut self, block: &Bytes, messages: &[Publish]) {
        if let Some(leaving) = self.leaving.as_mut().filter(|_| !messages.is_empty()) {
            leaving.heard();
        }
        self.store.take(block, messages);
    }

    /// Takes what had come before the connection failed.
    async fn take_rest(&mut self, connection: &mut Connection, backoff: &mut Backoff) {
        for block in connection.read_rest().await {
            // What the broker had answered is of no use any more, and what is malformed is not acknowledged.
            let _ = self.take(&block, backoff);
        }
    }

    fn answer(&mut self, packet: Packet, backoff: &mut Backoff) -> Result<(), ConnectionError> {
        match packet {
            Packet::PingResp => {
                self.store.fence_answered();
                self.leaving.iter_mut().for_each(Leaving::answered);
            }
            // What comes at most once may be lost on its way.
            Packet::SubAck(answer)
                if answer.return_codes.iter().all(|code| matches!(code, SubscribeReasonCode::Success(QoS::AtLeastOnce))) =>
            {
                *backoff = Backoff::default();
                self.readiness.holds(&self.check);
            }
            Packet::SubAck(answer) => {
                return Err(ConnectionError::Subscribe { filter: self.filter.clone(), reasons: format!("{:?}", answer.return_codes) });
            }
            Packet::UnsubAck(_) => match &mut self.leaving {
                Some(leaving) => {
                    *backoff = Backoff::default();
                    leaving.unsubscribed();
                }
                None => self.forget_stale(),
            },
            Packet::Disconnect(goodbye) => return Err(ConnectionError::End { reason: goodbye.reason_code }),
            _ => {}
        }
        Ok(())
    }

    fn acknowledge(&mut self, connection: &mut Connection) -> Result<(), ConnectionError> {
        while let Some(packet_id) = self.store.next_acknowledgement() {
            connection.acknowledge(packet_id);
        }
        if self.store.wants_fence() {
            connection.ping()?;
            self.store.fence();
        }
        Ok(())
    }

    fn submit(&mut self, slot: tokio::sync::OwnedSemaphorePermit) {
        if let Some(job) = self.store.next_job(slot, self.done.clone(), self.lost.clone())
            && !self.sink.submit(job)
        {
            // Each batch has its slot, and the writers live as long as this sink.
            warn!(gateway = self.gateway.name, "nobody writes any more");
            self.shutdown.cancel();
        }
    }

    /// Commits all that was read. `false` when the worker is to stop first.
    async fn settle(&mut self) -> bool {
        let mut devices = self.registry.watch();
        while !self.store.is_settled() {
            self.store.gauge(self.budget);
            let due = self.store.due().is_some();
            tokio::select! {
                () = self.shutdown.cancelled() => return false,
                Some(done) = self.committed.recv() => self.store.committed(done),
                Some(slot) = self.sink.slot(), if due => self.submit(slot),
                Ok(()) = devices.changed() => self.store.take_parked(),
            }
        }
        true
    }

    /// Commits and acknowledges what can be in a bounded time, and takes leave so that the broker keeps the session.
    async fn stop(&mut self, mut connection: Connection) {
        // They are not committed, and so the broker keeps them.
        self.store.drop_parked();
        let commits = async {
            while !self.store.is_settled() {
                let due = self.store.due().is_some();
                tokio::select! {
                    Some(done) = self.committed.recv() => self.store.committed(done),
                    Some(slot) = self.sink.slot(), if due => self.submit(slot),
                }
            }
        };
        if timeout(STOP_WITHIN, commits).await.is_err() {
            warn!(gateway = self.gateway.name, "stopping before all is committed; the broker keeps the rest");
        }
        if self.acknowledge(&mut connection).is_ok() {
            connection.close().await;
        }
    }
}

/// How a session ended.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum End {
    /// The worker was told to stop.
    Stopped,
    /// Another worker has taken it over.
    Lost,
    /// It was not wanted any more, and is no more.
    Left,
}
