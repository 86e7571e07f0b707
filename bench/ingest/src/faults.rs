//! Scenario E kills a process under load. Scenario F has repeated, malformed and late messages.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use clap::ValueEnum;

use crate::consumer::Kind;
use crate::load::{Content, load, mixture};
use crate::measure::thousands;
use crate::parts::{Broker, Queues};
use crate::publisher::deliver;
use crate::run::Bench;

/// The readings of a message.
const CONTENT: Content = Content::Readings(1);

/// The process that is killed.
#[derive(Clone, Copy, Debug, Eq, PartialEq, ValueEnum)]
pub enum Victim {
    /// The consumer
    Consumer,
    /// PostgreSQL
    Database,
    /// Mosquitto
    Broker,
}

impl fmt::Display for Victim {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            Self::Consumer => "consumer",
            Self::Database => "database",
            Self::Broker => "broker",
        })
    }
}

/// Time until the consumer restarts. Broker and database restart immediately, which takes about as long.
const RESTART_DELAY: Duration = Duration::from_secs(1);

/// The result of a load.
#[derive(Clone, Copy, Debug, Default)]
pub struct Outcome {
    /// Valid acknowledged readings that are not in the table.
    lost: u64,
    /// Duplicate rows.
    extra: u64,
    /// Rows made of malformed messages.
    malformed: u64,
    /// Dead letters. `None` if the consumer does not keep any.
    dead_letters: Option<u64>,
}

/// The header of both tables.
pub const HEADER: &str = "| | | lost | extra rows | rows of malformed messages | dead letters |\n|---|---|---:|---:|---:|---:|";

impl Outcome {
    /// A line of the table.
    pub fn line(&self, scenario: &str, kind: Kind) -> String {
        let number = |value: u64| thousands(value as f64);
        let dead_letters = self.dead_letters.map(number).unwrap_or_default();
        format!("| {scenario} | {kind} | {} | {} | {} | {dead_letters} |", number(self.lost), number(self.extra), number(self.malformed))
    }
}

impl Bench {
    /// E: kills a process when two fifths of the load are acknowledged. The publisher continues as soon as it can.
    pub async fn kill(&mut self, kind: Kind, victim: Victim, messages: u64) -> anyhow::Result<Outcome> {
        drop(kind.prepare(&self.database, CONTENT).await?);
        // Messages in the memory of a killed broker are lost for every consumer.
        let mut broker = Broker::start(Queues::Process)?;
        let mut consumer = kind.start(&broker, &self.database, CONTENT)?;
        consumer.await_ready(&broker)?;
        let acknowledged = Arc::new(AtomicU64::new(0));
        let loader = tokio::spawn(deliver(broker.port, load(messages, CONTENT), acknowledged.clone()));
        while acknowledged.load(Ordering::Relaxed) < messages * 2 / 5 {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
        match victim {
            Victim::Consumer => {
                consumer.process.kill()?;
                tokio::time::sleep(RESTART_DELAY).await;
                consumer = kind.start(&broker, &self.database, CONTENT)?;
            }
            Victim::Database => self.database.restart().await?,
            Victim::Broker => broker.restart()?,
        }
        loader.await??;
        let outcome = self.outcome(kind, acknowledged.load(Ordering::Relaxed), messages).await;
        drop(consumer);
        outcome
    }

    /// F: a load in which five percent of the messages are repeated, one percent is malformed, and one percent is late.
    pub async fn mix(&self, kind: Kind, messages: u64) -> anyhow::Result<Outcome> {
        drop(kind.prepare(&self.database, CONTENT).await?);
        let broker = Broker::start(self.queues)?;
        let consumer = kind.start(&broker, &self.database, CONTENT)?;
        consumer.await_ready(&broker)?;
        deliver(broker.port, load(messages, Content::Mixed), Arc::default()).await?;
        let (_, valid) = mixture(messages);
        let outcome = self.outcome(kind, valid, valid).await;
        drop(consumer);
        outcome
    }

    /// Waits until no more rows arrive. `acknowledged` is the number of valid acknowledged readings, `messages` that of expected ones.
    async fn outcome(&self, kind: Kind, acknowledged: u64, messages: u64) -> anyhow::Result<Outcome> {
        let client = self.database.client().await?;
        self.settle(&client, messages).await?;
        let device = kind.device_column();
        let row = client
            .query_one(
                &format!(
                    "SELECT count(DISTINCT count) FILTER (WHERE count >= 0), count(*) - count(DISTINCT (time, {device})),
                            count(*) FILTER (WHERE count < 0 OR count IS NULL) FROM load"
                ),
                &[],
            )
            .await?;
        let number = |index: usize| u64::try_from(row.get::<_, i64>(index));
        let dead_letters = if kind.is_worker() {
            let dead_letters: i64 = client.query_one("SELECT count(*) FROM fleetwright.dead_letter", &[]).await?.get(0);
            Some(u64::try_from(dead_letters)?)
        } else {
            None
        };
        Ok(Outcome { lost: acknowledged.saturating_sub(number(0)?), extra: number(1)?, malformed: number(2)?, dead_letters })
    }
}
