//! The role `ingest`: a worker that takes the telemetry of a Pipeline from its brokers into its table.
//!
//! Broker -> `mqtt` -> `session`, which decodes each message by `intake` into a `batch` -> `sink`, which stores rows,
//! dead letters and `ledger` in one transaction -> acknowledgements, in the order of arrival. A message is acknowledged after
//! its commit, and never before.

mod assignment;
mod batch;
mod dead_letter;
mod decode;
mod intake;
mod ledger;
mod metrics;
mod mqtt;
mod session;
mod sink;
mod topic;
mod worker;

pub use worker::{Arguments, run};
