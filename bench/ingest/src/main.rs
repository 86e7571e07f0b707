//! Measures the ingest worker between a real Mosquitto and a real TimescaleDB, beside the limits of both:
//! L1 a binary COPY of the same rows into the same table, 10,000 rows a transaction, and nothing else; L2 a subscriber that
//! only counts and acknowledges.

#![allow(clippy::print_stdout, reason = "the table is for people")]
#![allow(clippy::cast_precision_loss, reason = "rates")]

mod packet;
mod parts;

use std::time::{Duration, Instant};

use anyhow::Context;
use bytes::{BufMut, Bytes, BytesMut};
use clap::{Parser, Subcommand, ValueEnum};
use fleetwright::api::PipelineSpec;
use fleetwright::timescale::connect::{connect, drive};
use fleetwright::timescale::execute::apply;
use fleetwright::timescale::schema::{Owner, desired};
use fleetwright::timescale::uri::ConnectionUri;
use futures::SinkExt;
use serde_json::{Value, json};
use tokio_postgres::Client;

use self::packet::{Client as Mqtt, DEVICES, publish};
use self::parts::{Broker, Database, Usage, Worker, counter};

/// 2026-05-04T03:02:01.5Z in microseconds since 1970: the time of the first reading.
const START: u64 = 1_777_863_721_500_000;

/// Seconds from 1970 to 2000, PostgreSQL's epoch.
const EPOCH: u64 = 946_684_800;

/// Rows of a transaction of L1.
const COPY_ROWS: u64 = 10_000;

/// Readings of a message in scenario B.
const READINGS: u64 = 100;

const TOPIC: &str = "devices/+/telemetry";

#[derive(Parser)]
#[command(version, about)]
struct Arguments {
    /// Rows of a measurement
    #[arg(long, default_value_t = 500_000)]
    messages: u64,

    /// Measurements of each kind, of which the median counts
    #[arg(long, default_value_t = 3)]
    rounds: usize,

    /// What to measure; all without it
    #[arg(long = "scenario", value_enum)]
    scenarios: Vec<Scenario>,

    #[command(subcommand)]
    command: Option<Internal>,
}

#[derive(Clone, Copy, PartialEq, ValueEnum)]
enum Scenario {
    /// One reading a message
    A,
    /// A hundred readings a message
    B,
    /// Drain of a queue
    C,
    /// Paced at half of A: from publish to commit
    D,
}

#[derive(Subcommand)]
enum Internal {
    /// Counts and acknowledges (the process of L2)
    #[command(hide = true)]
    Count { port: u16, messages: u64, clean: String },
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let arguments = Arguments::parse();
    if let Some(Internal::Count { port, messages, clean }) = arguments.command {
        let mut client = Mqtt::connect(port, "counter", clean == "true")?;
        if clean == "true" {
            // Otherwise the session is there already, and messages come at once.
            client.subscribe(TOPIC)?;
        }
        client.count(messages)?;
        // The usage is read before the process ends.
        std::thread::sleep(Duration::from_secs(1));
        return Ok(());
    }
    let bench = Bench { messages: arguments.messages, rounds: arguments.rounds, database: Database::start().await? };
    let wants = |scenario| arguments.scenarios.is_empty() || arguments.scenarios.contains(&scenario);
    println!("| | rate | of the limit | processor a message | memory |\n|---|---:|---:|---:|---:|");
    let mut half = 20_000.0;
    if wants(Scenario::A) {
        let limit = bench.median(async |bench| bench.count(false)).await?;
        let worker = bench.median(async |bench| bench.load(1, None).await).await?;
        limit.print("L2: counting subscriber, messages/s", None);
        worker.print("A: worker, one reading a message, messages/s", Some(limit));
        half = worker.rate / 2.0;
    }
    if wants(Scenario::B) {
        let limit = bench.median(async |bench| bench.copy().await).await?;
        let worker = bench.median(async |bench| bench.load(READINGS, None).await).await?;
        limit.print("L1: COPY alone, rows/s", None);
        worker.print("B: worker, 100 readings a message, rows/s", Some(limit));
    }
    if wants(Scenario::C) {
        let limit = bench.median(async |bench| bench.count(true)).await?;
        let worker = bench.median(async |bench| bench.drain().await).await?;
        limit.print("L2: counting subscriber, draining, messages/s", None);
        worker.print("C: worker, draining, messages/s", Some(limit));
    }
    if wants(Scenario::D) {
        let paced = bench.load(1, Some(half)).await?;
        let (middle, late) = bench.latency().await?;
        println!(
            "| D: {:.0} messages/s: publish to commit p50 {middle:.1} ms, p99 {late:.1} ms | | | {:.1} µs | {:.0} MiB |",
            half, paced.processor, paced.memory
        );
    }
    Ok(())
}

/// One measurement.
#[derive(Clone, Copy)]
struct Measured {
    /// Messages or rows a second.
    rate: f64,
    /// Processor time a message, in microseconds.
    processor: f64,
    /// MiB.
    memory: f64,
}

impl Measured {
    fn new(count: u64, messages: u64, took: Duration, before: Usage, after: Usage) -> Self {
        Self {
            rate: count as f64 / took.as_secs_f64(),
            processor: (after.processor - before.processor) * 1e6 / messages as f64,
            memory: after.memory,
        }
    }

    fn print(&self, name: &str, limit: Option<Self>) {
        let ratio = limit.map(|limit| format!("{:.2}", self.rate / limit.rate)).unwrap_or_default();
        println!("| {name} | {:.0} | {ratio} | {:.1} µs | {:.0} MiB |", self.rate, self.processor, self.memory);
    }
}

struct Bench {
    messages: u64,
    rounds: usize,
    database: Database,
}

impl Bench {
    async fn median(&self, measure: impl AsyncFn(&Self) -> anyhow::Result<Measured>) -> anyhow::Result<Measured> {
        let mut measured = Vec::new();
        for _ in 0..self.rounds.max(1) {
            measured.push(measure(self).await?);
        }
        measured.sort_by(|one, other| one.rate.total_cmp(&other.rate));
        Ok(measured[measured.len() / 2])
    }

    /// Makes the table anew, and the devices where they are not there.
    async fn prepare(&self) -> anyhow::Result<Client> {
        let uri: ConnectionUri = self.database.uri().parse()?;
        let (mut client, connection) = connect(&uri, "bench").await?;
        drive(connection);
        client.batch_execute("DROP TABLE IF EXISTS load").await?;
        let spec: PipelineSpec = serde_json::from_value(json!({
            "source": {"topic": "devices/{device}/telemetry"}, "decode": decode(),
            "sink": {"timescale": {"connectionSecret": {"name": "x"}, "table": "load"}},
        }))?;
        apply(&mut client, &desired(Owner { namespace: "bench".to_owned(), pipeline: "load".to_owned() }, &spec)?).await?;
        client
            .batch_execute(&format!(
                "INSERT INTO fleetwright.device (namespace, name, gateway, enabled)
                 SELECT 'bench', 'device-' || n, 'gateway', true FROM generate_series(0, {DEVICES} - 1) n ON CONFLICT DO NOTHING; CHECKPOINT"
            ))
            .await?;
        Ok(client)
    }

    /// L2: a load, or a queue, that is counted and acknowledged.
    fn count(&self, drain: bool) -> anyhow::Result<Measured> {
        let broker = Broker::start()?;
        if drain {
            // Makes the session.
            Mqtt::connect(broker.port, "counter", false)?.subscribe(TOPIC)?;
            Mqtt::connect(broker.port, "loader", true)?.publish(load(self.messages, 1, false), None)?;
        }
        let packets = if drain { None } else { Some(load(self.messages, 1, false)) };
        let started = Instant::now();
        let counter = counter(&broker, self.messages, !drain)?;
        if !drain {
            std::thread::sleep(Duration::from_millis(500));
        }
        let begun = Instant::now();
        if let Some(packets) = packets {
            Mqtt::connect(broker.port, "loader", true)?.publish(packets, None)?;
            // The last message is acknowledged to the loader when it is on its way to the counter.
            return Ok(Measured::new(self.messages, self.messages, begun.elapsed(), Usage::default(), counter.usage()?));
        }
        // The counter sleeps when it is done: from then on it uses nothing.
        let mut last = f64::NAN;
        let mut since = Instant::now();
        while since.elapsed() < Duration::from_millis(300) || last < 0.01 {
            let used = counter.usage()?.processor;
            if (used - last).abs() > f64::EPSILON || last.is_nan() {
                (last, since) = (used, Instant::now());
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(Measured::new(self.messages, self.messages, since - started, Usage::default(), counter.usage()?))
    }

    /// A and B: the worker under load. Rows count.
    async fn load(&self, readings: u64, rate: Option<f64>) -> anyhow::Result<Measured> {
        let client = self.prepare().await?;
        let broker = Broker::start()?;
        let worker = Worker::start(&broker, &self.database, &decode())?;
        worker.await_ready()?;
        let (port, rows) = (broker.port, self.messages);
        let packets = load(rows, readings, rate.is_some());
        let before = worker.process.usage()?;
        let begun = Instant::now();
        let loader = tokio::task::spawn_blocking(move || Mqtt::connect(port, "loader", true)?.publish(packets, rate));
        loader.await??;
        let took = self.await_rows(&client, begun).await?;
        Ok(Measured::new(rows, rows / readings, took, before, worker.process.usage()?))
    }

    /// C: the worker comes back to a full queue.
    async fn drain(&self) -> anyhow::Result<Measured> {
        let client = self.prepare().await?;
        let broker = Broker::start()?;
        let worker = Worker::start(&broker, &self.database, &decode())?;
        worker.await_ready()?;
        drop(worker);
        Mqtt::connect(broker.port, "loader", true)?.publish(load(self.messages, 1, false), None)?;
        let worker = Worker::start(&broker, &self.database, &decode())?;
        let took = self.await_rows(&client, Instant::now()).await?;
        Ok(Measured::new(self.messages, self.messages, took, Usage::default(), worker.process.usage()?))
    }

    async fn await_rows(&self, client: &Client, begun: Instant) -> anyhow::Result<Duration> {
        // The last message of the load is the newest row, and stands in the last transaction or the one before it.
        loop {
            let newest: bool = client
                .query_one(
                    "SELECT COALESCE((SELECT count FROM load ORDER BY time DESC LIMIT 1) = $1, false)",
                    &[&i64::try_from(self.messages - 1)?],
                )
                .await?
                .get(0);
            if newest {
                let took = begun.elapsed();
                let rows: i64 = client.query_one("SELECT count(*) FROM load", &[]).await?.get(0);
                if u64::try_from(rows)? == self.messages {
                    return Ok(took);
                }
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    /// L1: the same rows by COPY.
    async fn copy(&self) -> anyhow::Result<Measured> {
        let client = self.prepare().await?;
        let batches: Vec<Bytes> = (0..self.messages.div_ceil(COPY_ROWS)).map(|batch| encode(batch * COPY_ROWS, self.messages)).collect();
        let statement = client.prepare("COPY load (time, device_id, rms, temperature, state, count) FROM STDIN (FORMAT binary)").await?;
        let begun = Instant::now();
        for batch in batches {
            let mut sink = std::pin::pin!(client.copy_in::<_, Bytes>(&statement).await?);
            sink.send(batch).await?;
            sink.finish().await?;
        }
        Ok(Measured { rate: self.messages as f64 / begun.elapsed().as_secs_f64(), processor: 0.0, memory: 0.0 })
    }

    /// From publish to commit, median and 99th percentile, in milliseconds.
    async fn latency(&self) -> anyhow::Result<(f64, f64)> {
        let client = self.database.client().await?;
        let row = client
            .query_one(
                "SELECT percentile_cont(ARRAY[0.5, 0.99]) WITHIN GROUP (ORDER BY extract(epoch FROM pg_xact_commit_timestamp(xmin) - time)::float8 * 1000)
                 FROM load",
                &[],
            )
            .await?;
        let found: Vec<f64> = row.get(0);
        found.first().zip(found.get(1)).map(|(middle, late)| (*middle, *late)).context("no row")
    }
}

fn decode() -> Value {
    json!({
        "time": {"pointer": "/ts", "unit": "Microseconds"},
        "fields": [
            {"name": "rms", "type": "Float64", "min": 0, "max": 200, "required": true},
            {"name": "temperature", "type": "Float64", "min": -60, "max": 300},
            {"name": "state", "type": "Text"},
            {"name": "count", "type": "Int64"},
        ],
    })
}

/// Values of a reading: rms, temperature.
fn values(number: u64) -> (f64, f64) {
    ((number % 1_999) as f64 / 100.0, 20.0 + (number % 777) as f64 / 10.0)
}

/// A reading, some 112 bytes long.
fn reading(number: u64, time: u64) -> String {
    let (rms, temperature) = values(number);
    format!(r#"{{"ts":{time},"rms":{rms},"temperature":{temperature},"state":"running","count":{number},"firmware":"2.14.3","rssi":-61}}"#)
}

/// The packets of a load: each message of another device, with so many readings. `live` readings are timed when they are sent.
fn load(rows: u64, readings: u64, live: bool) -> impl Iterator<Item = Vec<u8>> {
    let encode = move |message: u64| {
        let topic = format!("devices/device-{}/telemetry", message % DEVICES);
        let first = message * readings;
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
        let time = |number: u64| if live { u64::try_from(now.as_micros()).unwrap_or(0) } else { START + number * 50 };
        let texts: Vec<String> = (first..first + readings).map(|number| reading(number, time(number))).collect();
        let payload = if readings == 1 { texts.concat() } else { format!("[{}]", texts.join(",")) };
        publish(message, &topic, &payload)
    };
    let messages = rows / readings;
    // Encoded before, so that the loader takes little of the two processors; live readings cannot be.
    let before: Vec<Vec<u8>> = if live { Vec::new() } else { (0..messages).map(encode).collect() };
    before.into_iter().chain((if live { 0..messages } else { 0..0 }).map(encode))
}

/// Rows of the same load as the data of a binary COPY.
fn encode(first: u64, rows: u64) -> Bytes {
    let mut data = BytesMut::from(&b"PGCOPY\n\xff\r\n\0\0\0\0\0\0\0\0\0"[..]);
    for number in first..(first + COPY_ROWS).min(rows) {
        let (rms, temperature) = values(number);
        data.put_i16(6);
        for column in
            [(START + number * 50 - EPOCH * 1_000_000).to_be_bytes(), rms.to_be_bytes(), temperature.to_be_bytes()].iter().enumerate()
        {
            if column.0 == 1 {
                data.put_i32(4);
                data.put_u32(u32::try_from(number % DEVICES).unwrap_or(0) + 1);
            }
            data.put_i32(8);
            data.put_slice(column.1);
        }
        data.put_i32(7);
        data.put_slice(b"running");
        data.put_i32(8);
        data.put_u64(number);
    }
    data.put_i16(-1);
    data.freeze()
}
