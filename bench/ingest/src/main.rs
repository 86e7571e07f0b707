//! Benchmarks the ingest worker between Mosquitto and TimescaleDB, and compares it with its peers and with two limits:
//! L1 is a binary COPY of the same rows into the same table, 10,000 rows per transaction; L2 is a subscriber that
//! only counts and acknowledges.

#![allow(clippy::print_stdout, clippy::print_stderr, reason = "a benchmark prints its results")]
#![allow(clippy::cast_precision_loss, reason = "rates")]

mod consumer;
mod faults;
mod load;
mod measure;
mod parts;
mod publisher;
mod run;
mod subscriber;

use std::fmt;

use anyhow::Context;
use clap::{Parser, Subcommand, ValueEnum};

use self::consumer::Kind;
use self::faults::Victim;
use self::load::{Content, mixture};
use self::measure::{Line, Measured, median};
use self::parts::{Database, Queues, client_runtime, now};
use self::run::Bench;
use self::subscriber::Subscriber;

/// As in the worker. It matters for the subscriber with the client library, which allocates for each message.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

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

    /// Consumers to measure; default: worker, Telegraf, Python and Node-RED, and in F all three Telegraf variants; none if only
    /// subscribers are given
    #[arg(long = "consumer", value_enum)]
    consumers: Vec<Kind>,

    /// Subscribers to measure in A and C, which only count and acknowledge (L2); the first one is the limit; default: immediate, and
    /// in A collecting
    #[arg(long = "subscriber", value_enum)]
    subscribers: Vec<Subscriber>,

    /// Where the broker stores the queues of A to D; default: in memory, then, for the worker, with durability Process
    #[arg(long, value_enum)]
    queues: Option<Queues>,

    #[command(subcommand)]
    command: Option<Internal>,
}

#[derive(Clone, Copy, PartialEq, ValueEnum)]
enum Scenario {
    /// One reading per message
    A,
    /// One hundred readings per message
    B,
    /// A consumer drains a queue
    C,
    /// Latency from publish to commit, at half of the rate in A
    D,
    /// Consumer, database and broker are killed under load
    E,
    /// Five percent of the messages are repeated, one percent is malformed, one percent is late
    F,
    /// Each row arrives in four messages, one for each field
    G,
}

#[derive(Subcommand)]
enum Internal {
    /// The process of a counting subscriber
    #[command(hide = true)]
    Count { subscriber: Subscriber, port: u16, messages: u64, subscribe: String },
}

fn main() -> anyhow::Result<()> {
    let arguments = Arguments::parse();
    if let Some(Internal::Count { subscriber, port, messages, subscribe }) = arguments.command {
        return count(subscriber, port, messages, subscribe == "true");
    }
    tokio::runtime::Runtime::new()?.block_on(run(arguments))
}

async fn run(arguments: Arguments) -> anyhow::Result<()> {
    let database = Database::start().await?;
    let mut run = Run { bench: Bench { database, queues: Queues::Memory }, arguments };
    let queues = run.arguments.queues;
    run.rates(queues.unwrap_or(Queues::Memory), &run.consumers(&[])).await?;
    run.faults().await?;
    if queues.is_none() && !run.only_subscribers() {
        run.rates(Queues::Process, &[Kind::Worker]).await?;
    }
    Ok(())
}

/// Counts, prints the time of the last message, and waits until the benchmark has read its resource use.
fn count(subscriber: Subscriber, port: u16, messages: u64, subscribe: bool) -> anyhow::Result<()> {
    client_runtime()?.block_on(subscriber.count(port, messages, subscribe))?;
    eprintln!("{}", now());
    loop {
        std::thread::park();
    }
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

    fn only_subscribers(&self) -> bool {
        self.arguments.consumers.is_empty() && !self.arguments.subscribers.is_empty()
    }

    /// The selected subscribers, or the default ones.
    fn subscribers(&self, default: &[Subscriber]) -> Vec<Subscriber> {
        let selected = &self.arguments.subscribers;
        if selected.is_empty() { default.to_vec() } else { selected.clone() }
    }

    /// The selected consumers; by default the usual ones and `more`. Prints which of them are not installed.
    fn consumers(&self, more: &[Kind]) -> Vec<Kind> {
        if self.only_subscribers() {
            return Vec::new();
        }
        let mut kinds = self.arguments.consumers.clone();
        if kinds.is_empty() {
            kinds = [&[Kind::Worker, Kind::Telegraf, Kind::Python, Kind::NodeRed], more].concat();
        }
        for kind in kinds.extract_if(.., |kind| !kind.is_installed()) {
            println!("{kind} is not measured: it could not be built on this machine.\n");
        }
        kinds
    }

    /// A to D, and G.
    async fn rates(&mut self, queues: Queues, kinds: &[Kind]) -> anyhow::Result<()> {
        self.bench.queues = queues;
        let Arguments { messages, rows, queued, .. } = self.arguments;
        if [Scenario::A, Scenario::B, Scenario::C, Scenario::D, Scenario::G].iter().all(|scenario| !self.wants(*scenario)) {
            return Ok(());
        }
        let storage = if queues == Queues::Memory { "in memory" } else { "durability Process" };
        println!("Queues of the broker: {storage}\n\n{}", measure::HEADER);
        let mut paces = Vec::new();
        if self.wants(Scenario::A) {
            let limits = self.subscribers(&[Subscriber::Immediate, Subscriber::Collecting]);
            let subjects: Vec<Subject> = limits.into_iter().map(Subject::Count).chain(kinds.iter().copied().map(Subject::Load)).collect();
            paces = self.compare("A: one reading per message, messages/s", &subjects, messages, Content::Readings(1)).await?;
        }
        if self.wants(Scenario::B) && !self.only_subscribers() {
            let subjects: Vec<Subject> = [Subject::Copy].into_iter().chain(kinds.iter().copied().map(Subject::Load)).collect();
            self.compare("B: 100 readings per message, rows/s", &subjects, rows, Content::Readings(READINGS)).await?;
        }
        if self.wants(Scenario::C) {
            let limits = self.subscribers(&[Subscriber::Immediate]);
            let drains = kinds.iter().copied().map(Subject::Drain);
            let subjects: Vec<Subject> = limits.into_iter().map(Subject::CountQueue).chain(drains).collect();
            self.compare("C: drain of a queue, messages/s", &subjects, queued, Content::Readings(1)).await?;
        }
        if self.wants(Scenario::D) {
            for kind in kinds {
                let pace = paces.iter().find(|(measured, _)| measured == kind).map_or(PACE, |(_, rate)| rate / 2.0);
                let name = format!("D: latency from publish to commit, at {} messages/s", measure::thousands(pace));
                self.compare(&name, &[Subject::Pace(*kind, pace)], messages / 2, Content::Live).await?;
            }
        }
        if self.wants(Scenario::G) && !self.only_subscribers() {
            let kinds = Self::merging(kinds);
            let subjects: Vec<Subject> = [Subject::Upsert].into_iter().chain(kinds.into_iter().map(Subject::Load)).collect();
            self.compare("G: each row in four messages, readings/s", &subjects, rows / 2, Content::Parts(READINGS)).await?;
        }
        println!();
        Ok(())
    }

    /// The selected consumers that merge rows.
    fn merging(kinds: &[Kind]) -> Vec<Kind> {
        let has_telegraf = kinds.contains(&Kind::Telegraf) && Kind::TelegrafMerge.is_installed();
        let mut kinds: Vec<Kind> = kinds.iter().copied().filter(|kind| matches!(kind, Kind::Worker | Kind::TelegrafMerge)).collect();
        if has_telegraf && !kinds.contains(&Kind::TelegrafMerge) {
            kinds.push(Kind::TelegrafMerge);
        }
        kinds
    }

    /// Measures the subjects one after another in each round, so that a change of the machine's speed affects all of them. Prints a
    /// line for each. The first subject is the limit, unless it is a consumer. Returns the rates of the consumers.
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
        for (index, (subject, measured)) in found.iter().enumerate() {
            let limit = if index == 0 { None } else { limit };
            let worker = if subject.kind().is_none_or(|kind| kind == Kind::Worker) { None } else { worker };
            println!("{}", Line { scenario: name, name: subject, measured: *measured, limit, worker });
        }
        Ok(found.iter().filter_map(|(subject, measured)| Some((subject.kind()?, measured.rate))).collect())
    }

    /// E and F.
    async fn faults(&mut self) -> anyhow::Result<()> {
        let messages = self.arguments.messages;
        if self.wants(Scenario::E) {
            println!("{}", faults::HEADER);
            for victim in [Victim::Consumer, Victim::Database, Victim::Broker] {
                for kind in self.consumers(&[]) {
                    let outcome = self.bench.kill(kind, victim, messages).await?;
                    println!("{}", outcome.line(&format!("E: kill -9 of the {victim}"), kind));
                }
            }
            println!();
        }
        if self.wants(Scenario::F) {
            let (malformed, valid) = mixture(messages);
            println!("{messages} messages, of which {malformed} are malformed; {valid} valid readings.\n\n{}", faults::HEADER);
            self.bench.queues = Queues::Memory;
            for kind in self.consumers(&[Kind::TelegrafUnique, Kind::TelegrafTrigger]) {
                let outcome = self.bench.mix(kind, messages).await?;
                println!("{}", outcome.line("F: repeated, malformed, late", kind));
            }
            println!();
        }
        Ok(())
    }
}

/// The subject of a measurement.
#[derive(Clone, Copy)]
enum Subject {
    /// L2 of A
    Count(Subscriber),
    /// L2 of C
    CountQueue(Subscriber),
    /// L1
    Copy,
    /// L1 of G
    Upsert,
    /// A consumer in A or B
    Load(Kind),
    /// A consumer in C
    Drain(Kind),
    /// A consumer in D, at this rate
    Pace(Kind, f64),
}

impl Subject {
    fn kind(self) -> Option<Kind> {
        match self {
            Self::Load(kind) | Self::Drain(kind) | Self::Pace(kind, _) => Some(kind),
            _ => None,
        }
    }

    async fn measure(self, bench: &Bench, count: u64, content: Content) -> anyhow::Result<Measured> {
        match self {
            Self::Count(subscriber) => bench.count(subscriber, count).await,
            Self::CountQueue(subscriber) => bench.count_queue(subscriber, count).await,
            Self::Copy => bench.copy(count, READINGS).await,
            Self::Upsert => bench.upsert(count, READINGS).await,
            Self::Load(kind) => bench.load(kind, count, content, None).await,
            Self::Drain(kind) => bench.drain(kind, count).await,
            Self::Pace(kind, pace) => bench.load(kind, count, content, Some(pace)).await,
        }
    }
}

impl fmt::Display for Subject {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Count(subscriber) | Self::CountQueue(subscriber) => subscriber.fmt(formatter),
            Self::Copy => formatter.write_str("L1: COPY alone"),
            Self::Upsert => formatter.write_str("L1: COPY and upsert alone"),
            Self::Load(kind) | Self::Drain(kind) | Self::Pace(kind, _) => kind.fmt(formatter),
        }
    }
}
