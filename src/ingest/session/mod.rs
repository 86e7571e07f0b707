//! The session with one gateway's broker: reads messages, submits batches, acknowledges committed messages, and reconnects after a failure.
//!
//! The loop of a connection never waits for the database: it reads, sends PINGREQs and acknowledges while batches are written. It
//! stops reading only if the messages that it holds reach their memory limit; the broker queues then.
//! After a connection has ended, everything that was read is committed before the next connection begins. Messages that the broker
//! sends again are recognised by the key of the table or by the record of acknowledgements.

mod drain;
mod in_flight;
mod keep_alive;
mod session_record;
mod settle;

use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use rumqttc::mqttbytes::QoS;
use rumqttc::mqttbytes::v5::{Packet, SubscribeReasonCode};
use tokio::sync::mpsc;
use tokio::time::sleep_until;
use tokio_util::sync::CancellationToken;
use tracing::{debug, info, warn};

use self::drain::{Drain, DrainStep};
use self::in_flight::InFlight;
use self::keep_alive::{KEEP_ALIVE_SECONDS, KeepAlive};
use super::broker_login::BrokerLogin;
use super::metrics::SessionMetrics;
use super::processor::Processor;
use crate::configuration::ingest::IngestGateway;
use crate::database::uri::ConnectionUri;
use crate::decode::sparkplug::rebirth;
use crate::decode::time::Time;
use crate::mqtt::connection::{ConnectSettings, PacketConnection, packets};
use crate::mqtt::error::ConnectionError;
use crate::mqtt::frame::{Frame, Publish};
use crate::runtime::backoff::Backoff;
use crate::runtime::error::chain;
use crate::runtime::readiness::Readiness;
use crate::sink::Sink;
use crate::sink::job::Finished;
use crate::state::registry::follow::DeviceRegistry;

/// The delays before the next attempt to reach the broker or the database.
const INITIAL_RETRY_DELAY: Duration = Duration::from_millis(100);
const MAX_RETRY_DELAY: Duration = Duration::from_secs(5);

/// The maximum number of unacknowledged messages (receive maximum: MQTT 5.0, 3.1.2.11.3). It is nearly the number of packet
/// identifiers, because the worker limits the messages by memory. Mosquitto 2.1 treats 65,535 as no maximum
/// (<https://github.com/eclipse-mosquitto/mosquitto/issues/3579>).
const RECEIVE_MAXIMUM: u16 = 65_534;

/// The size of a read, in bytes. Larger reads cost memory and save no CPU time.
const READ_BYTES: usize = 64 * 1024;

fn retry_backoff() -> Backoff {
    Backoff::new(INITIAL_RETRY_DELAY, MAX_RETRY_DELAY)
}

/// The inputs of a session.
pub struct IngestSession {
    /// The broker.
    pub gateway: IngestGateway,
    /// The login at the broker.
    pub login: BrokerLogin,
    /// Identity of the cluster.
    pub cluster: String,
    /// `<namespace>/<pipeline>/<gateway>`, followed by a number if the gateway has several sessions.
    pub name: String,
    /// The name of its readiness check.
    pub check: String,
    /// The subscription. `None`: the session is no longer configured; it is drained and ended.
    pub filter: Option<String>,
    /// Processes messages.
    pub processor: Processor,
    /// The devices.
    pub registry: Arc<DeviceRegistry>,
    /// Writes batches.
    pub sink: Sink,
    /// The database, for the session's record.
    pub uri: ConnectionUri,
    /// The maximum memory of its messages, in bytes.
    pub max_bytes: usize,
    /// The readiness checks of the process.
    pub readiness: Readiness,
    /// The metrics of the session.
    pub metrics: SessionMetrics,
    /// Ends the session.
    pub shutdown: CancellationToken,
}

/// The name of the readiness check of a session.
#[must_use]
pub fn check(session: &str) -> String {
    format!("gateway {session}")
}

impl IngestSession {
    /// Runs until `shutdown`, until another worker claims the session, or until a session that is no longer configured has ended.
    pub async fn run(self) -> SessionEnd {
        let opened = match self.open().await {
            Ok(opened) => opened,
            Err(end) => return end,
        };
        let stale: Vec<String> = opened.filters.into_iter().filter(|known| Some(known) != self.filter.as_ref()).collect();
        let in_flight =
            InFlight::new(self.processor, self.registry.clone(), self.metrics.clone(), opened.key, opened.entries, self.max_bytes);
        let (done, finished) = mpsc::unbounded_channel();
        let running = RunningSession {
            check: self.check,
            drain: self.filter.is_none().then(Drain::default),
            filter: self.filter.unwrap_or_default(),
            stale,
            in_flight,
            done,
            finished,
            lost: CancellationToken::new(),
            gateway: self.gateway,
            login: self.login,
            registry: self.registry,
            sink: self.sink,
            uri: self.uri,
            readiness: self.readiness,
            metrics: self.metrics,
            shutdown: self.shutdown,
        };
        running.run().await
    }
}

/// A session that this worker has claimed.
struct RunningSession {
    check: String,
    /// The drain of a session that is no longer configured.
    drain: Option<Drain>,
    filter: String,
    /// Subscriptions that the broker may still hold.
    stale: Vec<String>,
    in_flight: InFlight,
    done: mpsc::UnboundedSender<Finished>,
    finished: mpsc::UnboundedReceiver<Finished>,
    /// Cancelled when another worker has claimed the session.
    lost: CancellationToken,
    gateway: IngestGateway,
    login: BrokerLogin,
    registry: Arc<DeviceRegistry>,
    sink: Sink,
    uri: ConnectionUri,
    readiness: Readiness,
    metrics: SessionMetrics,
    shutdown: CancellationToken,
}

impl RunningSession {
    async fn run(mut self) -> SessionEnd {
        let (lost, metrics) = (self.lost.clone(), self.metrics.clone());
        tokio::select! {
            // This worker can no longer commit. The broker sends the messages to the worker that has claimed the session.
            () = lost.cancelled() => {
                metrics.end();
                SessionEnd::Lost
            }
            end = self.work() => end,
        }
    }

    async fn work(&mut self) -> SessionEnd {
        let mut backoff = retry_backoff();
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
                        Ok(SessionEnd::Drained) => match connection.end_session().await {
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
            warn!(gateway = self.gateway.name, failure, "lost the connection to the broker: reconnecting");
            self.readiness.fails(&self.check, failure);
            if !self.settle().await || self.shutdown.run_until_cancelled(backoff.wait()).await.is_none() {
                break;
            }
            self.in_flight.disconnected();
            self.check_claim().await;
        }
        SessionEnd::Stopped
    }

    async fn connect(&self) -> Result<(PacketConnection, bool), ConnectionError> {
        let settings = ConnectSettings {
            session: self.login.broker_session(),
            keep_alive_seconds: KEEP_ALIVE_SECONDS,
            receive_maximum: Some(RECEIVE_MAXIMUM),
            max_packet_bytes: self.login.max_packet_bytes(),
            read_bytes: READ_BYTES,
        };
        PacketConnection::open(&self.login.read()?, &settings).await
    }

    /// Serves a connection until it fails. `Ok`: the worker stops, or the session is drained.
    async fn serve(
        &mut self,
        connection: &mut PacketConnection,
        present: bool,
        backoff: &mut Backoff,
    ) -> Result<SessionEnd, ConnectionError> {
        connection.ping()?;
        self.in_flight.connected(present);
        match &mut self.drain {
            Some(drain) => drain.begin(!self.stale.is_empty()),
            None => connection.subscribe(&self.filter)?,
        }
        if !self.stale.is_empty() {
            connection.unsubscribe(self.stale.clone())?;
        }
        let mut devices = self.registry.watch();
        let mut keep_alive = KeepAlive::new();
        if let Some(block) = connection.take_whole()? {
            self.take(&block, backoff)?;
        }
        loop {
            self.acknowledge(connection)?;
            for topic in self.in_flight.take_rebirths() {
                connection.publish(topic, rebirth(Time::now()))?;
            }
            let now = Instant::now();
            let drained = match self.next_drain_step(now) {
                DrainStep::End => return Ok(SessionEnd::Drained),
                DrainStep::Ping => {
                    connection.ping()?;
                    self.in_flight.fence();
                    None
                }
                DrainStep::Wait(until) => until,
            };
            connection.flush()?;
            self.in_flight.update_gauges();
            let reads = self.in_flight.has_room();
            let due = self.in_flight.due();
            let is_due = due.is_some_and(|due| due <= now);
            let next = keep_alive.next(reads, now);
            let wake = due.filter(|_| !is_due).into_iter().chain(drained).fold(next, Instant::min);
            tokio::select! {
                () = self.shutdown.cancelled() => return Ok(SessionEnd::Stopped),
                readable = connection.ready(reads && keep_alive.may_read(now)) => if readable? {
                    let block = connection.read()?;
                    keep_alive.received(block.as_ref().map_or(0, Bytes::len));
                    if let Some(block) = block {
                        self.take(&block, backoff)?;
                    }
                },
                Some(finished) = self.finished.recv() => self.in_flight.finished(finished),
                Some(slot) = self.sink.slot(), if is_due => self.submit(slot),
                Ok(()) = devices.changed() => self.in_flight.take_parked(),
                () = sleep_until(wake.into()) => {}
            }
            if keep_alive.wants_ping(Instant::now(), reads)? {
                connection.ping()?;
                self.in_flight.regular_fence();
            }
        }
    }

    fn next_drain_step(&mut self, now: Instant) -> DrainStep {
        let (idle, pings) = (self.in_flight.is_idle(), self.in_flight.pings());
        self.drain.as_mut().map_or(DrainStep::Wait(None), |drain| drain.next(idle, pings, now))
    }

    /// Takes the packets of a block.
    fn take(&mut self, block: &Bytes, backoff: &mut Backoff) -> Result<(), ConnectionError> {
        let mut messages = Vec::new();
        for packet in packets(block) {
            match packet? {
                Frame::Publish(publish) => messages.push(publish),
                Frame::Other(packet) => {
                    // An answer refers to the packets before it.
                    self.take_messages(block, &std::mem::take(&mut messages));
                    self.take_answer(*packet, backoff)?;
                }
            }
        }
        self.take_messages(block, &messages);
        Ok(())
    }

    fn take_messages(&mut self, block: &Bytes, messages: &[Publish]) {
        if let Some(drain) = self.drain.as_mut().filter(|_| !messages.is_empty()) {
            drain.received();
        }
        self.in_flight.take(block, messages);
    }

    /// Takes the packets that arrived before the connection failed.
    async fn take_rest(&mut self, connection: &mut PacketConnection, backoff: &mut Backoff) {
        for block in connection.read_rest().await {
            if let Err(failure) = self.take(&block, backoff) {
                // The connection has failed already. A malformed packet is not acknowledged.
                debug!(gateway = self.gateway.name, failure = chain(&failure), "ignored packets of a lost connection");
            }
        }
    }

    fn take_answer(&mut self, packet: Packet, backoff: &mut Backoff) -> Result<(), ConnectionError> {
        match packet {
            Packet::PingResp => {
                self.in_flight.fence_answered();
                self.drain.iter_mut().for_each(Drain::ping_answered);
            }
            // A subscription at QoS 0 could lose messages.
            Packet::SubAck(answer)
                if answer.return_codes.iter().all(|code| matches!(code, SubscribeReasonCode::Success(QoS::AtLeastOnce))) =>
            {
                backoff.reset();
                self.readiness.holds(&self.check);
            }
            Packet::SubAck(answer) => {
                return Err(ConnectionError::Subscribe { filter: self.filter.clone(), reasons: format!("{:?}", answer.return_codes) });
            }
            Packet::UnsubAck(_) => match &mut self.drain {
                Some(drain) => {
                    backoff.reset();
                    drain.unsubscribed();
                }
                None => self.forget_stale(),
            },
            Packet::Disconnect(disconnect) => return Err(ConnectionError::Disconnected { reason: disconnect.reason_code }),
            _ => {}
        }
        Ok(())
    }

    fn acknowledge(&mut self, connection: &mut PacketConnection) -> Result<(), ConnectionError> {
        while let Some(packet_id) = self.in_flight.next_acknowledgement() {
            connection.acknowledge(packet_id);
        }
        if self.in_flight.wants_fence() {
            connection.ping()?;
            self.in_flight.fence();
        }
        Ok(())
    }

    fn submit(&mut self, slot: tokio::sync::OwnedSemaphorePermit) {
        if let Some(job) = self.in_flight.next_job(slot, self.done.clone(), self.lost.clone())
            && !self.sink.submit(job)
        {
            // Each batch has a slot, and the writers live as long as this sink.
            warn!(gateway = self.gateway.name, "the database writers have stopped: stopping the worker");
            self.shutdown.cancel();
        }
    }
}

/// Why a session ended.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum SessionEnd {
    /// The worker stops.
    Stopped,
    /// Another worker has claimed the session.
    Lost,
    /// The session was no longer configured, and has been drained and ended.
    Drained,
}
