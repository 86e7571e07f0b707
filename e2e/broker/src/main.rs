//! A node of a cluster of RMQTT brokers on loopback: the arguments of `broker NODE MQTT:GRPC:RAFT...` are its number,
//! from 1 on, and the ports of each node. It runs until it is killed, and stores nothing.

use std::net::{Ipv4Addr, SocketAddr};
use std::num::NonZeroU16;
use std::time::Duration;

use anyhow::{Context, Result};
use rmqtt::context::ServerContext;
use rmqtt::net::Builder;
use rmqtt::node::Node;
use rmqtt::server::MqttServer;

/// The ports of a node: for clients, for messages of other nodes, for their agreement.
type Ports = [u16; 3];

/// Nothing of what a machine is busy with shall keep a node of a test from its work.
const NO_LOAD_IS_TOO_MUCH: f32 = 1_000.0;

#[tokio::main]
async fn main() -> Result<()> {
    simple_logger::SimpleLogger::new().with_level(log::LevelFilter::Info).env().init()?;
    let (number, nodes) = arguments().context("expected NODE MQTT:GRPC:RAFT...")?;
    let [mqtt, grpc, _] = *nodes.get(number.wrapping_sub(1)).context("expected a number from 1 to the count of nodes")?;
    let id = u64::try_from(number)?;
    let node = Node::new(id, NO_LOAD_IS_TOO_MUCH, NO_LOAD_IS_TOO_MUCH, Duration::from_secs(2));
    let cluster = format!(
        "node_grpc_addrs = [{}]\nraft_peer_addrs = [{}]\nleader_id = 1\n",
        addresses(nodes.iter().map(|ports| ports[1])),
        addresses(nodes.iter().map(|ports| ports[2])),
    );
    let context =
        ServerContext::new().node(node).busy_check_enable(false).plugins_config_map_add("rmqtt-cluster-raft", cluster).build().await;
    context.node.start_grpc_server(context.clone(), loopback(grpc), true, false);
    rmqtt_shared_subscription::register_named(&context, "rmqtt-shared-subscription", true, false).await?;
    rmqtt_cluster_raft::register_named(&context, "rmqtt-cluster-raft", true, true).await?;
    // No limit on messages in flight and queued, and no expiry. No message is sent again while a connection lasts: MQTT 5 forbids it (4.4),
    // but by default this broker sends messages again after 20 seconds.
    let listener = Builder::new()
        .name("tcp")
        .laddr(loopback(mqtt))
        .nodelay(true)
        .max_inflight(NonZeroU16::MAX)
        .max_mqueue_len(10_000_000)
        .message_expiry_interval(Duration::ZERO)
        .message_retry_interval(Duration::from_secs(86_400))
        .bind()?
        .tcp()?;
    MqttServer::new(context).listener(listener).build().run().await
}

fn arguments() -> Result<(usize, Vec<Ports>)> {
    let mut arguments = std::env::args().skip(1);
    let number = arguments.next().context("no number")?.parse()?;
    let nodes = arguments.map(|node| {
        let ports = node.split(':').map(str::parse).collect::<std::result::Result<Vec<u16>, _>>()?;
        Ports::try_from(ports).ok().context("three ports a node")
    });
    Ok((number, nodes.collect::<Result<_>>()?))
}

/// These ports as a list in TOML, each with the number of its node.
fn addresses(ports: impl Iterator<Item = u16>) -> String {
    let all: Vec<String> = ports.zip(1..).map(|(port, number)| format!("\"{number}@{}\"", loopback(port))).collect();
    all.join(", ")
}

fn loopback(port: u16) -> SocketAddr {
    (Ipv4Addr::LOCALHOST, port).into()
}
