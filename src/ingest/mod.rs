//! The role `ingest`: a worker that takes the telemetry of a Pipeline from its brokers into its table.
//!
//! Broker -> `mqtt` -> `session`, which decodes each message with `processor` into a batch -> `crate::sink`, which stores rows, dead letters
//! and redelivery entries in one transaction -> acknowledgements, in the order of arrival. A message is acknowledged only after its
//! commit.

mod assignment;
mod broker_login;
mod database_files;
mod metrics;
mod owned_sessions;
mod processor;
pub mod replay;
mod session;
mod worker;

pub use worker::{Arguments, run, threads};
