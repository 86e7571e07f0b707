//! What a worker counts and measures. Labels are bounded: gateways of the Pipeline, and reasons.

use prometheus::core::{AtomicU64, GenericCounter};
use prometheus::{
    Gauge, GaugeVec, Histogram, HistogramOpts, HistogramVec, IntCounterVec, IntGauge, IntGaugeVec, Opts, Registry, exponential_buckets,
};

use crate::decode::dead_letter::Reason;

type Counter = GenericCounter<AtomicU64>;

/// The metrics of a worker.
#[derive(Clone, Debug)]
pub struct Metrics {
    messages: IntCounterVec,
    bytes: IntCounterVec,
    rows: IntCounterVec,
    redelivered: IntCounterVec,
    batches: IntCounterVec,
    dead_letters: IntCounterVec,
    discarded: IntCounterVec,
    connections: IntCounterVec,
    sequence_gaps: IntCounterVec,
    rebirths: IntCounterVec,
    unacknowledged: IntGaugeVec,
    held_bytes: IntGaugeVec,
    commit: HistogramVec,
    latency: HistogramVec,
    processing: HistogramVec,
    lag: GaugeVec,
    /// Attempts of the database connections to come back.
    pub database_retries: Counter,
    /// 1 while the database answers.
    pub database_up: IntGauge,
    back_pressure: GaugeVec,
}

/// The metrics of one gateway's session.
#[derive(Clone, Debug)]
pub struct SessionMetrics {
    gateway: String,
    all: Metrics,
    /// Messages that arrived.
    pub messages: Counter,
    /// Bytes of their topics and payloads.
    pub bytes: Counter,
    /// Rows that were stored.
    pub rows: Counter,
    /// Rows and messages that the broker had sent before.
    pub redelivered: Counter,
    /// Transactions.
    pub batches: Counter,
    /// Logins that succeeded; the first is not a reconnect.
    pub connections: Counter,
    /// Gaps in the numbers of messages of Sparkplug B.
    pub sequence_gaps: Counter,
    /// Nodes of Sparkplug B that were asked to be born again.
    pub rebirths: Counter,
    /// Messages that are not acknowledged.
    pub unacknowledged: IntGauge,
    /// Bytes of memory that they hold.
    pub held_bytes: IntGauge,
    /// Share of the memory that they may hold, or of the window, from 0 to 1.
    pub back_pressure: Gauge,
    /// Seconds from the first attempt to write a batch to its commit.
    pub commit: Histogram,
    /// Seconds from the newest reading of a batch, by its own time, to the commit.
    pub latency: Histogram,
    /// Seconds from the arrival of each message to the commit of what it said.
    pub processing: Histogram,
    /// Seconds since the arrival of the oldest message that is not stored.
    pub lag: Gauge,
}

impl Metrics {
    /// Metrics, registered.
    ///
    /// # Errors
    /// When one is registered already.
    pub fn register(registry: &Registry) -> Result<Self, prometheus::Error> {
        let gateway = &["gateway"];
        let counter = |name: &str, help: &str, labels: &[&str]| {
            let counter = IntCounterVec::new(Opts::new(format!("fleetwright_ingest_{name}"), help), labels)?;
            registry.register(Box::new(counter.clone()))?;
            Ok::<_, prometheus::Error>(counter)
        };
        let gauge = |name: &str, help: &str| {
            let gauge = IntGaugeVec::new(Opts::new(format!("fleetwright_ingest_{name}"), help), gateway)?;
            registry.register(Box::new(gauge.clone()))?;
            Ok::<_, prometheus::Error>(gauge)
        };
        // From half a millisecond, faster than any disk, to half a minute.
        let buckets = exponential_buckets(0.0005, 2.0, 17)?;
        let histogram = |name: &str, help: &str| {
            let options = HistogramOpts::new(format!("fleetwright_ingest_{name}"), help).buckets(buckets.clone());
            let histogram = HistogramVec::new(options, gateway)?;
            registry.register(Box::new(histogram.clone()))?;
            Ok::<_, prometheus::Error>(histogram)
        };
        let lag = Opts::new("fleetwright_ingest_lag_seconds", "Since the arrival of the oldest message that is not stored.");
        let lag = GaugeVec::new(lag, gateway)?;
        registry.register(Box::new(lag.clone()))?;
        let database_retries =
            Counter::new("fleetwright_ingest_database_retries_total", "Attempts to get back to a database that failed.")?;
        registry.register(Box::new(database_retries.clone()))?;
        let database_up = IntGauge::new("fleetwright_ingest_database_up", "1 while the database answers on every connection, else 0.")?;
        registry.register(Box::new(database_up.clone()))?;
        let back_pressure = GaugeVec::new(
            Opts::new(
                "fleetwright_ingest_back_pressure_ratio",
                "Share of its memory, or of its window, that a session's messages hold; at 1 the broker queues.",
            ),
            gateway,
        )?;
        registry.register(Box::new(back_pressure.clone()))?;
        Ok(Self {
            messages: counter("messages_total", "Messages that arrived from the broker.", gateway)?,
            bytes: counter("message_bytes_total", "Bytes of topics and payloads that arrived.", gateway)?,
            rows: counter("rows_total", "Rows that were stored.", gateway)?,
            redelivered: counter(
                "redelivered_total",
                "Rows and messages that were stored already, when the broker sent them again.",
                gateway,
            )?,
            batches: counter("batches_total", "Transactions that were committed.", gateway)?,
            dead_letters: counter("dead_letters_total", "Messages that became a dead letter, by reason.", &["gateway", "reason"])?,
            discarded: counter(
                "dead_letters_discarded_total",
                "Refused messages that were too many to be kept as dead letters, by reason.",
                &["gateway", "reason"],
            )?,
            connections: counter("connections_total", "Logins to the broker that succeeded.", gateway)?,
            sequence_gaps: counter(
                "sparkplug_sequence_gaps_total",
                "Gaps in the numbers of Sparkplug B messages: each may be a message that was lost on its way.",
                gateway,
            )?,
            rebirths: counter(
                "sparkplug_rebirths_total",
                "Commands to nodes of Sparkplug B to be born again, after a gap or a metric that no birth has told of.",
                gateway,
            )?,
            unacknowledged: gauge("unacknowledged_messages", "Messages that arrived and are not acknowledged.")?,
            held_bytes: gauge("held_bytes", "Memory of the messages that are not stored.")?,
            commit: histogram("commit_seconds", "From the first attempt to write a batch to its commit.")?,
            latency: histogram("reading_to_commit_seconds", "From the newest reading of a batch, by its own time, to the commit.")?,
            processing: histogram(
                "message_processing_seconds",
                "From the arrival of a message at the worker to the commit of what it said.",
            )?,
            lag,
            database_retries,
            database_up,
            back_pressure,
        })
    }

    /// Those of one gateway.
    #[must_use]
    pub fn session(&self, gateway: &str) -> SessionMetrics {
        let label = &[gateway];
        for reason in Reason::ALL {
            self.dead_letters.with_label_values(&[gateway, reason.name()]);
            self.discarded.with_label_values(&[gateway, reason.name()]);
        }
        SessionMetrics {
            gateway: gateway.to_owned(),
            all: self.clone(),
            messages: self.messages.with_label_values(label),
            bytes: self.bytes.with_label_values(label),
            rows: self.rows.with_label_values(label),
            redelivered: self.redelivered.with_label_values(label),
            batches: self.batches.with_label_values(label),
            connections: self.connections.with_label_values(label),
            sequence_gaps: self.sequence_gaps.with_label_values(label),
            rebirths: self.rebirths.with_label_values(label),
            unacknowledged: self.unacknowledged.with_label_values(label),
            held_bytes: self.held_bytes.with_label_values(label),
            back_pressure: self.back_pressure.with_label_values(label),
            commit: self.commit.with_label_values(label),
            latency: self.latency.with_label_values(label),
            processing: self.processing.with_label_values(label),
            lag: self.lag.with_label_values(label),
        }
    }
}

impl SessionMetrics {
    /// The session is another worker's now: this one holds nothing.
    pub fn end(&self) {
        for gauge in [&self.unacknowledged, &self.held_bytes] {
            gauge.set(0);
        }
        for gauge in [&self.back_pressure, &self.lag] {
            gauge.set(0.0);
        }
    }

    /// A message was refused; `kept` as a dead letter, or counted only.
    pub fn refused(&self, reason: Reason, kept: bool) {
        let counter = if kept { &self.all.dead_letters } else { &self.all.discarded };
        counter.with_label_values(&[self.gateway.as_str(), reason.name()]).inc();
    }
}
