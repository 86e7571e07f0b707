//! One simulated device: publishes at its interval, and sends unacknowledged messages again after each reconnect.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use rand::RngExt;
use rumqttc::mqttbytes::QoS;
use rumqttc::mqttbytes::v5::{Packet, Publish};
use tokio::sync::watch;
use tokio::time::{sleep_until, timeout};
use tokio_util::sync::CancellationToken;
use tracing::{debug, warn};

use super::access::{AccessError, DeviceAccess};
use super::machine::{Machine, payload};
use super::report::Tally;
use crate::mqtt::connection::{ConnectSettings, PacketConnection, packets};
use crate::mqtt::error::ConnectionError;
use crate::mqtt::frame::Frame;
use crate::mqtt::login::BrokerSession;
use crate::runtime::backoff::Backoff;
use crate::runtime::error::chain;

/// The maximum number of unacknowledged messages of a device. A single device reaches about 10,000 messages per second with it.
const MAX_UNACKNOWLEDGED: usize = 64;

/// The delays before the next login. The maximum is about the time that a credential takes to reach a restarted broker.
const INITIAL_RETRY_DELAY: Duration = Duration::from_millis(200);
const MAX_RETRY_DELAY: Duration = Duration::from_secs(10);

/// The number of failed logins after which the delay has its maximum and the failure is logged as a warning.
const WARN_AFTER_FAILURES: u32 = 6;

/// How long the end of the simulation waits for acknowledgements.
const MAX_FINISH: Duration = Duration::from_secs(10);

/// The keep alive interval of a device, in seconds.
const KEEP_ALIVE_SECONDS: u16 = 60;

/// How often a PINGREQ is sent on an idle connection.
const PING_INTERVAL: Duration = Duration::from_secs(KEEP_ALIVE_SECONDS as u64 / 2);

/// A device subscribes to nothing, so a broker sends only small packets. The read buffer is small because there are many devices.
const CONNECT_SETTINGS: ConnectSettings = ConnectSettings {
    session: BrokerSession::Clean,
    keep_alive_seconds: KEEP_ALIVE_SECONDS,
    receive_maximum: None,
    max_packet_bytes: Some(64 * 1024),
    read_bytes: 1024,
};

/// The schedule of a device.
#[derive(Clone, Debug)]
pub struct DevicePlan {
    /// The interval between two messages. It changes with the number of devices.
    pub interval: watch::Receiver<Duration>,
    /// Readings per message.
    pub readings: u32,
}

/// A device.
pub struct SimulatedDevice {
    name: String,
    topic: String,
    machine: Machine,
    plan: DevicePlan,
    access: Arc<DeviceAccess>,
    tally: Tally,
    /// The unacknowledged messages, in order.
    unacknowledged: VecDeque<Message>,
    next_id: u16,
}

/// A published message.
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
    Connection(#[from] ConnectionError),
    #[error("failed to wait for the broker")]
    Io(#[from] std::io::Error),
    #[error("the broker refused a message: {reason}")]
    Refused { reason: String },
    #[error("failed to finish within {} s", MAX_FINISH.as_secs())]
    Finish,
}

impl SimulatedDevice {
    /// Creates a device without a connection.
    #[must_use]
    pub fn new(name: &str, plan: DevicePlan, access: Arc<DeviceAccess>, tally: Tally) -> Self {
        Self {
            topic: format!("devices/{name}/telemetry"),
            machine: Machine::new(name),
            name: name.to_owned(),
            plan,
            access,
            tally,
            unacknowledged: VecDeque::new(),
            next_id: 1,
        }
    }

    /// Simulates the device until `stop`, then waits a bounded time for acknowledgements.
    pub async fn run(mut self, stop: CancellationToken) {
        let mut backoff = Backoff::new(INITIAL_RETRY_DELAY, MAX_RETRY_DELAY);
        let mut failures = 0_u32;
        while !stop.is_cancelled() {
            let connected = tokio::select! {
                () = stop.cancelled() => break,
                connected = self.connect() => connected,
            };
            let failure = match connected {
                Ok(connection) => {
                    backoff.reset();
                    failures = 0;
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
            failures = failures.saturating_add(1);
            if failures > WARN_AFTER_FAILURES {
                warn!(device = self.name, failure = chain(&failure), "failed to connect: retrying");
            } else {
                debug!(device = self.name, failure = chain(&failure), "lost the connection: reconnecting");
            }
            if stop.run_until_cancelled(backoff.wait()).await.is_none() {
                break;
            }
        }
        let left: u64 = self.unacknowledged.iter().map(|message| message.readings).sum();
        if left > 0 {
            self.tally.give_up(&self.name, left);
        }
    }

    async fn connect(&self) -> Result<PacketConnection, DeviceError> {
        // Read at each login: the password may be new or changed.
        let login = self.access.login(&self.name).await?;
        Ok(PacketConnection::open(&login, &CONNECT_SETTINGS).await?.0)
    }

    async fn publish(&mut self, mut connection: PacketConnection, stop: &CancellationToken) -> Result<(), DeviceError> {
        for message in &self.unacknowledged {
            connection.put(&self.packet(message))?;
        }
        let mut interval = *self.plan.interval.borrow_and_update();
        // A random phase distributes the load of a fleet.
        let mut next = Instant::now() + interval.mul_f64(rand::rng().random_range(0.0..1.0));
        let mut ping = Instant::now() + PING_INTERVAL;
        loop {
            connection.flush()?;
            tokio::select! {
                () = stop.cancelled() => return self.finish(connection).await,
                readable = connection.ready(true) => if readable? {
                    self.read(&mut connection)?;
                },
                Ok(()) = self.plan.interval.changed() => {
                    interval = *self.plan.interval.borrow_and_update();
                    next = Instant::now() + interval.mul_f64(rand::rng().random_range(0.0..1.0));
                }
                () = sleep_until(ping.into()) => {
                    connection.ping()?;
                    ping = Instant::now() + PING_INTERVAL;
                }
                () = sleep_until(next.into()), if self.unacknowledged.len() < MAX_UNACKNOWLEDGED => {
                    let now = Instant::now();
                    // Messages that a slow broker or a coarse timer delayed are sent now, up to the maximum.
                    while next <= now && self.unacknowledged.len() < MAX_UNACKNOWLEDGED {
                        let message = self.next_message(interval);
                        connection.put(&self.packet(&message))?;
                        self.unacknowledged.push_back(message);
                        next += interval;
                    }
                    next = next.max(now);
                    ping = now + PING_INTERVAL;
                }
            }
        }
    }

    /// Reads once, and takes the packets.
    fn read(&mut self, connection: &mut PacketConnection) -> Result<(), DeviceError> {
        if let Some(block) = connection.read()? {
            for packet in packets(&block) {
                if let Frame::Other(packet) = packet? {
                    self.take(&packet)?;
                }
            }
        }
        Ok(())
    }

    fn next_message(&mut self, interval: Duration) -> Message {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let now = i64::try_from(now.as_millis()).unwrap_or(i64::MAX);
        let count = i64::from(self.plan.readings);
        // The readings of a message are distributed over the interval before it.
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

    fn take(&mut self, packet: &Packet) -> Result<(), DeviceError> {
        match packet {
            Packet::PubAck(answer) => {
                // Reason codes from 0x80 refuse the message (MQTT 5.0, 2.4). It is sent again on the next connection.
                if answer.reason as u8 >= 0x80 {
                    return Err(DeviceError::Refused { reason: format!("{:?}", answer.reason) });
                }
                if let Some(index) = self.unacknowledged.iter().position(|message| message.id == answer.pkid)
                    && let Some(message) = self.unacknowledged.remove(index)
                {
                    self.tally.acknowledge(&self.name, message.readings, message.first, message.last);
                }
                Ok(())
            }
            Packet::Disconnect(disconnect) => Err(ConnectionError::Disconnected { reason: disconnect.reason_code }.into()),
            _ => Ok(()),
        }
    }

    /// Waits for acknowledgements without new publishes, and disconnects.
    async fn finish(&mut self, mut connection: PacketConnection) -> Result<(), DeviceError> {
        let acknowledgements = async {
            while !self.unacknowledged.is_empty() {
                connection.flush()?;
                if connection.ready(true).await? {
                    self.read(&mut connection)?;
                }
            }
            Ok::<(), DeviceError>(())
        };
        // Messages without an acknowledgement in time are counted as unacknowledged.
        if let Ok(ended) = timeout(MAX_FINISH, acknowledgements).await {
            ended?;
        }
        timeout(MAX_FINISH, connection.close()).await.map_err(|_| DeviceError::Finish)
    }
}
