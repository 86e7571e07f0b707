//! From a message to rows or a dead letter: its topic, its device, its readings.

use std::sync::Arc;

use bytes::Bytes;

use super::batch::Batch;
use super::batch::rows::Key;
use super::dead_letter::{Reason, Refusal, excerpt};
use super::decode::sparkplug::Memory;
use super::decode::time::Time;
use super::decode::{Decoder, Outcome};
use super::mqtt::frame::Publish;
use super::mqtt::window::Place;
use crate::api::topic::TopicPattern;
use crate::registry::follow::{Device, Devices, Lookup};

/// What takes the messages of one gateway apart.
#[derive(Debug)]
pub struct Intake {
    /// Name of the Gateway that the messages come by.
    pub gateway: String,
    /// The Pipeline's topic.
    pub topic: Arc<TopicPattern>,
    /// The Pipeline's decoder.
    pub decoder: Arc<Decoder>,
    /// The last time of arrival that was given to a reading.
    pub last_arrival: Time,
    /// What messages have said that others need.
    pub memory: Memory,
}

/// A message on its way in.
#[derive(Clone, Debug)]
pub struct Arrived {
    /// What it stands in.
    pub block: Bytes,
    /// Where it stands.
    pub publish: Publish,
    /// Its place in the order of arrival.
    pub place: Place,
    /// When it came.
    pub arrival: Time,
    /// Whether the decoder has taken note of it.
    pub is_observed: bool,
}

/// The name of a device that the registry has no answer for yet.
#[derive(Debug, Eq, PartialEq)]
pub struct Pending<'a>(pub &'a str);

impl Intake {
    /// Takes a message into the batch, whose last block must be the message's.
    ///
    /// # Errors
    /// When it must wait for the registry. Nothing is in the batch then.
    pub fn take<'m>(&mut self, message: &'m Arrived, devices: &Devices, batch: &mut Batch) -> Result<(), Pending<'m>> {
        let mut tags = Vec::new();
        if !message.is_observed && !self.observe(message) {
            batch.add_message(message.place, &message.publish);
            return Ok(());
        }
        let parts = match self.read_topic(&message.block[message.publish.topic.clone()], &mut tags) {
            Ok(name) => match devices.look_up(name) {
                Lookup::Pending => return Err(Pending(name)),
                Lookup::Known(device) => self.check(device),
                Lookup::Unknown => Err(Refusal::new(Reason::UnknownDevice, &format!("no Device is called {}", excerpt(name)))),
            },
            Err(refusal) => Err(refusal),
        };
        let number = batch.add_message(message.place, &message.publish);
        match parts {
            Ok(device) => self.decode(message, device, &tags, number, batch),
            Err(refusal) => batch.refuse(number, refusal),
        }
        Ok(())
    }

    /// Whether the message may hold readings. What else it says is remembered.
    fn observe(&mut self, message: &Arrived) -> bool {
        match std::str::from_utf8(&message.block[message.publish.topic.clone()]) {
            Ok(topic) => self.decoder.observe(&mut self.memory, topic, self.topic.depth(), &message.block[message.publish.payload.clone()]),
            Err(_) => true,
        }
    }

    fn read_topic<'t>(&self, topic: &'t [u8], tags: &mut Vec<&'t str>) -> Result<&'t str, Refusal> {
        let text =
            std::str::from_utf8(topic).map_err(|error| Refusal::new(Reason::TopicMismatch, &format!("the topic is not UTF-8: {error}")))?;
        self.topic
            .capture(text, tags)
            .filter(|_| !text.contains('\0'))
            .ok_or_else(|| Refusal::new(Reason::TopicMismatch, &format!("expected a topic like {}", self.topic.filter())))
    }

    fn check<'d>(&self, device: &'d Device) -> Result<&'d Device, Refusal> {
        if *device.gateway != *self.gateway {
            let detail = format!("the device belongs to the gateway {}; the message came by {}", device.gateway, self.gateway);
            Err(Refusal::new(Reason::WrongGateway, &detail))
        } else if device.enabled {
            Ok(device)
        } else {
            Err(Refusal::new(Reason::DisabledDevice, "the device is disabled"))
        }
    }

    fn decode(&mut self, message: &Arrived, device: &Device, tags: &[&str], number: u32, batch: &mut Batch) {
        let before = batch.rows.len();
        let (decoder, last, rows) = (&self.decoder, &mut self.last_arrival, &mut batch.rows);
        // Times of arrival are a microsecond apart at the least: they tell the readings of a device apart.
        let next = |last: &mut Time| {
            *last = message.arrival.max(last.after(1));
            *last
        };
        let arrival = if decoder.takes_arrival_time() { next(last) } else { message.arrival };
        let topic = std::str::from_utf8(&message.block[message.publish.topic.clone()]).unwrap_or_default();
        let outcome = decoder.decode(&self.memory, topic, &message.block[message.publish.payload.clone()], arrival, |time, values| {
            let time = time.unwrap_or_else(|| next(last));
            rows.push(number, Key { time, device: device.id }, tags, values);
        });
        match outcome {
            Outcome::Complete => {}
            Outcome::Partial(refusal) => batch.refuse(number, refusal),
            Outcome::Malformed(refusal) => {
                batch.rows.truncate(before);
                batch.refuse(number, refusal);
            }
        }
    }
}
