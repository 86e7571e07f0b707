//! Common parts of all roles: logs, an endpoint for probes and metrics, and an orderly stop.

pub mod address;
pub mod backoff;
pub mod error;
pub mod http;
pub mod http_server;
pub mod network;
pub mod rate_limited_queue;
pub mod readiness;
pub mod shutdown;
pub mod telemetry;
pub mod tls;
