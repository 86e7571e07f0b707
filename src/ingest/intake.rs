//! From a message to rows or a dead letter: its topic, its device, its readings.

use bytes::Bytes;

use super::batch::Batch;
use super::dead_letter::{Reason, Refusal, excerpt};
use super::decode::Outcome;
use super::decode::rows::Key;
use super::decode::stream::Stream;
use super::decode::time::Time;
use crate::mqtt::frame::Publish;
use crate::mqtt::window::Place;
use crate::state::registry::follow::{Device, Devices, Lookup};

/// What takes the messages of one gateway apart.
#[derive(Debug)]
pub struct Intake {
    /// Name of the Gateway that the messages come by.
    pub gateway: String,
    /// What the messages have said so far, and how they are decoded.
    pub stream: Stream,
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

impl Arrived {
    fn topic(&self) -> &[u8] {
        &self.block[self.publish.topic.clone()]
    }

    fn payload(&self) -> &[u8] {
        &self.block[self.publish.payload.clone()]
    }
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
        if !message.is_observed && !self.stream.observe(message.topic(), message.payload()) {
            batch.add_message(message.place, &message.publish, message.arrival);
            return Ok(());
        }
        let parts = match self.stream.read_topic(message.topic(), &mut tags) {
            Ok(name) => match devices.look_up(name) {
                Lookup::Pending => return Err(Pending(name)),
                Lookup::Known(device) => self.check(device),
                Lookup::Unknown => Err(Refusal::new(Reason::UnknownDevice, &format!("no Device is called {}", excerpt(name)))),
            },
            Err(refusal) => Err(refusal),
        };
        let arrival = self.stream.arrival(message.arrival);
        let number = batch.add_message(message.place, &message.publish, arrival);
        match parts {
            Ok(device) => self.decode(message, arrival, device, &tags, number, batch),
            Err(refusal) => batch.refuse(number, refusal),
        }
        Ok(())
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

    fn decode(&mut self, message: &Arrived, arrival: Time, device: &Device, tags: &[&str], number: u32, batch: &mut Batch) {
        let before = batch.rows.len();
        let rows = &mut batch.rows;
        let outcome = self.stream.decode(message.topic(), message.payload(), arrival, &mut |time, _, values| {
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
