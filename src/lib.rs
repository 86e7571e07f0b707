//! Fleetwright: a Kubernetes operator for IoT fleets.
//!
//! Three custom resources, `Device`, `Gateway` and `Pipeline`, say what a fleet is; the roles of this one binary make it run.
//! Dependencies point downwards: `api` (a crate) and `runtime` depend on nothing; `broker`, `certificate`, `database`, `decode` (a crate) and
//! `mqtt` depend on those; `state` and `sink` depend on `database` and `decode`. The roles `operator`, `agent`, `ingest`, `check` and
//! `simulate` depend on all of these and never on one another.

pub use fleetwright_api as api;
pub use fleetwright_decode as decode;

pub mod configuration;
pub mod runtime;

pub mod broker;
pub mod certificate;
pub mod database;
pub mod mqtt;
pub mod sink;
pub mod state;

pub mod agent;
pub mod check;
pub mod ingest;
pub mod operator;
pub mod simulate;
