//! L2: subscribers that only count messages and acknowledge them. Each one is a process of its own.

use std::fmt;
use std::time::{Duration, Instant};

use anyhow::Context;
use bytes::Bytes;
use clap::ValueEnum;
use fleetwright::mqtt::connection::{ConnectSettings, PacketConnection, packets};
use fleetwright::mqtt::frame::Frame;
use fleetwright::mqtt::login::BrokerSession;
use rumqttc::{
    AckMode, AsyncClient, BrokerSessionResumePolicy, Event, Incoming, ManualAck, MqttOptions, Outgoing, PubAck, QoS, SessionMode,
};
use tokio::time::timeout_at;

use crate::parts::{TOPIC, login};

/// Client identifier, and the name of the session.
const CLIENT_ID: &str = "counter";

/// How long the broker keeps the session, in seconds: longer than a run.
const SESSION_SECONDS: u32 = 86_400;

/// How long acknowledgements are collected: the shortest time between two transactions of the worker.
const COLLECT: Duration = Duration::from_millis(4);

/// Packets per read of the client library: its maximum.
const LIBRARY_READ_PACKETS: usize = 128;

/// As in the worker, without limits on the messages.
const CONNECT_SETTINGS: ConnectSettings = ConnectSettings {
    session: BrokerSession::Persistent { expiry_seconds: SESSION_SECONDS },
    keep_alive_seconds: 0,
    receive_maximum: None,
    max_packet_bytes: None,
    read_bytes: 256 * 1024,
};

/// A subscriber that only counts and acknowledges.
#[derive(Clone, Copy, Debug, Eq, PartialEq, ValueEnum)]
pub enum Subscriber {
    /// The worker's MQTT connection; acknowledges the messages of each read
    Immediate,
    /// The worker's MQTT connection; acknowledges every 4 ms
    Collecting,
    /// The client library rumqttc with manual acknowledgements; acknowledges every 4 ms
    Rumqttc,
}

impl fmt::Display for Subscriber {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            Self::Immediate => "L2: counting subscriber",
            Self::Collecting => "L2, acknowledging every 4 ms",
            Self::Rumqttc => "L2, rumqttc with manual acknowledgements every 4 ms",
        })
    }
}

impl Subscriber {
    /// The name of the value on the command line.
    pub fn argument(self) -> String {
        self.to_possible_value().map(|value| value.get_name().to_owned()).unwrap_or_default()
    }

    /// Counts and acknowledges this number of messages. Subscribes first, if `subscribe`; otherwise the session exists already.
    pub async fn count(self, port: u16, messages: u64, subscribe: bool) -> anyhow::Result<()> {
        match self {
            Self::Immediate => count(port, messages, subscribe, Duration::ZERO).await,
            Self::Collecting => count(port, messages, subscribe, COLLECT).await,
            Self::Rumqttc => count_with_rumqttc(port, messages, subscribe).await,
        }
    }
}

/// Subscribes, and disconnects. The broker keeps the session.
pub async fn create_session(port: u16) -> anyhow::Result<()> {
    let (mut connection, _) = PacketConnection::open(&login(port, CLIENT_ID), &CONNECT_SETTINGS).await?;
    connection.subscribe(TOPIC)?;
    connection.close().await;
    Ok(())
}

async fn count(port: u16, messages: u64, subscribe: bool, collect: Duration) -> anyhow::Result<()> {
    let (mut connection, _) = PacketConnection::open(&login(port, CLIENT_ID), &CONNECT_SETTINGS).await?;
    if subscribe {
        connection.subscribe(TOPIC)?;
        connection.flush_all().await?;
    }
    let (mut counted, mut unacknowledged) = (0, Vec::new());
    let mut acknowledge_at = Instant::now() + collect;
    // The broker may have sent messages directly after the CONNACK.
    let mut block = connection.take_whole()?;
    loop {
        if let Some(block) = &block {
            take_ids(block, &mut unacknowledged)?;
        }
        let last = counted + unacknowledged.len() as u64 >= messages;
        if last || Instant::now() >= acknowledge_at {
            counted += unacknowledged.len() as u64;
            for id in unacknowledged.drain(..) {
                connection.acknowledge(id);
            }
            connection.flush_all().await?;
            acknowledge_at = Instant::now() + collect;
        }
        if last {
            return Ok(());
        }
        let readable = if unacknowledged.is_empty() {
            connection.ready(true).await?
        } else {
            timeout_at(acknowledge_at.into(), connection.ready(true)).await.unwrap_or(Ok(false))?
        };
        block = if readable { connection.read()? } else { None };
    }
}

fn take_ids(block: &Bytes, ids: &mut Vec<u16>) -> anyhow::Result<()> {
    for packet in packets(block) {
        if let Frame::Publish(message) = packet? {
            ids.push(message.packet_id);
        }
    }
    Ok(())
}

/// The fastest settings of the library. Its bounded request channel would block: the task that acknowledges is the task that reads
/// the channel. Therefore the channel has no bound; at most 65,535 messages are unacknowledged.
async fn count_with_rumqttc(port: u16, messages: u64, subscribe: bool) -> anyhow::Result<()> {
    let mut options = MqttOptions::new(CLIENT_ID, ("127.0.0.1", port));
    options.set_session_mode(SessionMode::Persistent);
    options.set_session_expiry_interval(Some(SESSION_SECONDS));
    options.set_broker_session_resume_policy(BrokerSessionResumePolicy::AllowBrokerOnly);
    options.set_ack_mode(AckMode::Manual);
    options.set_read_batch_size(LIBRARY_READ_PACKETS);
    options.set_max_request_batch(usize::from(u16::MAX));
    // The library goes through this number of slots at each write.
    options.set_outgoing_inflight_upper_limit(1);
    let (client, mut events) = AsyncClient::builder(options).unbounded().build();
    if subscribe {
        client.try_subscribe(TOPIC, QoS::AtLeastOnce)?;
    }
    let (mut counted, mut acknowledged) = (0_u64, 0_u64);
    let mut unacknowledged = Vec::new();
    let mut acknowledge_at = Instant::now() + COLLECT;
    let mut timer = std::pin::pin!(tokio::time::sleep_until(acknowledge_at.into()));
    while acknowledged < messages {
        tokio::select! {
            biased;
            event = events.poll() => match event.context("failed to poll the client library")? {
                Event::Incoming(Incoming::Publish(message)) => {
                    counted += 1;
                    unacknowledged.push(message.pkid);
                }
                Event::Outgoing(Outgoing::PubAck(_)) => acknowledged += 1,
                _ => {}
            },
            () = &mut timer, if !unacknowledged.is_empty() => {}
        }
        let last = counted == messages;
        // The clock is not read for each message.
        let check = last || timer.is_elapsed() || counted.is_multiple_of(LIBRARY_READ_PACKETS as u64);
        if check && !unacknowledged.is_empty() && (last || Instant::now() >= acknowledge_at) {
            for id in unacknowledged.drain(..) {
                client.try_manual_ack(ManualAck::PubAck(PubAck::new(id, None)))?;
            }
            acknowledge_at = Instant::now() + COLLECT;
            timer.as_mut().reset(acknowledge_at.into());
        }
    }
    Ok(())
}
