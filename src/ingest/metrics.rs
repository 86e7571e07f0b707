//! The metrics of a worker. Labels are bounded: the gateways of the Pipeline, and the reasons.

use prometheus::core::{AtomicU64, GenericCounter};
use prometheus::{
    Gauge, GaugeVec, Histogram, HistogramOpts, HistogramVec, IntCounterVec, IntGauge, IntGaugeVec, Opts, Registry, exponential_buckets,
};

use crate::decode::dead_letter::Reason;

type Counter = GenericCounter<AtomicU64>;

/// The metrics of a worker.
#[derive(Clone, Debug)]
pub struct WorkerMetrics {
    messages: IntCounterVec,
    bytes: IntCounterVec,
    rows: IntCounterVec,
    redelivered: IntCounterVec,
    merged: IntCounterVec,
    conflicts: IntCounterVec,
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
    /// Reconnect attempts of the database connections.
    pub database_retries: Counter,
    /// 1 if the database answers.
    pub database_up: IntGauge,
    back_pressure: GaugeVec,
}

/// The metrics of one session.
#[derive(Clone, Debug)]
pub struct SessionMetrics {
    gateway: String,
    all: WorkerMetrics,
    /// Received messages.
    pub messages: Counter,
    /// Bytes of their topics and payloads.
    pub bytes: Counter,
    /// Stored rows.
    pub rows: Counter,
    /// Rows and messages that were already stored.
    pub redelivered: Counter,
    /// Readings whose values were added to an existing row.
    pub merged: Counter,
    /// Readings that contradicted an existing row, which was kept or replaced.
    pub conflicts: Counter,
    /// Committed transactions.
    pub batches: Counter,
    /// Successful logins, including the first one.
    pub connections: Counter,
    /// Gaps in the sequence numbers of Sparkplug B messages.
    pub sequence_gaps: Counter,
    /// Rebirth commands to Sparkplug B nodes.
    pub rebirths: Counter,
    /// Unacknowledged messages.
    pub unacknowledged: IntGauge,
    /// The memory of the messages that are not stored, in bytes.
    pub held_bytes: IntGauge,
    /// The used share of the memory limit or of the receive maximum, from 0 to 1.
    pub back_pressure: Gauge,
    /// Seconds from the first attempt to write a batch to its commit.
    pub commit: Histogram,
    /// Seconds from the newest reading of a batch, by its timestamp, to the commit.
    pub latency: Histogram,
    /// Seconds from the arrival of each message to its commit.
    pub processing: Histogram,
    /// Seconds since the arrival of the oldest message that is not stored.
    pub lag: Gauge,
}

impl WorkerMetrics {
    /// Registers the metrics.
    ///
    /// # Errors
    /// If a metric is already registered.
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
        let lag = Opts::new("fleetwright_ingest_lag_seconds", "Time since the arrival of the oldest message that is not yet stored.");
        let lag = GaugeVec::new(lag, gateway)?;
        registry.register(Box::new(lag.clone()))?;
        let database_retries = Counter::new("fleetwright_ingest_database_retries_total", "Failed attempts to reconnect to the database.")?;
        registry.register(Box::new(database_retries.clone()))?;
        let database_up =
            IntGauge::new("fleetwright_ingest_database_up", "1 while the database answers on every connection, otherwise 0.")?;
        registry.register(Box::new(database_up.clone()))?;
        let back_pressure = GaugeVec::new(
            Opts::new(
                "fleetwright_ingest_back_pressure_ratio",
                "Used share of the memory limit or of the receive maximum of a session. At 1 the broker queues.",
            ),
            gateway,
        )?;
        registry.register(Box::new(back_pressure.clone()))?;
        Ok(Self {
            messages: counter("messages_total", "Messages received from the broker.", gateway)?,
            bytes: counter("message_bytes_total", "Bytes of the topics and payloads received from the broker.", gateway)?,
            rows: counter("rows_total", "Rows stored in the table.", gateway)?,
            redelivered: counter(
                "redelivered_total",
                "Rows and messages that were already stored when the broker sent them again.",
                gateway,
            )?,
            merged: counter(
                "merged_readings_total",
                "Readings whose values were added to the row of an earlier reading with the same key.",
                gateway,
            )?,
            conflicts: counter(
                "resolved_conflicts_total",
                "Readings that contradicted a row with the same key, which was kept or replaced according to onConflict.",
                gateway,
            )?,
            batches: counter("batches_total", "Committed transactions.", gateway)?,
            dead_letters: counter("dead_letters_total", "Messages stored as dead letters, by reason.", &["gateway", "reason"])?,
            discarded: counter(
                "dead_letters_discarded_total",
                "Refused messages that exceeded the dead letter quota, by reason.",
                &["gateway", "reason"],
            )?,
            connections: counter("connections_total", "Successful logins to the broker.", gateway)?,
            sequence_gaps: counter(
                "sparkplug_sequence_gaps_total",
                "Gaps in the sequence numbers of Sparkplug B messages. Each gap may be a lost message.",
                gateway,
            )?,
            rebirths: counter(
                "sparkplug_rebirths_total",
                "Rebirth commands to Sparkplug B nodes, after a sequence gap or a metric without a birth.",
                gateway,
            )?,
            unacknowledged: gauge("unacknowledged_messages", "Received messages that are not acknowledged.")?,
            held_bytes: gauge("held_bytes", "Memory of the messages that are not stored.")?,
            commit: histogram("commit_seconds", "Time from the first attempt to write a batch to its commit.")?,
            latency: histogram("reading_to_commit_seconds", "Time from the newest reading of a batch, by its timestamp, to the commit.")?,
            processing: histogram("message_processing_seconds", "Time from the arrival of a message at the worker to its commit.")?,
            lag,
            database_retries,
            database_up,
            back_pressure,
        })
    }

    /// The metrics of one session.
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
            merged: self.merged.with_label_values(label),
            conflicts: self.conflicts.with_label_values(label),
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
    /// Another worker has claimed the session: this worker holds no messages of it.
    pub fn end(&self) {
        for gauge in [&self.unacknowledged, &self.held_bytes] {
            gauge.set(0);
        }
        for gauge in [&self.back_pressure, &self.lag] {
            gauge.set(0.0);
        }
    }

    /// A message was refused. `kept`: it is stored as a dead letter.
    pub fn refused(&self, reason: Reason, kept: bool) {
        let counter = if kept { &self.all.dead_letters } else { &self.all.discarded };
        counter.with_label_values(&[self.gateway.as_str(), reason.name()]).inc();
    }
}
