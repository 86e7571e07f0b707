//! From a message to the rows that a worker would write, or to its refusal: pure.

use std::sync::Arc;

use kube::ResourceExt;
use kube::core::Selector;

use super::manifest::Manifest;
use crate::api::condition::Cause;
use crate::api::descriptor;
use crate::api::reason::Reason;
use crate::api::topic::TopicPattern;
use crate::decode::refusal::Refusal;
use crate::decode::stream::Stream;
use crate::decode::time::Time;
use crate::decode::{Decoder, Outcome, Value};
use crate::sink::timescale::schema::{Table, desired};
use crate::state::owner::Owner;

/// What becomes of the messages of a Pipeline.
#[derive(Debug)]
pub struct Judge {
    /// The table that the operator would make.
    pub table: Table,
    stream: Stream,
}

/// What becomes of a message.
#[derive(Debug, PartialEq)]
pub struct Verdict {
    /// The rows.
    pub rows: Vec<Row>,
    /// Why it, or a part of it, would be a dead letter.
    pub refusal: Option<Refusal>,
}

/// A row.
#[derive(Debug, PartialEq)]
pub struct Row {
    /// Its time.
    pub time: Time,
    /// Whether that is the time of arrival.
    pub is_of_arrival: bool,
    /// Name of the device.
    pub device: String,
    /// The other captures of the topic.
    pub tags: Vec<String>,
    /// A value a field.
    pub values: Vec<Value<'static>>,
}

impl Judge {
    /// Judges by a Pipeline, which is checked as the operator checks it; `given` goes before its descriptor.
    pub fn new(manifest: &Manifest, given: Option<Vec<u8>>) -> Result<Self, Cause> {
        let pipeline = &manifest.pipeline;
        let invalid = |message: String| Cause::new(Reason::InvalidSpec, message);
        let owner = Owner { namespace: pipeline.namespace().unwrap_or_default(), pipeline: pipeline.name_any() };
        let table = desired(owner, &pipeline.spec).map_err(|error| invalid(error.to_string()))?.table;
        let decode = &pipeline.spec.decode;
        let topic = TopicPattern::compile(&pipeline.spec.source.topic, decode.format).map_err(|error| invalid(error.to_string()))?;
        Selector::try_from(pipeline.spec.source.gateway_selector.clone())
            .map_err(|error| invalid(format!("failed to read gatewaySelector: {error}")))?;
        let descriptor = match (&decode.protobuf, given) {
            (Some(protobuf), None) => Some(descriptor::read(manifest.descriptor.clone(), &protobuf.config_map_ref)?),
            (_, given) => given,
        };
        let decoder = Decoder::compile(decode, descriptor.as_deref()).map_err(|error| error.cause())?;
        Ok(Self { table, stream: Stream::new(Arc::new(topic), Arc::new(decoder)) })
    }

    /// Takes the next message.
    pub fn take(&mut self, topic: &str, payload: &[u8], arrival: Time) -> Verdict {
        let (topic, mut tags, mut rows) = (topic.as_bytes(), Vec::new(), Vec::new());
        if !self.stream.observe(topic, payload) {
            return Verdict { rows, refusal: None };
        }
        let device = match self.stream.read_topic(topic, &mut tags) {
            Ok(device) => device,
            Err(refusal) => return Verdict { rows, refusal: Some(refusal) },
        };
        let arrival = self.stream.arrival(arrival);
        let outcome = self.stream.decode(topic, payload, arrival, &mut |time, is_of_arrival, values| {
            rows.push(Row {
                time,
                is_of_arrival,
                device: device.to_owned(),
                tags: tags.iter().map(|tag| (*tag).to_owned()).collect(),
                values: values.iter().cloned().map(Value::into_owned).collect(),
            });
        });
        match outcome {
            Outcome::Complete => Verdict { rows, refusal: None },
            Outcome::Partial(refusal) => Verdict { rows, refusal: Some(refusal) },
            Outcome::Malformed(refusal) => Verdict { rows: Vec::new(), refusal: Some(refusal) },
        }
    }
}
