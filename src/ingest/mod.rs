//! The role `ingest`: a worker that takes the telemetry of a Pipeline from its brokers into its table.
//!
//! Broker -> `mqtt` -> `session`, which decodes each message by `intake` into a `batch` -> `sink`, which stores rows,
//! dead letters and `ledger` in one transaction -> acknowledgements, in the order of arrival. A message is acknowledged only after
//! its commit.

mod assignment;
mod batch;
mod broker_login;
mod intake;
mod ledger;
mod metrics;
mod owned_sessions;
pub mod replay;
mod session;
mod sink;
mod worker;

use crate::decode;
use crate::decode::refusal as dead_letter;

pub use worker::{Arguments, run, threads};
