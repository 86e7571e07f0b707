//! Fleetwright: a Kubernetes operator for IoT fleets.
//!
//! Three custom resources, `Device`, `Gateway` and `Pipeline`, say what a fleet is; the roles of this one binary make it run.
//! Dependencies point one way: `api` (a crate) knows nothing; `certificate`, `credential`, `decode` (a crate), `timescale`, `registry`
//! know `api`; `operator`, `agent`, `ingest`, `check` and `simulate` know those and never one another.

pub use fleetwright_api as api;
pub use fleetwright_decode as decode;

pub mod configuration;
pub mod runtime;

pub mod certificate;
pub mod credential;
pub mod presence;
pub mod registry;
pub mod timescale;

pub mod agent;
pub mod check;
pub mod ingest;
pub mod operator;
pub mod simulate;
