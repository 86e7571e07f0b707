//! Fleetwright: a Kubernetes operator for IoT fleets.
//!
//! Three custom resources, `Device`, `Gateway` and `Pipeline`, say what a fleet is; the roles of this one binary make it run.
//! Dependencies point one way: `api` knows nothing; `certificate`, `credential`, `decode`, `timescale`, `registry` know `api`;
//! `operator`, `agent`, `ingest`, `check` and `simulate` know those and never one another.

pub mod api;

pub mod configuration;
pub mod runtime;

pub mod certificate;
pub mod credential;
pub mod decode;
pub mod presence;
pub mod registry;
pub mod timescale;

pub mod agent;
pub mod check;
pub mod ingest;
pub mod operator;
pub mod simulate;
