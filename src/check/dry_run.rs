//! From a message to the rows that a worker would write, or to its dead letter: pure.

use std::sync::Arc;

use kube::ResourceExt;

use super::manifest::Manifest;
use crate::api::condition::Cause;
use crate::api::descriptor;
use crate::configuration::pipeline::compile;
use crate::decode::dead_letter::DeadLetterCause;
use crate::decode::stream::Stream;
use crate::decode::time::Time;
use crate::decode::{Outcome, Value};
use crate::sink::batch::chunks::{Chunks, too_many_chunks};
use crate::sink::timescale::schema::Table;
use crate::state::owner::Owner;

/// A dry run of a Pipeline.
#[derive(Debug)]
pub struct DryRun {
    /// The table that the operator would create.
    pub table: Table,
    stream: Stream,
}

/// The result for a message.
#[derive(Debug, PartialEq)]
pub struct MessageResult {
    /// The rows.
    pub rows: Vec<Row>,
    /// Why the message, or a part of it, would be a dead letter.
    pub dead_letter: Option<DeadLetterCause>,
}

/// A row.
#[derive(Debug, PartialEq)]
pub struct Row {
    /// Its time.
    pub time: Time,
    /// Whether that is the time of arrival.
    pub is_arrival_time: bool,
    /// Name of the device.
    pub device: String,
    /// The other captures of the topic.
    pub tags: Vec<String>,
    /// A value for each field.
    pub values: Vec<Value<'static>>,
}

impl DryRun {
    /// A dry run of a Pipeline, which is validated as by the operator. `given` replaces its FileDescriptorSet.
    pub fn new(manifest: &Manifest, given: Option<Vec<u8>>) -> Result<Self, Cause> {
        let pipeline = &manifest.pipeline;
        let owner = Owner { cluster: String::new(), namespace: pipeline.namespace().unwrap_or_default(), pipeline: pipeline.name_any() };
        let descriptor = match (&pipeline.spec.decode.protobuf, given) {
            (Some(protobuf), None) => descriptor::read(manifest.descriptor.clone(), &protobuf.config_map_ref).map(Some),
            (_, given) => Ok(given),
        };
        let compiled = compile(owner, &pipeline.spec, descriptor.as_ref().map(Option::as_deref).map_err(Clone::clone))?;
        let stream = Stream::new(Arc::new(compiled.topic), Arc::new(compiled.decoder?));
        Ok(Self { table: compiled.desired.table, stream })
    }

    /// Processes the next message.
    pub fn process(&mut self, topic: &str, payload: &[u8], arrival: Time) -> MessageResult {
        let (topic, mut tags, mut rows) = (topic.as_bytes(), Vec::new(), Vec::new());
        let Some(parsed) = self.stream.observe(topic, payload) else {
            return MessageResult { rows, dead_letter: None };
        };
        let device = match self.stream.read_topic(topic, &mut tags) {
            Ok(device) => device,
            Err(cause) => return MessageResult { rows, dead_letter: Some(cause) },
        };
        let arrival = self.stream.arrival(arrival);
        let (mut chunks, mut is_within) = (Chunks::default(), true);
        let outcome = self.stream.decode(topic, payload, parsed, arrival, &mut |reading| {
            is_within = is_within && chunks.add(reading.time, self.table.chunk_interval);
            rows.push(Row {
                time: reading.time,
                is_arrival_time: reading.is_arrival_time,
                device: device.to_owned(),
                tags: tags.iter().map(|tag| (*tag).to_owned()).collect(),
                values: reading.values.iter().cloned().map(Value::into_owned).collect(),
            });
        });
        match outcome {
            Outcome::Complete | Outcome::Partial(_) if !is_within => {
                MessageResult { rows: Vec::new(), dead_letter: Some(too_many_chunks()) }
            }
            Outcome::Complete => MessageResult { rows, dead_letter: None },
            Outcome::Partial(cause) => MessageResult { rows, dead_letter: Some(cause) },
            Outcome::Malformed(cause) => MessageResult { rows: Vec::new(), dead_letter: Some(cause) },
        }
    }
}
