//! Brokers, databases and workers as processes of a test.

#![allow(dead_code, reason = "each test uses a part of this")]
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a helper of tests fails by panicking")]
#![allow(clippy::missing_panics_doc, reason = "a helper of tests")]

pub mod cluster;
pub mod mosquitto;
pub mod packets;
pub mod postgres;
pub mod proxy;
pub mod publisher;
pub mod worker;

use std::net::{Ipv4Addr, TcpListener};
use std::path::PathBuf;

/// Script that starts brokers and databases.
pub fn parts() -> PathBuf {
    std::env::var_os("FLEETWRIGHT_PARTS").map_or_else(|| PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("e2e/parts.sh"), PathBuf::from)
}

/// An unused port of the loopback interface.
pub fn free_port() -> u16 {
    TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap().local_addr().unwrap().port()
}
