//! Brokers, databases and workers as processes of a test.

#![allow(dead_code, reason = "each test uses a part of this")]
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a helper of tests fails by panicking")]
#![allow(clippy::missing_panics_doc, reason = "a helper of tests")]

pub mod cluster;
pub mod innocent;
pub mod memory;
pub mod mosquitto;
pub mod packets;
pub mod postgres;
pub mod proxy;
pub mod publisher;
pub mod worker;
pub mod worker_process;

use std::collections::BTreeSet;
use std::net::{Ipv4Addr, TcpListener};
use std::ops::Range;
use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};

/// Script that starts brokers and databases.
pub fn parts() -> PathBuf {
    std::env::var_os("FLEETWRIGHT_PARTS").map_or_else(|| PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("e2e/parts.sh"), PathBuf::from)
}

/// Ports below those that the kernel gives to outgoing connections (`net.ipv4.ip_local_port_range` begins at 32768): no connection of
/// another test takes the port of a broker while that broker restarts.
const PORTS: Range<u16> = 10_000..32_000;

/// An unused port of the loopback interface. No other call in this process returns it.
pub fn free_port() -> u16 {
    static USED: Mutex<BTreeSet<u16>> = Mutex::new(BTreeSet::new());
    loop {
        let port = rand::random_range(PORTS);
        let mut used = USED.lock().unwrap_or_else(PoisonError::into_inner);
        if TcpListener::bind((Ipv4Addr::LOCALHOST, port)).is_ok() && used.insert(port) {
            return port;
        }
    }
}
