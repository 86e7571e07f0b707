//! A clustered broker; each node is a process.

use std::fs::File;
use std::net::{Ipv4Addr, TcpStream};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use tempfile::TempDir;

use super::free_port;
use super::proxy::Proxy;

/// Maximum time until the nodes have formed a cluster.
const FORMED_WITHIN: Duration = Duration::from_mins(1);

/// A cluster whose nodes end on drop.
pub struct Cluster {
    /// Port of each node.
    pub ports: Vec<u16>,
    /// Distributes connections to the nodes in turn.
    pub balancer: Proxy,
    nodes: Vec<Child>,
    folder: TempDir,
}

impl Cluster {
    /// Starts a cluster with this number of nodes and waits until all answer.
    pub fn start(nodes: usize) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let ports: Vec<[u16; 3]> = (0..nodes).map(|_| std::array::from_fn(|_| free_port())).collect();
        let addresses: Vec<String> = ports.iter().map(|[mqtt, grpc, raft]| format!("{mqtt}:{grpc}:{raft}")).collect();
        let start = |number: usize| {
            let log = File::create(folder.path().join(format!("{number}.log"))).unwrap();
            let mut command = Command::new(program());
            command.arg(number.to_string()).args(&addresses).current_dir(folder.path());
            command.stdin(Stdio::null()).stdout(log.try_clone().unwrap()).stderr(log).spawn().expect("e2e/broker/broker.sh runs")
        };
        let nodes = (1..=nodes).map(start).collect();
        let ports: Vec<u16> = ports.into_iter().map(|[mqtt, ..]| mqtt).collect();
        let mut cluster = Self { balancer: Proxy::balance(ports.clone()), ports, nodes, folder };
        cluster.ready();
        cluster
    }

    /// The logs of the nodes.
    pub fn log(&self) -> String {
        let logs = (1..=self.nodes.len()).map(|number| self.folder.path().join(format!("{number}.log")));
        logs.map(|log| std::fs::read_to_string(log).unwrap_or_default()).collect()
    }

    fn ready(&mut self) {
        let started = Instant::now();
        for index in 0..self.nodes.len() {
            while TcpStream::connect((Ipv4Addr::LOCALHOST, self.ports[index])).is_err() {
                let ended = self.nodes[index].try_wait().unwrap();
                assert!(
                    ended.is_none() && started.elapsed() < FORMED_WITHIN,
                    "node {} does not answer ({ended:?}); the logs:\n{}",
                    index + 1,
                    self.log()
                );
                std::thread::sleep(Duration::from_millis(20));
            }
        }
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        for node in &mut self.nodes {
            let _ = node.kill();
            let _ = node.wait();
        }
    }
}

fn program() -> PathBuf {
    let named = std::env::var_os("FLEETWRIGHT_BROKER").map(PathBuf::from);
    named.unwrap_or_else(|| PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("e2e/broker/broker.sh"))
}
