//! `fleetwright replay`: puts dead letters through the Pipeline's decoder again, as it is by now.
//!
//! Each page of dead letters is one transaction, which stores what can be stored and takes just that from the dead letters. So
//! a row appears once, also when this is killed, or run again, or run twice at the same time.

mod filter;
mod page;
pub mod wish;

use std::collections::HashMap;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use clap::Args;
use kube::ResourceExt;
use tokio_util::sync::CancellationToken;

use self::filter::{Condition, Filter};
use self::page::{Replayed, Replayer};
use crate::api::Pipeline;
use crate::api::pipeline::Decode;
use crate::api::topic::TopicPattern;
use crate::configuration::ingest::IngestConfiguration;
use crate::database::connect::{connect, drive};
use crate::database::uri::ConnectionUri;
use crate::decode::Decoder;
use crate::sink::timescale::statements::Statements;
use crate::sink::timescale::target::Target;
use crate::sink::timescale::write_probe::probe;
use crate::state::owner::Owner;
use crate::state::registry::follow::Devices;

/// How often progress is printed.
const PROGRESS: Duration = Duration::from_secs(1);

/// How long a statement may take. Counting millions of dead letters takes seconds, on a slow disk a minute.
const STATEMENT_TIMEOUT: &str = "SET statement_timeout = '10min'";

/// Puts dead letters through the decoder of their Pipeline again, as it is by now.
///
/// What is accepted becomes rows and is no dead letter any more; what is refused again stays one, with the reason of this time. A row
/// is stored once, however often this is run, stopped or killed. Run in the pod of a worker, it needs no arguments:
///
///   kubectl exec vibration-ingest-0 -- fleetwright replay --dry-run
///
/// Messages of Sparkplug B that name their metrics by alias need the birth of their node among the dead letters.
#[derive(Args, Clone, Debug)]
#[command(verbatim_doc_comment)]
pub struct Arguments {
    /// The Pipeline, as YAML or JSON
    #[arg(long, value_name = "FILE", conflicts_with = "config")]
    pipeline: Option<PathBuf>,

    /// What a worker does, in place of a Pipeline: the JSON of its ConfigMap
    #[arg(long, value_name = "FILE", default_value = "/etc/fleetwright/configuration/ingest.json")]
    config: PathBuf,

    /// Namespace of the Pipeline, where the file does not say it
    #[arg(long, value_name = "NAME", requires = "pipeline")]
    namespace: Option<String>,

    /// The FileDescriptorSet of a Pipeline of the format Protobuf
    #[arg(long, value_name = "FILE", requires = "pipeline")]
    descriptor: Option<PathBuf>,

    /// File with the connection URI of the database; - for standard input
    #[arg(long, value_name = "FILE", default_value = "/etc/fleetwright/database/uri")]
    database_uri_file: PathBuf,

    /// Says what would become of the dead letters, and changes nothing
    #[arg(long)]
    dry_run: bool,

    #[command(flatten)]
    filter: Filter,
}

/// What of a Pipeline matters here.
struct Source {
    namespace: String,
    pipeline: String,
    topic: String,
    decode: Decode,
    descriptor: Option<Vec<u8>>,
    table: String,
}

/// Puts dead letters through again until there are none left that were there at the start, or until `shutdown`.
///
/// # Errors
/// When a file cannot be read or understood, and when the database fails. What was stored until then is stored.
pub async fn run(arguments: Arguments, shutdown: CancellationToken) -> anyhow::Result<()> {
    let source = Source::read(&arguments)?;
    let uri: ConnectionUri = if arguments.database_uri_file == Path::new("-") {
        std::io::read_to_string(std::io::stdin()).context("failed to read the connection URI from standard input")?
    } else {
        read(&arguments.database_uri_file)?
    }
    .parse()
    .with_context(|| format!("failed to understand {}", arguments.database_uri_file.display()))?;
    let mut replayer = replayer(&source, &uri, &arguments.filter, arguments.dry_run).await?;
    let (total, last) = replayer.measure().await.context("failed to count the dead letters")?;
    let what = format!("dead letters of {}/{}", source.namespace, source.pipeline);
    if total == 0 {
        return say(&format!("There are no {what} that match."));
    }
    say(&format!("{total} {what} are put through again{}.\n", if arguments.dry_run { ", for show: nothing is changed" } else { "" }))?;
    let done = put_through(&mut replayer, total, last, &shutdown).await?;
    print_reasons(&done)
}

async fn put_through(replayer: &mut Replayer, total: u64, last: i64, shutdown: &CancellationToken) -> anyhow::Result<Replayed> {
    say(&format!("{:>8} {:>12} {:>12} {:>14} {:>12}", "done", "accepted", "new rows", "refused again", "left alone"))?;
    let print = |done: &Replayed| {
        #[allow(clippy::cast_precision_loss, reason = "a percentage for people")]
        let part = done.counts.letters as f64 / total as f64 * 100.0;
        say(&format!(
            "{:>7.1}% {:>12} {:>12} {:>14} {:>12}",
            part.min(100.0),
            done.counts.stored,
            done.rows,
            done.counts.refused,
            done.counts.partial
        ))
    };
    let (mut done, mut after, mut printed) = (Replayed::default(), 0, Instant::now());
    while !shutdown.is_cancelled() {
        let next = replayer.next(after, last).await;
        let next = next.context("failed to put dead letters through again; those before are done: run this again for the rest")?;
        let Some((end, page)) = next else { break };
        done.add(page);
        after = end;
        if printed.elapsed() >= PROGRESS {
            print(&done)?;
            printed = Instant::now();
        }
    }
    print(&done)?;
    Ok(done)
}

fn print_reasons(replayed: &Replayed) -> anyhow::Result<()> {
    if !replayed.reasons.is_empty() {
        say("\nRefused again, with one example each:")?;
    }
    for (reason, (count, example)) in &replayed.reasons {
        say(&format!("{count:>8} {reason:<16} {example}"))?;
    }
    if replayed.counts.partial > 0 {
        let partial = replayed.counts.partial;
        say(&format!("\n{partial} were left alone: some of their readings are rows by the time of arrival, and would be doubled."))?;
    }
    Ok(())
}

/// Prints a line at once: whoever reads a pipe waits for it.
fn say(line: &str) -> anyhow::Result<()> {
    let mut output = std::io::stdout().lock();
    writeln!(output, "{line}").and_then(|()| output.flush()).context("failed to print; what was put through until now is done")
}

async fn replayer(source: &Source, uri: &ConnectionUri, filter: &Filter, dry_run: bool) -> anyhow::Result<Replayer> {
    let topic = TopicPattern::compile(&source.topic, source.decode.format)?;
    let decoder = Decoder::compile(&source.decode, source.descriptor.as_deref())?;
    let statements = Statements::new(&source.table, topic.tags(), &source.decode.fields);
    let (namespace, pipeline) = (source.namespace.clone(), source.pipeline.clone());
    let owner = Owner { namespace: namespace.clone(), pipeline: pipeline.clone() };
    // What is refused again is kept as it was.
    let target = Target { namespace, pipeline, statements, dead_letter_bytes_per_hour: i64::MAX };
    let (mut client, connection) = connect(uri, "fleetwright replay").await?;
    drive(connection);
    probe(&mut client, &target).await?;
    let set_up = format!("{STATEMENT_TIMEOUT}; {}", target.statements.create_staging);
    client.batch_execute(&set_up).await.context("failed to make the staging table")?;
    Ok(Replayer {
        devices: Devices::load(&client, &source.namespace).await.context("failed to load the devices")?,
        condition: Condition::new(filter, owner, &source.topic),
        client,
        statements: target.statements,
        topic: Arc::new(topic),
        decoder: Arc::new(decoder),
        dry_run,
        token: None,
        processors: HashMap::new(),
    })
}

impl Source {
    fn read(arguments: &Arguments) -> anyhow::Result<Self> {
        match &arguments.pipeline {
            Some(file) => Self::of_pipeline(file, arguments),
            None => Self::of_worker(&arguments.config),
        }
    }

    fn of_worker(file: &Path) -> anyhow::Result<Self> {
        let configuration: IngestConfiguration = serde_json::from_str(&read(file)?)
            .with_context(|| format!("failed to understand {}: expected the JSON of a Pipeline's workers", file.display()))?;
        Self::of_configuration(configuration)
    }

    fn of_configuration(configuration: IngestConfiguration) -> anyhow::Result<Self> {
        Ok(Self {
            descriptor: configuration.descriptor.as_deref().map(|text| BASE64_STANDARD.decode(text)).transpose()?,
            namespace: configuration.namespace,
            pipeline: configuration.pipeline,
            topic: configuration.topic,
            decode: configuration.decode,
            table: configuration.table,
        })
    }

    fn of_pipeline(file: &Path, arguments: &Arguments) -> anyhow::Result<Self> {
        let pipeline: Pipeline = serde_saphyr::from_str(&read(file)?)
            .with_context(|| format!("failed to understand {}: expected one Pipeline, as YAML or JSON", file.display()))?;
        let Some(namespace) = arguments.namespace.clone().or(pipeline.namespace()) else {
            bail!("failed to find the namespace of the Pipeline in {}: say it with --namespace", file.display());
        };
        let descriptor = match &arguments.descriptor {
            Some(file) => Some(std::fs::read(file).with_context(|| format!("failed to read {}", file.display()))?),
            None => None,
        };
        let name = pipeline.name_any();
        let spec = pipeline.spec;
        Ok(Self { namespace, pipeline: name, topic: spec.source.topic, decode: spec.decode, descriptor, table: spec.sink.timescale.table })
    }
}

fn read(file: &Path) -> anyhow::Result<String> {
    std::fs::read_to_string(file).with_context(|| format!("failed to read {}", file.display()))
}
