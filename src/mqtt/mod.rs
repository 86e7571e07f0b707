//! The MQTT 5 clients of every role: address, TLS, login and connect timeout are the same for all.
//!
//! [`client`] is the client library (`rumqttc`), for roles with few messages. [`connection`] is our own packet connection, for the
//! ingest worker and the simulated devices: it reads large blocks, locates each PUBLISH in place, and writes the acknowledgements
//! of a whole transaction at once. The library writes each manual acknowledgement separately: it drains a queue at 0.55 of the rate of
//! this connection, with 2.1 times the processor time per message (docs/benchmarks.md). The codec of all packets but PUBLISH and PUBACK
//! is `rumqttc`'s.

pub mod client;
pub mod connection;
pub mod error;
pub mod frame;
pub mod login;
pub mod login_files;
pub mod stream;
pub mod window;
