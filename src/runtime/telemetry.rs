//! Logs on standard error: one line an event, as text for people or as JSON for collectors.

use std::io::IsTerminal;

use tracing_subscriber::EnvFilter;

/// Starts logging. `RUST_LOG` sets the levels (default `info`); a terminal gets text, anything else JSON unless
/// `FLEETWRIGHT_LOG_FORMAT=text`.
pub fn start() {
    let filter =
        EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info,kube_client=warn,k8s_controller::controller=error"));
    let builder = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    let text = std::env::var("FLEETWRIGHT_LOG_FORMAT").map_or_else(|_| std::io::stderr().is_terminal(), |format| format == "text");
    // A second start (in tests) leaves the first in place.
    let _ = if text { builder.try_init() } else { builder.json().flatten_event(true).try_init() };
}

/// A registry that holds the metrics of this process: memory, processor time, open files.
///
/// # Errors
/// If the registry refuses them.
pub fn metrics() -> Result<prometheus::Registry, prometheus::Error> {
    let registry = prometheus::Registry::new();
    registry.register(Box::new(prometheus::process_collector::ProcessCollector::for_self()))?;
    Ok(registry)
}
