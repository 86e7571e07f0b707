//! From a message to rows or a dead letter: its topic, its device, its readings.

use bytes::Bytes;

use crate::decode::dead_letter::{DeadLetterCause, Reason, excerpt};
use crate::decode::stream::Stream;
use crate::decode::time::Time;
use crate::decode::{Outcome, Parsed};
use crate::mqtt::frame::Publish;
use crate::mqtt::window::Place;
use crate::sink::batch::Batch;
use crate::sink::row_writer::RowWriter;
use crate::sink::timescale::copy::Key;
use crate::state::registry::follow::{Device, Devices, Lookup};

/// Processes the messages of one gateway.
#[derive(Debug)]
pub struct Processor {
    /// Name of the Gateway of the messages.
    pub gateway: String,
    /// The decoder, and its state between messages.
    pub stream: Stream,
}

/// A message that has arrived.
#[derive(Clone, Debug)]
pub struct InboundMessage {
    /// The block that contains it.
    pub block: Bytes,
    /// Its position in the block.
    pub publish: Publish,
    /// Its place in the order of arrival.
    pub place: Place,
    /// Its time of arrival.
    pub arrival: Time,
    /// Whether the decoder has observed it.
    pub is_observed: bool,
}

impl InboundMessage {
    fn topic(&self) -> &[u8] {
        &self.block[self.publish.topic.clone()]
    }

    fn payload(&self) -> &[u8] {
        &self.block[self.publish.payload.clone()]
    }
}

/// The name of a device that the registry has not looked up yet.
#[derive(Debug, Eq, PartialEq)]
pub struct PendingDevice<'a>(pub &'a str);

/// The device and the captures of a message.
struct Origin<'a> {
    device: &'a Device,
    tags: &'a [&'a str],
}

impl Processor {
    /// Adds a message to the batch, whose last block must be the message's.
    ///
    /// # Errors
    /// When the message must wait for the registry. The batch is unchanged then.
    pub fn process<'m, W: RowWriter>(
        &mut self,
        message: &'m InboundMessage,
        devices: &Devices,
        batch: &mut Batch<W>,
    ) -> Result<(), PendingDevice<'m>> {
        let parsed = if message.is_observed {
            Parsed::default()
        } else {
            let Some(parsed) = self.stream.observe(message.topic(), message.payload()) else {
                batch.add_message(message.place, &message.publish, message.arrival);
                return Ok(());
            };
            parsed
        };
        let mut tags = Vec::new();
        let device = match self.stream.read_topic(message.topic(), &mut tags) {
            Ok(name) => match devices.look_up(name) {
                Lookup::Pending => return Err(PendingDevice(name)),
                Lookup::Known(device) => self.check(device),
                Lookup::Unknown => Err(DeadLetterCause::new(Reason::UnknownDevice, &format!("no Device is called {}", excerpt(name)))),
            },
            Err(cause) => Err(cause),
        };
        let arrival = self.stream.arrival(message.arrival);
        let number = batch.add_message(message.place, &message.publish, arrival);
        match device {
            Ok(device) => self.decode(message, parsed, arrival, &Origin { device, tags: &tags }, number, batch),
            Err(cause) => batch.refuse(number, cause),
        }
        Ok(())
    }

    fn check<'d>(&self, device: &'d Device) -> Result<&'d Device, DeadLetterCause> {
        if *device.gateway != *self.gateway {
            let detail = format!("the device belongs to the gateway {}; the message was published to {}", device.gateway, self.gateway);
            Err(DeadLetterCause::new(Reason::WrongGateway, &detail))
        } else if device.enabled {
            Ok(device)
        } else {
            Err(DeadLetterCause::new(Reason::DisabledDevice, "the device is disabled"))
        }
    }

    fn decode<W: RowWriter>(
        &mut self,
        message: &InboundMessage,
        parsed: Parsed,
        arrival: Time,
        origin: &Origin<'_>,
        number: u32,
        batch: &mut Batch<W>,
    ) {
        let before = batch.rows.rows();
        let rows = &mut batch.rows;
        // Every consumer of typed values is called in this closure. It is called before it is known whether the whole message is well
        // formed: a consumer must be able to discard the readings of a message, as `truncate` does for the rows.
        let outcome = self.stream.decode(message.topic(), message.payload(), parsed, arrival, &mut |reading| {
            rows.write(number, Key { time: reading.time, device: origin.device.id }, origin.tags, reading.values);
        });
        match outcome {
            Outcome::Complete => {}
            Outcome::Partial(cause) => batch.refuse(number, cause),
            Outcome::Malformed(cause) => {
                batch.rows.truncate(before);
                batch.refuse(number, cause);
            }
        }
    }
}
