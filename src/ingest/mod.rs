//! The role `ingest`: a worker that takes the telemetry of a Pipeline from its brokers into its table.
//!
//! Broker -> [`mqtt`] -> [`session`], which decodes each message by [`intake`] into a [`batch`] -> [`sink`], which stores rows,
//! dead letters and [`ledger`] in one transaction -> acknowledgements, in the order of arrival. A message is acknowledged after
//! its commit, and never before.

pub mod batch;
pub mod dead_letter;
pub mod decode;
pub mod intake;
pub mod ledger;
pub mod metrics;
pub mod mqtt;
pub mod session;
pub mod sink;
pub mod topic;
mod worker;

pub use worker::{Arguments, run};
