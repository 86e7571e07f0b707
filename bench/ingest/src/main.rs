//! Benchmarks the ingest worker between Mosquitto and TimescaleDB, and compares it with its peers and with two limits:
//! L1 is a binary COPY of the same rows into the same table, 10,000 rows per transaction; L2 is a subscriber that
//! only counts and acknowledges.

#![allow(clippy::print_stdout, clippy::print_stderr, reason = "the table is for people")]
#![allow(clippy::cast_precision_loss, reason = "rates")]

mod consumer;
mod faults;
mod load;
mod measure;
mod packet;
mod parts;
mod run;

use std::fmt;
use std::time::Duration;

use anyhow::Context;
use clap::{Parser, Subcommand, ValueEnum};

use self::consumer::Kind;
use self::faults::Victim;
use self::load::{Content, mixture};
use self::measure::{Line, Measured, median};
use self::packet::Client as Mqtt;
use self::parts::{Database, Queues, TOPIC, now};
use self::run::Bench;

/// Readings per message in scenario B.
const READINGS: u64 = 100;

/// Rate of the paced load, in messages per second, if the run has not measured A.
const PACE: f64 = 20_000.0;

/// Compares the ingest worker with its peers and with the limits of broker and database. The loader uses the same processors.
/// Run nothing else on the machine.
#[derive(Parser)]
#[command(version, about)]
struct Arguments {
    /// Messages per measurement in A, E and F; D uses half
    #[arg(long, default_value_t = 300_000)]
    messages: u64,

    /// Rows per measurement in B
    #[arg(long, default_value_t = 2_000_000)]
    rows: u64,

    /// Messages in the queue of C
    #[arg(long, default_value_t = 1_000_000)]
    queued: u64,

    /// Number of measurements of each kind in A to D; the median is reported
    #[arg(long, default_value_t = 3)]
    rounds: usize,

    /// What to measure; default: all
    #[arg(long = "scenario", value_enum)]
    scenarios: Vec<Scenario>,

    /// Consumers to measure; default: worker, Telegraf, Python and Node-RED, and in F all three Telegraf variants
    #[arg(long = "consumer", value_enum)]
    consumers: Vec<Kind>,

    /// Where the broker stores the queues of A to D; default: in memory, then, for the worker, with durability Process
    #[arg(long, value_enum)]
    queues: Option<Queues>,

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
    /// Consumer, database and broker are killed under load
    E,
    /// Five percent of the messages are repeated, one percent is malformed, one percent is late
    F,
}

#[derive(Subcommand)]
enum Internal {
    /// Counts and acknowledges (the process of L2)
    #[command(hide = true)]
    Count { port: u16, messages: u64, subscribe: String, pause_milliseconds: u64 },
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let arguments = Arguments::parse();
    if let Some(Internal::Count { port, messages, subscribe, pause_milliseconds }) = arguments.command {
        let pause = Duration::from_millis(pause_milliseconds);
        return count(port, messages, subscribe == "true", (!pause.is_zero()).then_some(pause));
    }
    let database = Database::start().await?;
    let mut run = Run { bench: Bench { database, queues: Queues::Memory }, arguments };
    let queues = run.arguments.queues;
    run.rates(queues.unwrap_or(Queues::Memory), &run.consumers(&[])).await?;
    run.faults().await?;
    if queues.is_none() {
        run.rates(Queues::Process, &[Kind::Worker]).await?;
    }
    Ok(())
}

/// Counts, prints the time of the last message, and waits until its resource use has been read.
fn count(port: u16, messages: u64, subscribe: bool, pause: Option<Duration>) -> anyhow::Result<()> {
    let mut client = Mqtt::connect(port, "counter", false)?;
    if subscribe {
        // Otherwise the session is there already, and messages come at once.
        client.subscribe(TOPIC)?;
    }
    client.count(messages, pause)?;
    eprintln!("{}", now());
    std::thread::park();
    Ok(())
}

/// A run of the benchmark.
struct Run {
    arguments: Arguments,
    bench: Bench,
}

impl Run {
    fn wants(&self, scenario: Scenario) -> bool {
        self.arguments.scenarios.is_empty() || self.arguments.scenarios.contains(&scenario)
    }

    /// Whom to measure; says who is not there.
    fn consumers(&self, beyond: &[Kind]) -> Vec<Kind> {
        let mut kinds = self.arguments.consumers.clone();
        if kinds.is_empty() {
            kinds = [&[Kind::Worker, Kind::Telegraf, Kind::Python, Kind::NodeRed], beyond].concat();
        }
        for kind in kinds.extract_if(.., |kind| !kind.is_there()) {
            println!("{kind} is not measured: it could not be built here.\n");
        }
        kinds
    }

    /// A to D.
    async fn rates(&mut self, queues: Queues, kinds: &[Kind]) -> anyhow::Result<()> {
        self.bench.queues = queues;
        let Arguments { messages, rows, queued, .. } = self.arguments;
        if [Scenario::A, Scenario::B, Scenario::C, Scenario::D].iter().all(|scenario| !self.wants(*scenario)) {
            return Ok(());
        }
        let held = if queues == Queues::Memory { "in memory" } else { "durability Process" };
        println!("Queues of the broker: {held}\n\n{}", measure::HEAD);
        let mut paces = Vec::new();
        if self.wants(Scenario::A) {
            let subjects = [&[Subject::Count, Subject::Gather], &*consumers(kinds)].concat();
            paces = self.compare("A: one reading a message, messages/s", &subjects, messages, Content::Readings(1)).await?;
        }
        if self.wants(Scenario::B) {
            let subjects = [&[Subject::Copy], &*consumers(kinds)].concat();
            self.compare("B: 100 readings a message, rows/s", &subjects, rows, Content::Readings(READINGS)).await?;
        }
        if self.wants(Scenario::C) {
            let drains: Vec<Subject> = kinds.iter().map(|kind| Subject::Drain(*kind)).collect();
            let subjects = [&[Subject::CountQueue], &*drains].concat();
            self.compare("C: drain of a queue, messages/s", &subjects, queued, Content::Readings(1)).await?;
        }
        if self.wants(Scenario::D) {
            for kind in kinds {
                let pace = paces.iter().find(|(measured, _)| measured == kind).map_or(PACE, |(_, rate)| rate / 2.0);
                let name = format!("D: from publish to commit, at {} messages/s", measure::thousands(pace));
                self.compare(&name, &[Subject::Pace(*kind, pace)], messages / 2, Content::Live).await?;
            }
        }
        println!();
        Ok(())
    }

    /// Measures these in turn, so that all of them see the same machine, and prints a line for each. The first one is the limit.
    /// The rates of the consumers.
    async fn compare(&mut self, name: &str, subjects: &[Subject], count: u64, content: Content) -> anyhow::Result<Vec<(Kind, f64)>> {
        let mut measured = vec![Vec::new(); subjects.len()];
        for _ in 0..self.arguments.rounds.max(1) {
            for (subject, results) in subjects.iter().zip(&mut measured) {
                results.push(subject.measure(&self.bench, count, content).await?);
            }
        }
        let medians = measured.into_iter().map(median).collect::<Option<Vec<Measured>>>().context("no round")?;
        let found: Vec<(Subject, Measured)> = subjects.iter().copied().zip(medians).collect();
        let worker = found.iter().find(|(subject, _)| subject.kind() == Some(Kind::Worker)).map(|(_, measured)| *measured);
        let limit = found.first().filter(|(subject, _)| subject.kind().is_none()).map(|(_, measured)| *measured);
        for (subject, measured) in &found {
            let limit = if subject.is_limit() { None } else { limit };
            let worker = if subject.kind().is_none_or(|kind| kind == Kind::Worker) { None } else { worker };
            println!("{}", Line { scenario: name, name: subject, measured: *measured, limit, worker });
        }
        Ok(found.iter().filter_map(|(subject, measured)| Some((subject.kind()?, measured.rate))).collect())
    }

    /// E and F.
    async fn faults(&mut self) -> anyhow::Result<()> {
        let messages = self.arguments.messages;
        if self.wants(Scenario::E) {
            println!("{}", faults::HEAD);
            for victim in [Victim::Consumer, Victim::Database, Victim::Broker] {
                for kind in self.consumers(&[]) {
                    let left = self.bench.kill(kind, victim, messages).await?;
                    println!("{}", left.line(&format!("E: kill -9 of the {victim}"), kind));
                }
            }
            println!();
        }
        if self.wants(Scenario::F) {
            let (malformed, valid) = mixture(messages);
            println!("{messages} messages, of which {malformed} are malformed; {valid} valid readings.\n\n{}", faults::HEAD);
            self.bench.queues = Queues::Memory;
            for kind in self.consumers(&[Kind::TelegrafUnique, Kind::TelegrafTrigger]) {
                let left = self.bench.mix(kind, messages).await?;
                println!("{}", left.line("F: repeated, malformed, late", kind));
            }
            println!();
        }
        Ok(())
    }
}

/// What one measurement is of.
#[derive(Clone, Copy)]
enum Subject {
    /// L2
    Count,
    /// L2 that gathers its acknowledgements
    Gather,
    /// L2 of a drain
    CountQueue,
    /// L1
    Copy,
    Load(Kind),
    Drain(Kind),
    Pace(Kind, f64),
}

fn consumers(kinds: &[Kind]) -> Vec<Subject> {
    kinds.iter().map(|kind| Subject::Load(*kind)).collect()
}

impl Subject {
    fn kind(self) -> Option<Kind> {
        match self {
            Self::Load(kind) | Self::Drain(kind) | Self::Pace(kind, _) => Some(kind),
            _ => None,
        }
    }

    fn is_limit(self) -> bool {
        matches!(self, Self::Count | Self::CountQueue | Self::Copy)
    }

    async fn measure(self, bench: &Bench, count: u64, content: Content) -> anyhow::Result<Measured> {
        match self {
            Self::Count => bench.count(count, false),
            Self::Gather => bench.count(count, true),
            Self::CountQueue => bench.count_queue(count),
            Self::Copy => bench.copy(count, READINGS).await,
            Self::Load(kind) => bench.load(kind, count, content, None).await,
            Self::Drain(kind) => bench.drain(kind, count).await,
            Self::Pace(kind, pace) => bench.load(kind, count, content, Some(pace)).await,
        }
    }
}

impl fmt::Display for Subject {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Count | Self::CountQueue => formatter.write_str("L2: counting subscriber"),
            Self::Gather => formatter.write_str("L2, acknowledging every 4 ms"),
            Self::Copy => formatter.write_str("L1: COPY alone"),
            Self::Load(kind) | Self::Drain(kind) | Self::Pace(kind, _) => kind.fmt(formatter),
        }
    }
}
