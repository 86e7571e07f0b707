//! The role `check`: a dry run of a Pipeline with messages, without cluster, broker or database.
//!
//! The Pipeline is read from a file (`manifest`, strictly: `strict`), messages from arguments (`message`). `dry_run` processes them with
//! the code of operator and workers, `print` formats the results.

mod dry_run;
mod manifest;
mod message;
mod print;
mod strict;

use std::io::Write;
use std::process::ExitCode;

use anyhow::{Context, bail};
use clap::Args;

use self::dry_run::DryRun;
use self::message::Encoding;
use crate::decode::time::Time;

/// What is printed after the help.
pub const EXAMPLES: &str = "\
Examples:
  fleetwright check pipeline.yaml --topic devices/press-1/telemetry --message '{\"rms\": 3.2}'
  kubectl get fwp vibration -o yaml | fleetwright check - --topic devices/press-1/telemetry --message @sample.json
  fleetwright check pipeline.yaml --topic plant/press-1 --hex --message a163726d73f93e00
  fleetwright check pipeline.yaml --topic spBv1.0/g/DBIRTH/n/press-1 --message @birth.bin \\
                                  --topic spBv1.0/g/DDATA/n/press-1 --message @data.bin

Exit status: 0 if every message becomes rows (or has no readings of devices, as births of nodes), 1 if anything is refused,
2 if the arguments or files are invalid.

The code is that of operator and worker. Not checked, because it needs a cluster: whether the device is declared and enabled, whether it
uses its own Gateway, and the rules of the API server (kubectl apply --dry-run=server -f pipeline.yaml).";

/// Arguments of the role `check`.
#[derive(Args, Clone, Debug)]
pub struct Arguments {
    /// YAML file with the Pipeline, or - for standard input; it may have other objects
    #[arg(value_name = "FILE")]
    manifest: String,

    /// Name of the Pipeline, if the file has several
    #[arg(long, value_name = "NAME")]
    pipeline: Option<String>,

    /// Topic of the message; with several messages one for all, or one for each
    #[arg(long, required = true, value_name = "TOPIC")]
    topic: Vec<String>,

    /// The message: @FILE, - for standard input, or the text itself; several are processed one after the other
    #[arg(long, required = true, allow_hyphen_values = true, value_name = "MESSAGE")]
    message: Vec<String>,

    /// The messages are given in hexadecimal digits; white space is ignored
    #[arg(long, conflicts_with = "base64")]
    hex: bool,

    /// The messages are given in base64; white space is ignored
    #[arg(long)]
    base64: bool,

    /// FileDescriptorSet of the format Protobuf; left out: the ConfigMap that the Pipeline names, from the same YAML file
    #[arg(long, value_name = "FILE")]
    descriptor: Option<String>,

    /// When the messages arrive, as in RFC 3339; left out: now
    #[arg(long, value_name = "TIME", value_parser = read_time)]
    arrival: Option<Time>,
}

fn read_time(text: &str) -> Result<Time, String> {
    Time::from_text(text).ok_or_else(|| "expected a time such as 2026-05-04T03:02:01Z".to_owned())
}

/// Processes the messages, and prints the results.
#[must_use]
pub fn run(arguments: &Arguments) -> ExitCode {
    match check(arguments) {
        Ok((text, is_good)) => match std::io::stdout().write_all(text.as_bytes()) {
            Ok(()) if is_good => ExitCode::SUCCESS,
            // The reader may have closed the pipe early.
            Ok(()) | Err(_) => ExitCode::from(1),
        },
        Err(failure) => {
            eprintln!("error: {failure:#}");
            ExitCode::from(2)
        }
    }
}

/// The output, and whether no message was refused.
fn check(arguments: &Arguments) -> anyhow::Result<(String, bool)> {
    let readers = std::iter::once(&arguments.manifest).chain(&arguments.message).filter(|name| *name == "-").count();
    if readers > 1 {
        bail!("failed to read standard input {readers} times: use - for one of the file and the messages");
    }
    let topics = topics(&arguments.topic, arguments.message.len())?;
    let encoding = match (arguments.hex, arguments.base64) {
        (true, _) => Encoding::Hex,
        (_, true) => Encoding::Base64,
        _ => Encoding::Plain,
    };
    let text = String::from_utf8(message::read(&arguments.manifest)?)
        .with_context(|| format!("failed to read {}: expected YAML in UTF-8", arguments.manifest))?;
    let found = manifest::find(&text, arguments.pipeline.as_deref()).with_context(|| format!("failed to use {}", arguments.manifest))?;
    let given = arguments.descriptor.as_ref().map(|path| message::read(path)).transpose()?;
    let payloads = arguments.message.iter().map(|message| message::payload(message, encoding)).collect::<anyhow::Result<Vec<_>>>()?;

    let mut dry_run = match found.and_then(|found| DryRun::new(&found, given)) {
        Ok(dry_run) => dry_run,
        Err(cause) => return Ok((print::cause(&cause), false)),
    };
    let (mut text, mut is_good) = (String::new(), true);
    for (topic, payload) in topics.iter().zip(&payloads) {
        let result = dry_run.process(topic, payload, arguments.arrival.unwrap_or_else(Time::now));
        is_good &= result.dead_letter.is_none();
        text.push_str(&print::result(topic, &dry_run.table, &result));
    }
    Ok((text, is_good))
}

/// A topic for each message.
fn topics(given: &[String], messages: usize) -> anyhow::Result<Vec<&str>> {
    if let Some(topic) = given.iter().find(|topic| topic.is_empty() || topic.contains(['+', '#'])) {
        bail!("failed to use the topic {topic:?}: expected one that a device publishes to, without + and #");
    }
    match given {
        [one] => Ok(vec![one; messages]),
        several if several.len() == messages => Ok(several.iter().map(String::as_str).collect()),
        several => bail!("failed to match {} topics with {messages} messages: give one topic, or one for each message", several.len()),
    }
}

#[cfg(test)]
mod tests;
