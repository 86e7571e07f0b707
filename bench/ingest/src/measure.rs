//! Measurements and their output.

use std::fmt;

use crate::consumer::Consumer;
use crate::parts::{Broker, Database};

/// One measurement.
#[derive(Clone, Copy, Debug, Default)]
pub struct Measured {
    /// Messages or rows per second.
    pub rate: f64,
    /// Processor time of the consumer per message, in microseconds.
    pub consumer: f64,
    /// Processor time of the broker per message, in microseconds.
    pub broker: f64,
    /// Processor time of the database per row, in microseconds.
    pub database: f64,
    /// Maximum memory of the consumer, in MiB.
    pub memory: f64,
    /// Median and 99th percentile from publish to commit, in milliseconds.
    pub latency: Option<(f64, f64)>,
    /// Rows that are missing.
    pub lost: u64,
}

/// What the parts had used.
pub struct Before {
    consumer: f64,
    broker: f64,
    database: f64,
}

impl Before {
    /// From now on.
    pub fn now(consumer: Option<&Consumer>, broker: &Broker, database: &Database) -> anyhow::Result<Self> {
        let consumer = consumer.map(|consumer| consumer.process.usage()).transpose()?.map_or(0.0, |usage| usage.processor);
        Ok(Self { consumer, broker: broker.processor(), database: database.processor() })
    }

    /// Until now: so many messages with so many rows, at this rate.
    pub fn until(
        &self,
        consumer: &Consumer,
        broker: &Broker,
        database: &Database,
        (messages, rows): (u64, u64),
        rate: f64,
    ) -> anyhow::Result<Measured> {
        let usage = consumer.process.usage()?;
        let each = |after: f64, before: f64, count: u64| (after - before) * 1e6 / count as f64;
        Ok(Measured {
            rate,
            consumer: each(usage.processor, self.consumer, messages),
            broker: each(broker.processor(), self.broker, messages),
            database: each(database.processor(), self.database, rows),
            memory: usage.memory,
            ..Measured::default()
        })
    }
}

/// The median of several; of all else what belongs to it.
pub fn median(mut measured: Vec<Measured>) -> Option<Measured> {
    measured.sort_by(|one, other| one.rate.total_cmp(&other.rate));
    // The first of two is the slower one.
    measured.get(measured.len().saturating_sub(1) / 2).copied()
}

/// The head of the table.
pub const HEAD: &str = "| | | rate | of the limit | of the worker | consumer, a message | database, a row | broker, a message | consumer's memory |\n\
                        |---|---|---:|---:|---:|---:|---:|---:|---:|";

/// A line of the table.
pub struct Line<'a> {
    /// What is measured.
    pub scenario: &'a str,
    /// Whose it is.
    pub name: &'a dyn fmt::Display,
    /// What was measured.
    pub measured: Measured,
    /// The limit.
    pub limit: Option<Measured>,
    /// The worker's.
    pub worker: Option<Measured>,
}

impl fmt::Display for Line<'_> {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Measured { rate, consumer, broker, database, memory, lost, .. } = self.measured;
        let ratio = |other: Option<Measured>| other.map(|other| format!("{:.2}", rate / other.rate)).unwrap_or_default();
        let spent = |value: f64| if value > 0.0 { format!("{value:.2} µs") } else { String::new() };
        let memory = if memory > 0.0 { format!("{memory:.0} MiB") } else { String::new() };
        let mut result = thousands(rate);
        if let Some((middle, late)) = self.measured.latency {
            result = format!("p50 {middle:.1}, p99 {late:.1} ms");
        }
        if lost > 0 {
            result = format!("{result}, {} lost", thousands(lost as f64));
        }
        write!(
            formatter,
            "| {} | {} | {result} | {} | {} | {} | {} | {} | {memory} |",
            self.scenario,
            self.name,
            ratio(self.limit),
            ratio(self.worker),
            spent(consumer),
            spent(database),
            spent(broker),
        )
    }
}

/// A whole number with separators.
pub fn thousands(number: f64) -> String {
    let digits = format!("{number:.0}");
    let mut text = String::new();
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) && !text.ends_with('-') {
            text.push(',');
        }
        text.push(digit);
    }
    text
}
