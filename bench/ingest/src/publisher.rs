//! The load generator: an MQTT client that publishes with a window of unacknowledged messages.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::bail;
use bytes::Bytes;
use fleetwright::mqtt::connection::{ConnectSettings, PacketConnection, packets};
use fleetwright::mqtt::frame::Frame;
use fleetwright::mqtt::login::BrokerSession;
use rumqttc::mqttbytes::v5::{Packet, Publish};

use crate::parts::{login, run_client};

/// Maximum number of unacknowledged messages: enough that the broker never waits, and few enough that it need not queue.
const MAX_UNACKNOWLEDGED: u64 = 1_000;

/// Maximum size of the payloads in one write, in bytes.
const MAX_WRITE_BYTES: usize = 65_536;

/// Pause between two checks of a paced load: short compared with the latencies in D.
const PACE_INTERVAL: Duration = Duration::from_micros(200);

/// Delay before the next login in E. The broker restarts in about a second.
const RECONNECT_DELAY: Duration = Duration::from_millis(20);

const CONNECT_SETTINGS: ConnectSettings = ConnectSettings {
    session: BrokerSession::Clean,
    keep_alive_seconds: 0,
    receive_maximum: None,
    max_packet_bytes: None,
    // The PUBACKs of many reads.
    read_bytes: 65_536,
};

/// A load: messages with the packet identifiers 1, 2, and so on.
pub type Load = Box<dyn Iterator<Item = Publish> + Send>;

/// Publishes a load, at this rate (messages per second) if there is one. Returns when all messages are acknowledged.
pub async fn publish(port: u16, load: Load, rate: Option<f64>) -> anyhow::Result<()> {
    run_client(move || publish_all(port, load, rate)).await
}

async fn publish_all(port: u16, load: Load, rate: Option<f64>) -> anyhow::Result<()> {
    let (mut connection, _) = PacketConnection::open(&login(port, "loader"), &CONNECT_SETTINGS).await?;
    let (mut sent, mut acknowledged) = (0_u64, 0_u64);
    let started = Instant::now();
    let mut load = load.peekable();
    while load.peek().is_some() || acknowledged < sent {
        #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a number of messages")]
        let allowed = rate.map_or(u64::MAX, |rate| (rate * started.elapsed().as_secs_f64()) as u64 + 1);
        let mut bytes = 0;
        while sent < allowed.min(acknowledged + MAX_UNACKNOWLEDGED) && bytes < MAX_WRITE_BYTES {
            let Some(message) = load.next() else { break };
            bytes += message.payload.len();
            connection.put(&Packet::Publish(message))?;
            sent += 1;
        }
        connection.flush_all().await?;
        if rate.is_some() && acknowledged == sent && load.peek().is_some() {
            // The client has this thread to itself. The timers of tokio have a resolution of one millisecond.
            std::thread::sleep(PACE_INTERVAL);
        } else if acknowledged < sent {
            acknowledged += read_acknowledgements(&mut connection).await?;
        }
    }
    connection.close().await;
    Ok(())
}

/// Waits for PUBACKs, and returns their number.
async fn read_acknowledgements(connection: &mut PacketConnection) -> anyhow::Result<u64> {
    loop {
        if connection.ready(true).await?
            && let Some(block) = connection.read()?
        {
            return count_acknowledgements(&block);
        }
    }
}

fn count_acknowledgements(block: &Bytes) -> anyhow::Result<u64> {
    let mut count = 0;
    for packet in packets(block) {
        match packet? {
            Frame::Other(packet) if matches!(*packet, Packet::PubAck(_)) => count += 1,
            other => bail!("expected a PUBACK, found {other:?}"),
        }
    }
    Ok(count)
}

/// Publishes a load as a device does that loses nothing: after a reconnect it sends the unacknowledged messages again. Counts the
/// acknowledged messages in `acknowledged`. Returns when all are acknowledged.
pub async fn deliver(port: u16, load: Load, acknowledged: Arc<AtomicU64>) -> anyhow::Result<()> {
    run_client(move || async move {
        let (mut load, mut unacknowledged) = (load, VecDeque::new());
        while deliver_on_one_connection(port, &mut load, &mut unacknowledged, &acknowledged).await.is_err() {
            tokio::time::sleep(RECONNECT_DELAY).await;
        }
        Ok(())
    })
    .await
}

async fn deliver_on_one_connection(
    port: u16,
    load: &mut Load,
    unacknowledged: &mut VecDeque<Packet>,
    acknowledged: &AtomicU64,
) -> anyhow::Result<()> {
    let (mut connection, _) = PacketConnection::open(&login(port, "loader"), &CONNECT_SETTINGS).await?;
    for packet in &*unacknowledged {
        connection.put(packet)?;
    }
    loop {
        while unacknowledged.len() < usize::try_from(MAX_UNACKNOWLEDGED)? {
            let Some(message) = load.next() else { break };
            let packet = Packet::Publish(message);
            connection.put(&packet)?;
            unacknowledged.push_back(packet);
        }
        if unacknowledged.is_empty() {
            return Ok(());
        }
        connection.flush_all().await?;
        // Mosquitto acknowledges in the order of arrival.
        let count = read_acknowledgements(&mut connection).await?;
        unacknowledged.drain(..usize::try_from(count)?.min(unacknowledged.len()));
        acknowledged.fetch_add(count, Ordering::Relaxed);
    }
}
