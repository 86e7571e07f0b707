//! Scenario E kills a process under load. Scenario F has repeated, malformed and late messages.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use clap::ValueEnum;

use crate::consumer::Kind;
use crate::load::{Content, load, mixture};
use crate::measure::thousands;
use crate::packet::deliver;
use crate::parts::{Broker, Queues};
use crate::run::Bench;

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

/// Time until the consumer restarts. Broker and database are restarted at once, which takes about as long.
const AWAY: Duration = Duration::from_secs(1);

/// The result of a load.
#[derive(Clone, Copy, Debug, Default)]
pub struct Left {
    /// Valid acknowledged readings that are not in the table.
    lost: u64,
    /// Duplicate rows of a key.
    extra: u64,
    /// Rows made of malformed messages.
    malformed: u64,
    /// Dead letters; none if the consumer has none.
    letters: Option<u64>,
}

/// The header of both tables.
pub const HEAD: &str = "| | | lost | extra rows | rows of malformed messages | dead letters |\n|---|---|---:|---:|---:|---:|";

impl Left {
    /// A line of the table.
    pub fn line(&self, scenario: &str, kind: Kind) -> String {
        let number = |value: u64| thousands(value as f64);
        let letters = self.letters.map(number).unwrap_or_default();
        format!("| {scenario} | {kind} | {} | {} | {} | {letters} |", number(self.lost), number(self.extra), number(self.malformed))
    }
}

impl Bench {
    /// E: kills a process when two fifths of the load are acknowledged. The publisher continues as soon as it can.
    pub async fn kill(&mut self, kind: Kind, victim: Victim, messages: u64) -> anyhow::Result<Left> {
        drop(kind.prepare(&self.database).await?);
        // Messages in the memory of a killed broker are lost for every consumer.
        let mut broker = Broker::start(Queues::Process)?;
        let mut consumer = kind.start(&broker, &self.database, 1)?;
        consumer.await_ready(&broker)?;
        let acknowledged = Arc::new(AtomicU64::new(0));
        let (port, counter, packets) = (broker.port, acknowledged.clone(), load(messages, Content::Readings(1)));
        let loader = tokio::task::spawn_blocking(move || deliver(port, packets, &counter));
        while acknowledged.load(Ordering::Relaxed) < messages * 2 / 5 {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
        match victim {
            Victim::Consumer => {
                consumer.process.kill()?;
                tokio::time::sleep(AWAY).await;
                consumer = kind.start(&broker, &self.database, 1)?;
            }
            Victim::Database => self.database.restart().await?,
            Victim::Broker => broker.restart()?,
        }
        loader.await?;
        let left = self.left(kind, acknowledged.load(Ordering::Relaxed), messages).await;
        drop(consumer);
        left
    }

    /// F: a load in which five percent of the messages are repeated, one percent is malformed, and one percent is late.
    pub async fn mix(&self, kind: Kind, messages: u64) -> anyhow::Result<Left> {
        drop(kind.prepare(&self.database).await?);
        let broker = Broker::start(self.queues)?;
        let consumer = kind.start(&broker, &self.database, 1)?;
        consumer.await_ready(&broker)?;
        let (port, packets) = (broker.port, load(messages, Content::Mixed));
        tokio::task::spawn_blocking(move || deliver(port, packets, &AtomicU64::new(0))).await?;
        let (_, valid) = mixture(messages);
        let left = self.left(kind, valid, valid).await;
        drop(consumer);
        left
    }

    /// Waits until no more rows arrive. `acknowledged` is the number of valid acknowledged readings, `messages` that of expected ones.
    async fn left(&self, kind: Kind, acknowledged: u64, messages: u64) -> anyhow::Result<Left> {
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
        let letters = if kind == Kind::Worker {
            let letters: i64 = client.query_one("SELECT count(*) FROM fleetwright.dead_letter", &[]).await?.get(0);
            Some(u64::try_from(letters)?)
        } else {
            None
        };
        Ok(Left { lost: acknowledged.saturating_sub(number(0)?), extra: number(1)?, malformed: number(2)?, letters })
    }
}
