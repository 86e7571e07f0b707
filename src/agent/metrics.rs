//! The metrics of an agent and of its broker.

use std::sync::Arc;

use prometheus::core::Collector;
use prometheus::{Histogram, HistogramOpts, IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Opts, Registry};
use tokio::sync::watch;

use super::fullness::{BOUNDS, CLIENT_LIMITS, bound};
use super::presentation::Presented;
use crate::configuration::agent::Fullness;

/// Seconds until a change is verified; the target is one second from a Device to the broker.
const VERIFICATION_BUCKETS: &[f64] = &[0.01, 0.025, 0.05, 0.1, 0.2, 0.3, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0];

/// The metrics of an agent.
#[derive(Debug)]
pub struct AgentMetrics {
    /// Reload signals to the broker.
    pub reloads: IntCounter,
    /// Time from the first change of a generation to its verification.
    pub change_to_verified: Histogram,
    /// Time from the signal to the verification.
    pub reload_to_verified: Histogram,
    /// Generation of the files.
    pub written: IntGauge,
    /// Generation that the agent has verified at the broker.
    pub verified: IntGauge,
    /// Unusable Secrets, by their kind of content.
    pub refused: IntCounterVec,
    /// Ended sessions of removed workers.
    pub sessions_ended: IntCounter,
    /// Clients connected to the broker.
    pub clients_connected: IntGauge,
    /// Bytes of messages in the broker.
    pub messages_stored_bytes: IntGauge,
    /// Memory of the broker.
    pub heap_bytes: IntGauge,
    /// Expiry of the presented certificates, by their Secret.
    pub certificate_expiry: IntGaugeVec,
    messages_dropped: IntGauge,
    messages_refused: IntGaugeVec,
    client_limits_exceeded: IntGaugeVec,
    full: IntGaugeVec,
    fullness: watch::Sender<Option<Fullness>>,
    has_dropped: watch::Sender<bool>,
}

impl AgentMetrics {
    /// Registers the metrics.
    ///
    /// # Errors
    /// If a metric is already registered.
    pub fn register(registry: &Registry) -> Result<Self, prometheus::Error> {
        let gauge = |name: &str, help: &str| registered(registry, IntGauge::new(name, help)?);
        let counter = |name: &str, help: &str| registered(registry, IntCounter::new(name, help)?);
        let histogram = |name: &str, help: &str| {
            registered(registry, Histogram::with_opts(HistogramOpts::new(name, help).buckets(VERIFICATION_BUCKETS.to_vec()))?)
        };
        let labelled = |name: &str, help: &str, label: &str, values: &[&str]| {
            let gauge = registered(registry, IntGaugeVec::new(Opts::new(name, help), &[label])?)?;
            for value in values {
                let _ = gauge.with_label_values(&[value]);
            }
            Ok::<_, prometheus::Error>(gauge)
        };
        let by_bound = |name: &str, help: &str| labelled(name, help, "bound", &BOUNDS);
        Ok(Self {
            reloads: counter("fleetwright_agent_reloads_total", "Reloads of the broker.")?,
            change_to_verified: histogram(
                "fleetwright_agent_change_to_proof_seconds",
                "Time from the first change of a generation until the agent has verified that the broker uses it.",
            )?,
            reload_to_verified: histogram("fleetwright_agent_reload_to_proof_seconds", "Time from the reload signal to the verification.")?,
            written: gauge("fleetwright_agent_generation_written", "Generation of the broker's files, since the agent's start.")?,
            verified: gauge("fleetwright_agent_generation_proven", "Last verified generation.")?,
            refused: registered(
                registry,
                IntCounterVec::new(Opts::new("fleetwright_agent_refused_total", "Secrets that could not be used."), &["content"])?,
            )?,
            sessions_ended: counter("fleetwright_agent_sessions_ended_total", "Sessions of removed workers that the agent ended.")?,
            clients_connected: gauge("fleetwright_broker_clients_connected", "Clients connected to the broker.")?,
            messages_stored_bytes: gauge("fleetwright_broker_messages_stored_bytes", "Bytes of the messages in the broker's queues.")?,
            heap_bytes: gauge("fleetwright_broker_heap_bytes", "Memory of the broker's sessions and messages.")?,
            certificate_expiry: registered(
                registry,
                IntGaugeVec::new(
                    Opts::new(
                        "fleetwright_gateway_certificate_expiry_timestamp_seconds",
                        "Expiry of the certificate that the broker presents, in seconds since 1970.",
                    ),
                    &["secret"],
                )?,
            )?,
            messages_dropped: gauge(
                "fleetwright_broker_messages_dropped",
                "Messages dropped because of a limit, since the broker's start.",
            )?,
            messages_refused: by_bound(
                "fleetwright_broker_messages_refused",
                "Messages that the broker refused and did not acknowledge because of this limit, since its start.",
            )?,
            client_limits_exceeded: labelled(
                "fleetwright_broker_client_limits_exceeded",
                "How often devices exceeded a limit of their own (spec.limits.clients), since its start.",
                "limit",
                &CLIENT_LIMITS,
            )?,
            full: by_bound("fleetwright_broker_full", "1 for the limit that makes the broker refuse messages.")?,
            fullness: watch::Sender::new(None),
            has_dropped: watch::Sender::new(false),
        })
    }

    /// The broker's count of dropped messages.
    pub fn observe_dropped(&self, messages: i64) {
        self.messages_dropped.set(messages);
        self.has_dropped.send_if_modified(|has| std::mem::replace(has, messages > 0) != (messages > 0));
    }

    /// The broker's count of messages that it refused because of this limit.
    pub fn observe_refused(&self, bound: &str, messages: i64) {
        if BOUNDS.contains(&bound) {
            self.messages_refused.with_label_values(&[bound]).set(messages);
        }
    }

    /// The broker's count of how often devices exceeded this limit of their own.
    pub fn observe_exceeded(&self, limit: &str, times: i64) {
        if CLIENT_LIMITS.contains(&limit) {
            self.client_limits_exceeded.with_label_values(&[limit]).set(times);
        }
    }

    /// Sets the limit that the broker has reached.
    pub fn observe_fullness(&self, seen: Fullness) {
        for name in BOUNDS {
            self.full.with_label_values(&[name]).set(i64::from(bound(&seen) == Some(name)));
        }
        self.fullness.send_replace(Some(seen));
    }

    /// A receiver of the reached limit; `None` before the broker's first value.
    #[must_use]
    pub fn fullness(&self) -> watch::Receiver<Option<Fullness>> {
        self.fullness.subscribe()
    }

    /// A receiver of whether the broker has dropped messages since its start.
    #[must_use]
    pub fn has_dropped(&self) -> watch::Receiver<bool> {
        self.has_dropped.subscribe()
    }
}

/// Updates the gauge of certificates until the sender is dropped.
pub async fn follow_presented(metrics: Arc<AgentMetrics>, mut presented: watch::Receiver<Option<Presented>>) {
    while presented.changed().await.is_ok() {
        let presented = presented.borrow_and_update().clone().unwrap_or_default();
        metrics.certificate_expiry.reset();
        for (secret, certificate) in presented {
            metrics.certificate_expiry.with_label_values(&[secret]).set(certificate.not_after.0.as_second());
        }
    }
}

fn registered<C: Collector + Clone + 'static>(registry: &Registry, collector: C) -> Result<C, prometheus::Error> {
    registry.register(Box::new(collector.clone()))?;
    Ok(collector)
}
