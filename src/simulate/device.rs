//! One simulated device: publishes on its schedule, keeps what is not acknowledged, and sends it again after every failure.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use futures::{SinkExt, StreamExt};
use rand::RngExt;
use rumqttc::mqttbytes::QoS;
use rumqttc::mqttbytes::v5::{Disconnect, DisconnectReasonCode, Packet, Publish};
use tokio::sync::watch;
use tokio::time::{sleep, sleep_until, timeout};
use tokio_util::sync::CancellationToken;
use tracing::{debug, warn};

use super::connection::{ConnectError, Connection, KEEP_ALIVE_SECONDS};
use super::fleet::{Access, AccessError};
use super::machine::{Machine, payload};
use super::report::Tally;
use crate::runtime::error::chain;

/// The most messages of one device that are not acknowledged. One device alone then still reaches some 10,000 messages a second.
const WINDOW: usize = 64;

/// The shortest and the longest wait before the next login; doubled at each failure. The longest is about as long as a
/// credential takes to reach a broker that was down.
const BACKOFF: (Duration, Duration) = (Duration::from_millis(200), Duration::from_secs(10));

/// How long the last acknowledgements are waited for at the end.
const FINISH_WITHIN: Duration = Duration::from_secs(10);

/// How often a quiet connection is kept alive.
const PING_INTERVAL: Duration = Duration::from_secs(KEEP_ALIVE_SECONDS as u64 / 2);

/// What a device does.
#[derive(Clone, Debug)]
pub struct Plan {
    /// Time between two messages of one device; changes with the size of the fleet.
    pub interval: watch::Receiver<Duration>,
    /// Readings in a message.
    pub readings: u32,
}

/// A device.
pub struct Device {
    name: String,
    topic: String,
    machine: Machine,
    plan: Plan,
    access: Arc<Access>,
    tally: Tally,
    /// What is not acknowledged, in order; the packet identifier of the first is `first_id`.
    waiting: VecDeque<Message>,
    next_id: u16,
}

/// A message on its way.
#[derive(Clone, Debug)]
struct Message {
    id: u16,
    payload: Bytes,
    readings: u64,
    first: i64,
    last: i64,
}

#[derive(Debug, thiserror::Error)]
enum DeviceError {
    #[error(transparent)]
    Access(#[from] AccessError),
    #[error(transparent)]
    Connect(#[from] ConnectError),
    #[error("failed to talk to the broker")]
    Talk(#[from] rumqttc::mqttbytes::Error),
    #[error("the broker ended the connection")]
    End,
}

impl Device {
    /// A device that has not connected yet.
    #[must_use]
    pub fn new(name: &str, plan: Plan, access: Arc<Access>, tally: Tally) -> Self {
        Self {
            topic: format!("devices/{name}/telemetry"),
            machine: Machine::new(name),
            name: name.to_owned(),
            plan,
            access,
            tally,
            waiting: VecDeque::new(),
            next_id: 1,
        }
    }

    /// Plays the device until `stop`, then waits a while for what is not acknowledged.
    pub async fn run(mut self, stop: CancellationToken) {
        let mut backoff = BACKOFF.0;
        while !stop.is_cancelled() {
            let connected = tokio::select! {
                () = stop.cancelled() => break,
                connected = self.connect() => connected,
            };
            let failure = match connected {
                Ok(connection) => {
                    backoff = BACKOFF.0;
                    self.tally.connected();
                    let ended = self.publish(connection, &stop).await;
                    self.tally.disconnected();
                    match ended {
                        Ok(()) => break,
                        Err(failure) => failure,
                    }
                }
                Err(failure) => failure,
            };
            debug!(device = self.name, failure = chain(&failure), "interrupted");
            if backoff == BACKOFF.1 {
                warn!(device = self.name, failure = chain(&failure), "cannot connect");
            }
            let jitter = rand::rng().random_range(0.5..1.0);
            tokio::select! {
                () = stop.cancelled() => break,
                () = sleep(backoff.mul_f64(jitter)) => {}
            }
            backoff = (backoff * 2).min(BACKOFF.1);
        }
        let left: u64 = self.waiting.iter().map(|message| message.readings).sum();
        if left > 0 {
            self.tally.give_up(&self.name, left);
        }
    }

    async fn connect(&self) -> Result<Connection, DeviceError> {
        // Read anew at each login: the password may have changed, or come only now.
        let login = self.access.login(&self.name).await?;
        Ok(login.endpoint.connect(&login.username, &login.password).await?)
    }

    async fn publish(&mut self, mut connection: Connection, stop: &CancellationToken) -> Result<(), DeviceError> {
        for message in self.waiting.clone() {
            connection.feed(self.packet(&message)).await?;
        }
        connection.flush().await?;
        let mut interval = *self.plan.interval.borrow_and_update();
        // A fleet does not speak in unison.
        let mut next = Instant::now() + interval.mul_f64(rand::rng().random_range(0.0..1.0));
        let mut ping = Instant::now() + PING_INTERVAL;
        loop {
            tokio::select! {
                () = stop.cancelled() => return self.finish(connection).await,
                packet = connection.next() => self.take(packet.ok_or(DeviceError::End)??)?,
                Ok(()) = self.plan.interval.changed() => {
                    interval = *self.plan.interval.borrow_and_update();
                    next = Instant::now() + interval.mul_f64(rand::rng().random_range(0.0..1.0));
                }
                () = sleep_until(ping.into()) => {
                    connection.send(Packet::PingReq).await?;
                    ping = Instant::now() + PING_INTERVAL;
                }
                () = sleep_until(next.into()), if self.waiting.len() < WINDOW => {
                    let now = Instant::now();
                    // What a slow broker or a coarse clock held up is made up for, and no more than the window takes.
                    while next <= now && self.waiting.len() < WINDOW {
                        let message = self.next_message(interval);
                        connection.feed(self.packet(&message)).await?;
                        self.waiting.push_back(message);
                        next += interval;
                    }
                    next = next.max(now);
                    connection.flush().await?;
                    ping = now + PING_INTERVAL;
                }
            }
        }
    }

    fn next_message(&mut self, interval: Duration) -> Message {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let now = i64::try_from(now.as_millis()).unwrap_or(i64::MAX);
        let count = i64::from(self.plan.readings);
        // The readings of a message were taken since the last one.
        let step = i64::try_from(interval.as_millis()).unwrap_or(0) / count.max(1);
        let readings: Vec<_> = (1..=count).map(|index| self.machine.read(now - step * (count - index))).collect();
        let id = self.next_id;
        self.next_id = self.next_id.checked_add(1).unwrap_or(1);
        Message {
            id,
            payload: payload(&readings).into(),
            readings: readings.len() as u64,
            first: readings.first().map_or(now, |reading| reading.ts),
            last: readings.last().map_or(now, |reading| reading.ts),
        }
    }

    fn packet(&self, message: &Message) -> Packet {
        let mut publish = Publish::new(self.topic.as_str(), QoS::AtLeastOnce, message.payload.clone(), None);
        publish.pkid = message.id;
        Packet::Publish(publish)
    }

    fn take(&mut self, packet: Packet) -> Result<(), DeviceError> {
        match packet {
            Packet::PubAck(answer) => {
                // Reason codes from 0x80 on refuse the message (MQTT 5.0, 2.4): it stays, and is sent again on the next connection.
                if answer.reason as u8 >= 0x80 {
                    return Err(DeviceError::End);
                }
                if let Some(index) = self.waiting.iter().position(|message| message.id == answer.pkid)
                    && let Some(message) = self.waiting.remove(index)
                {
                    self.tally.acknowledge(&self.name, message.readings, message.first, message.last);
                }
                Ok(())
            }
            Packet::Disconnect(_) => Err(DeviceError::End),
            _ => Ok(()),
        }
    }

    /// Sends nothing new, waits for what is not acknowledged, and takes leave.
    async fn finish(&mut self, mut connection: Connection) -> Result<(), DeviceError> {
        let acknowledgements = async {
            while !self.waiting.is_empty() {
                let packet = connection.next().await.ok_or(DeviceError::End)??;
                self.take(packet)?;
            }
            Ok::<(), DeviceError>(())
        };
        // What does not come in time is counted as not acknowledged.
        if let Ok(ended) = timeout(FINISH_WITHIN, acknowledgements).await {
            ended?;
        }
        let goodbye = Packet::Disconnect(Disconnect::new(DisconnectReasonCode::NormalDisconnection));
        timeout(FINISH_WITHIN, connection.send(goodbye)).await.map_err(|_| DeviceError::End)??;
        Ok(())
    }
}
