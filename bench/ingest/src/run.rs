//! Scenarios A to D, and their limits.

use std::time::{Duration, Instant};

use anyhow::Context;
use bytes::Bytes;
use futures::SinkExt;
use tokio_postgres::Client;

use crate::consumer::Kind;
use crate::load::{COPY_ROWS, Content, PARTS, load, part_rows, rows};
use crate::measure::{Before, Measured};
use crate::parts::{Broker, Counter, Database, Queues, now};
use crate::publisher::publish;
use crate::subscriber::{Subscriber, create_session};

/// Time without new rows after which the missing rows are lost. Within this time, every consumer reconnects at least once to a
/// database or a broker that was restarted.
const MAX_WAIT: Duration = Duration::from_secs(10);

/// Time without new rows before they are counted.
const QUIET: Duration = Duration::from_millis(300);

/// Adds the values of the staged readings to the rows of the table.
const UPSERT: &str = "INSERT INTO load AS stored SELECT * FROM staging ORDER BY time, device_id ON CONFLICT (time, device_id) DO UPDATE SET
    rms = COALESCE(stored.rms, excluded.rms), temperature = COALESCE(stored.temperature, excluded.temperature),
    state = COALESCE(stored.state, excluded.state), count = COALESCE(stored.count, excluded.count)";

/// The number of rows with all their values.
const COMPLETE: &str = "SELECT count(*) FROM load WHERE (rms, temperature, state, count) IS NOT NULL";

/// The components that all measurements share.
pub struct Bench {
    /// PostgreSQL.
    pub database: Database,
    /// Where the broker stores its queues.
    pub queues: Queues,
}

/// The stored rows.
pub struct Stored {
    /// Number of rows.
    pub rows: u64,
    /// Time of the last commit, in seconds since 1970.
    pub last: f64,
}

impl Bench {
    /// L2 of A: a load that is counted and acknowledged.
    pub async fn count(&self, subscriber: Subscriber, messages: u64) -> anyhow::Result<Measured> {
        let broker = Broker::start(self.queues)?;
        let load = load(messages, Content::Readings(1));
        let counter = Counter::start(subscriber, &broker, messages, true)?;
        broker.await_subscriber()?;
        let begun = now();
        publish(broker.port, load, None).await?;
        Self::counted(&counter, &broker, messages, begun, 0.0)
    }

    /// L2 of C: a queue that is counted and acknowledged.
    pub async fn count_queue(&self, subscriber: Subscriber, messages: u64) -> anyhow::Result<Measured> {
        let broker = Broker::start(self.queues)?;
        create_session(broker.port).await?;
        broker.await_subscriber()?;
        publish(broker.port, load(messages, Content::Readings(1)), None).await?;
        let (before, begun) = (broker.processor(), now());
        let counter = Counter::start(subscriber, &broker, messages, false)?;
        Self::counted(&counter, &broker, messages, begun, before)
    }

    fn counted(counter: &Counter, broker: &Broker, messages: u64, begun: f64, before: f64) -> anyhow::Result<Measured> {
        let took = counter.await_end()? - begun;
        let usage = counter.process.usage()?;
        Ok(Measured {
            rate: messages as f64 / took,
            consumer: usage.processor * 1e6 / messages as f64,
            broker: (broker.processor() - before) * 1e6 / messages as f64,
            memory: usage.memory,
            ..Measured::default()
        })
    }

    /// L1: the same rows by COPY.
    pub async fn copy(&self, count: u64, readings: u64) -> anyhow::Result<Measured> {
        let client = Kind::Worker.prepare(&self.database, Content::Readings(readings)).await?;
        let batches: Vec<Bytes> = (0..count.div_ceil(COPY_ROWS)).map(|batch| rows(batch * COPY_ROWS, count, readings)).collect();
        let statement = client.prepare("COPY load (time, device_id, rms, temperature, state, count) FROM STDIN (FORMAT binary)").await?;
        let (before, begun) = (self.database.processor(), Instant::now());
        for batch in batches {
            let mut sink = std::pin::pin!(client.copy_in::<_, Bytes>(&statement).await?);
            sink.send(batch).await?;
            sink.finish().await?;
        }
        let rate = count as f64 / begun.elapsed().as_secs_f64();
        Ok(Measured { rate, database: (self.database.processor() - before) * 1e6 / count as f64, ..Measured::default() })
    }

    /// L1 of G: the same readings by COPY into a staging table and an upsert. The rate is that of the readings.
    pub async fn upsert(&self, rows: u64, readings: u64) -> anyhow::Result<Measured> {
        let client = Kind::Worker.prepare(&self.database, Content::Parts(readings)).await?;
        let count = rows * PARTS;
        let batches: Vec<Bytes> = (0..count / COPY_ROWS).map(|batch| part_rows(batch, readings)).collect();
        client.batch_execute("CREATE TEMPORARY TABLE staging AS SELECT * FROM load WITH NO DATA").await?;
        let copy = client.prepare("COPY staging (time, device_id, rms, temperature, state, count) FROM STDIN (FORMAT binary)").await?;
        let upsert = client.prepare(UPSERT).await?;
        let (before, begun) = (self.database.processor(), Instant::now());
        for batch in batches {
            client.batch_execute("BEGIN; TRUNCATE staging").await?;
            let mut sink = std::pin::pin!(client.copy_in::<_, Bytes>(&copy).await?);
            sink.send(batch).await?;
            sink.finish().await?;
            client.execute(&upsert, &[]).await?;
            client.batch_execute("COMMIT").await?;
        }
        let rate = count as f64 / begun.elapsed().as_secs_f64();
        let database = (self.database.processor() - before) * 1e6 / count as f64;
        let stored: i64 = client.query_one(COMPLETE, &[]).await?.get(0);
        Ok(Measured { rate, database, lost: rows.saturating_sub(u64::try_from(stored)?), ..Measured::default() })
    }

    /// A, B, D and G: a consumer under load. The rate is that of the readings.
    pub async fn load(&self, kind: Kind, rows: u64, content: Content, pace: Option<f64>) -> anyhow::Result<Measured> {
        let client = kind.prepare(&self.database, content).await?;
        let broker = Broker::start(self.queues)?;
        let consumer = kind.start(&broker, &self.database, content)?;
        consumer.await_ready(&broker)?;
        let messages = rows / content.readings() * content.parts();
        let load = load(messages, content);
        let before = Before::now(Some(&consumer), &broker, &self.database)?;
        let begun = now();
        publish(broker.port, load, pace).await?;
        let stored = self.settle(&client, rows).await?;
        let rate = (stored.rows * content.parts()) as f64 / (stored.last - begun);
        let measured = before.until(&consumer, &broker, &self.database, (messages, rows * content.parts()), rate)?;
        let latency = if pace.is_some() { Some(latency(&client).await?) } else { None };
        Ok(Measured { latency, lost: rows.saturating_sub(stored.rows), ..measured })
    }

    /// C: a consumer starts again, and its queue is full.
    pub async fn drain(&self, kind: Kind, messages: u64) -> anyhow::Result<Measured> {
        let content = Content::Readings(1);
        let client = kind.prepare(&self.database, content).await?;
        let broker = Broker::start(self.queues)?;
        let consumer = kind.start(&broker, &self.database, content)?;
        consumer.await_ready(&broker)?;
        drop(consumer);
        publish(broker.port, load(messages, content), None).await?;
        let before = Before::now(None, &broker, &self.database)?;
        let begun = now();
        let consumer = kind.start(&broker, &self.database, content)?;
        let stored = self.settle(&client, messages).await?;
        let rate = stored.rows as f64 / (stored.last - begun);
        let measured = before.until(&consumer, &broker, &self.database, (messages, messages), rate)?;
        Ok(Measured { lost: messages.saturating_sub(stored.rows), ..measured })
    }

    /// Waits until this number of rows is stored, or no more arrive. Polls the position of the write-ahead log, because counting the rows would
    /// use the database's processor.
    pub async fn settle(&self, client: &Client, rows: u64) -> anyhow::Result<Stored> {
        let (mut written, mut since, mut counted) = (-1, Instant::now(), Instant::now());
        loop {
            let found: i64 = client.query_one("SELECT (pg_current_wal_insert_lsn() - '0/0')::int8", &[]).await?.get(0);
            if found != written {
                (written, since) = (found, Instant::now());
            }
            let quiet = since.elapsed();
            if quiet > QUIET && (counted.elapsed() > 2 * QUIET || quiet > MAX_WAIT) {
                let count: i64 = client.query_one(COMPLETE, &[]).await?.get(0);
                counted = Instant::now();
                if u64::try_from(count)? >= rows || quiet > MAX_WAIT {
                    let last = "SELECT COALESCE(max(extract(epoch FROM pg_xact_commit_timestamp(xmin))), 0)::float8 FROM load";
                    return Ok(Stored { rows: u64::try_from(count)?, last: client.query_one(last, &[]).await?.get(0) });
                }
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }
}

/// Latency from publish to commit: median and 99th percentile, in milliseconds.
async fn latency(client: &Client) -> anyhow::Result<(f64, f64)> {
    let row = client
        .query_one(
            "SELECT percentile_cont(ARRAY[0.5, 0.99]) WITHIN GROUP (ORDER BY extract(epoch FROM pg_xact_commit_timestamp(xmin) - time)::float8 * 1000)
             FROM load",
            &[],
        )
        .await?;
    let found: Vec<f64> = row.get(0);
    found.first().zip(found.get(1)).map(|(middle, late)| (*middle, *late)).context("expected two percentiles, found fewer")
}
