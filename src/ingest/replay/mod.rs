//! `fleetwright replay`: decodes dead letters again with the current decoder of the Pipeline.
//!
//! Each page of dead letters is one transaction, which stores the accepted ones as rows and deletes them. So each row is stored once, even
//! if the command is killed, repeated, or run twice at the same time.

mod filter;
mod outcome;
mod page;
pub mod request;

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
use tokio_postgres::Client;
use tokio_util::sync::CancellationToken;

use self::filter::{Filter, FilterCondition};
use self::outcome::ReplayOutcome;
use self::page::Replayer;
use super::database_files::read_connection;
use crate::api::Pipeline;
use crate::api::pipeline::{Decode, OnConflict, TimescaleSink};
use crate::api::topic::TopicPattern;
use crate::configuration::ingest::IngestConfiguration;
use crate::database::connect::{connect, drive};
use crate::database::uri::ConnectionUri;
use crate::decode::Decoder;
use crate::sink::batch::RowOptions;
use crate::sink::timescale::statements::Statements;
use crate::sink::timescale::target::Target;
use crate::sink::timescale::write_probe::probe;
use crate::state::owner::Owner;
use crate::state::registry::follow::Devices;
use crate::state::system::SCHEMA;

/// How often the progress is printed.
const PROGRESS: Duration = Duration::from_secs(1);

/// How long a statement may take. Counting millions of dead letters takes seconds, on a slow disk a minute.
const STATEMENT_TIMEOUT: &str = "SET statement_timeout = '10min'";

/// Decodes dead letters again with the current decoder of their Pipeline.
///
/// An accepted dead letter becomes rows and is deleted. A dead letter that is refused again stays, with the new reason. Each row is stored
/// once, even if the command is repeated, stopped or killed. In the pod of a worker, the command needs no arguments:
///
///   kubectl exec vibration-ingest-0 -- fleetwright replay --dry-run
///
/// Sparkplug B messages that use aliases need the birth message of their node among the dead letters.
#[derive(Args, Clone, Debug)]
#[command(verbatim_doc_comment)]
pub struct Arguments {
    /// File with the Pipeline, as YAML or JSON
    #[arg(long, value_name = "FILE", conflicts_with = "config")]
    pipeline: Option<PathBuf>,

    /// JSON configuration of a worker, instead of a Pipeline
    #[arg(long, value_name = "FILE", default_value = "/etc/fleetwright/configuration/ingest.json")]
    config: PathBuf,

    /// Namespace of the Pipeline (default: the one in the file)
    #[arg(long, value_name = "NAME", requires = "pipeline")]
    namespace: Option<String>,

    /// FileDescriptorSet of a Pipeline with the format Protobuf
    #[arg(long, value_name = "FILE", requires = "pipeline")]
    descriptor: Option<PathBuf>,

    /// File with the connection URI of the database; the file ca.crt in its folder, if any, has the authorities that verify the server;
    /// - for standard input
    #[arg(long, value_name = "FILE", default_value = "/etc/fleetwright/database/uri")]
    database_uri_file: PathBuf,

    /// Print the result without changing anything
    #[arg(long)]
    dry_run: bool,

    #[command(flatten)]
    filter: Filter,
}

/// The parts of a Pipeline that a replay needs.
struct ReplaySource {
    /// Identity of the cluster; `None` for a file, which does not contain it: the table of the Pipeline has it.
    cluster: Option<String>,
    namespace: String,
    pipeline: String,
    topic: String,
    decode: Decode,
    descriptor: Option<Vec<u8>>,
    table: String,
    chunk_interval: String,
    on_conflict: OnConflict,
}

/// Replays the dead letters that exist at the start, until all are processed or `shutdown`.
///
/// # Errors
/// If a file cannot be read or parsed, or the database fails. Committed pages stay committed.
pub async fn run(arguments: Arguments, shutdown: CancellationToken) -> anyhow::Result<()> {
    let source = ReplaySource::read(&arguments)?;
    let uri = read_connection(&arguments.database_uri_file)?;
    let mut replayer = replayer(&source, &uri, &arguments.filter, arguments.dry_run).await?;
    let (total, last) = replayer.measure().await.context("failed to count the dead letters")?;
    let what = format!("dead letters of {}/{}", source.namespace, source.pipeline);
    if total == 0 {
        return print_line(&format!("There are no matching {what}."));
    }
    print_line(&format!("Replaying {total} {what}{}.\n", if arguments.dry_run { " (dry run: nothing is changed)" } else { "" }))?;
    let done = replay_pages(&mut replayer, total, last, &shutdown).await?;
    print_reasons(&done)
}

async fn replay_pages(replayer: &mut Replayer, total: u64, last: i64, shutdown: &CancellationToken) -> anyhow::Result<ReplayOutcome> {
    print_line(&format!("{:>8} {:>12} {:>12} {:>14} {:>12}", "done", "accepted", "new rows", "refused again", "skipped"))?;
    let print = |done: &ReplayOutcome| {
        #[allow(clippy::cast_precision_loss, reason = "a percentage for people")]
        let part = done.counts.letters as f64 / total as f64 * 100.0;
        print_line(&format!(
            "{:>7.1}% {:>12} {:>12} {:>14} {:>12}",
            part.min(100.0),
            done.counts.stored,
            done.rows,
            done.counts.refused,
            done.counts.partial
        ))
    };
    let (mut done, mut after, mut printed) = (ReplayOutcome::default(), 0, Instant::now());
    while !shutdown.is_cancelled() {
        let next = replayer.next(after, last).await;
        let next = next.context("failed to replay dead letters; earlier pages are committed: run the command again for the rest")?;
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

fn print_reasons(replayed: &ReplayOutcome) -> anyhow::Result<()> {
    if !replayed.reasons.is_empty() {
        print_line("\nRefused again, with one example each:")?;
    }
    for (reason, (count, example)) in &replayed.reasons {
        print_line(&format!("{count:>8} {reason:<16} {example}"))?;
    }
    if replayed.counts.partial > 0 {
        let partial = replayed.counts.partial;
        print_line(&format!(
            "\n{partial} were skipped: some of their readings are rows with the time of arrival, and would be stored twice."
        ))?;
    }
    Ok(())
}

/// Prints a line and flushes, for readers of a pipe.
fn print_line(line: &str) -> anyhow::Result<()> {
    let mut output = std::io::stdout().lock();
    writeln!(output, "{line}")
        .and_then(|()| output.flush())
        .context("failed to print the progress; the processed dead letters are committed")
}

async fn replayer(source: &ReplaySource, uri: &ConnectionUri, filter: &Filter, dry_run: bool) -> anyhow::Result<Replayer> {
    let topic = TopicPattern::compile(&source.topic, source.decode.format)?;
    let decoder = Decoder::compile(&source.decode, source.descriptor.as_deref())?;
    let rows = RowOptions::new(&source.decode, &source.chunk_interval, source.on_conflict)?;
    let statements = Statements::new(&source.table, topic.tags(), &source.decode.fields, source.on_conflict);
    let (mut client, connection) = connect(uri, "fleetwright replay").await?;
    drive(connection);
    let owner = owner(source, &client).await?;
    // A dead letter that is refused again is not counted against the quota.
    let target = Target { owner: owner.clone(), statements, dead_letter_bytes_per_hour: i64::MAX };
    probe(&mut client, &target).await?;
    let set_up = format!("{STATEMENT_TIMEOUT}; {}", target.statements.create_staging);
    client.batch_execute(&set_up).await.context("failed to create the staging table")?;
    Ok(Replayer {
        devices: Devices::load(&client, &owner.cluster_namespace()).await.context("failed to load the devices")?,
        condition: FilterCondition::new(filter, owner, &source.topic),
        client,
        statements: target.statements,
        topic: Arc::new(topic),
        decoder: Arc::new(decoder),
        rows,
        dry_run,
        token: None,
        processors: HashMap::new(),
    })
}

/// The Pipeline, as the owner of its dead letters.
async fn owner(source: &ReplaySource, client: &Client) -> anyhow::Result<Owner> {
    let (namespace, pipeline) = (source.namespace.clone(), source.pipeline.clone());
    let cluster = match &source.cluster {
        Some(cluster) => cluster.clone(),
        None => {
            let query = format!("SELECT cluster FROM {SCHEMA}.pipeline_table WHERE table_name = $1 AND namespace = $2");
            let row = client.query_opt(&query, &[&source.table, &namespace]).await.context("failed to read the owner of the table")?;
            let expected =
                || format!("failed to find the owner of public.{}: expected a Pipeline of the namespace {namespace}", source.table);
            row.with_context(expected)?.try_get(0).context("failed to read the owner of the table")?
        }
    };
    Ok(Owner { cluster, namespace, pipeline })
}

impl ReplaySource {
    fn read(arguments: &Arguments) -> anyhow::Result<Self> {
        match &arguments.pipeline {
            Some(file) => Self::of_pipeline(file, arguments),
            None => Self::of_worker(&arguments.config),
        }
    }

    fn of_worker(file: &Path) -> anyhow::Result<Self> {
        let configuration: IngestConfiguration = serde_json::from_str(&read(file)?)
            .with_context(|| format!("failed to parse {}: expected the JSON of a Pipeline's workers", file.display()))?;
        Self::of_configuration(configuration)
    }

    fn of_configuration(configuration: IngestConfiguration) -> anyhow::Result<Self> {
        Ok(Self {
            descriptor: configuration.descriptor.as_deref().map(|text| BASE64_STANDARD.decode(text)).transpose()?,
            cluster: Some(configuration.cluster),
            namespace: configuration.namespace,
            pipeline: configuration.pipeline,
            topic: configuration.topic,
            decode: configuration.decode.with_key_first(),
            table: configuration.table,
            chunk_interval: configuration.chunk_interval,
            on_conflict: configuration.on_conflict,
        })
    }

    fn of_pipeline(file: &Path, arguments: &Arguments) -> anyhow::Result<Self> {
        let pipeline: Pipeline = serde_saphyr::from_str(&read(file)?)
            .with_context(|| format!("failed to parse {}: expected one Pipeline, as YAML or JSON", file.display()))?;
        let Some(namespace) = arguments.namespace.clone().or(pipeline.namespace()) else {
            bail!("failed to find the namespace of the Pipeline in {}: pass --namespace", file.display());
        };
        let descriptor = match &arguments.descriptor {
            Some(file) => Some(std::fs::read(file).with_context(|| format!("failed to read {}", file.display()))?),
            None => None,
        };
        let name = pipeline.name_any();
        let spec = pipeline.spec;
        let TimescaleSink { table, chunk_interval, on_conflict, .. } = spec.sink.timescale;
        let (topic, decode) = (spec.source.topic, spec.decode.with_key_first());
        Ok(Self { cluster: None, namespace, pipeline: name, topic, decode, descriptor, table, chunk_interval, on_conflict })
    }
}

fn read(file: &Path) -> anyhow::Result<String> {
    std::fs::read_to_string(file).with_context(|| format!("failed to read {}", file.display()))
}
