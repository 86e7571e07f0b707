//! From a message to rows or a dead letter: its topic, its device, its readings.

use bytes::{Bytes, BytesMut};

use crate::decode::dead_letter::{DeadLetterCause, Reason, excerpt};
use crate::decode::stream::Stream;
use crate::decode::time::Time;
use crate::decode::{Outcome, Parsed};
use crate::mqtt::frame::Publish;
use crate::mqtt::window::Place;
use crate::sink::batch::chunks::too_many_chunks;
use crate::sink::batch::{Batch, RowOptions};
use crate::sink::row_writer::RowWriter;
use crate::sink::timescale::copy::{Columns, Key};
use crate::state::registry::follow::{Device, Devices, Lookup};

/// Processes the messages of one gateway.
#[derive(Debug)]
pub struct Processor {
    /// Name of the Gateway of the messages.
    pub gateway: String,
    /// The decoder, and its state between messages.
    pub stream: Stream,
    /// The rows to make.
    pub rows: RowOptions,
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
    /// The same message with a copy of its bytes, so that it does not keep its block in memory.
    #[must_use]
    pub fn detached(&self) -> Self {
        let (topic, payload) = (self.topic(), self.payload());
        let mut bytes = BytesMut::with_capacity(topic.len() + payload.len());
        bytes.extend_from_slice(topic);
        bytes.extend_from_slice(payload);
        let publish = Publish { topic: 0..topic.len(), payload: topic.len()..bytes.len(), ..self.publish.clone() };
        Self { block: bytes.freeze(), publish, ..self.clone() }
    }

    /// The memory of a message that waits, in bytes.
    #[must_use]
    pub fn size(&self) -> usize {
        size_of::<Self>() + self.publish.topic.len() + self.publish.payload.len()
    }

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

/// The cause of a message whose device is not in the registry.
fn unknown_device(name: &str) -> DeadLetterCause {
    DeadLetterCause::new(Reason::UnknownDevice, &format!("no Device is called {}", excerpt(name)))
}

impl Processor {
    /// The device of a message, if the registry has not looked it up.
    pub fn pending_device<'m>(&self, message: &'m InboundMessage, devices: &Devices) -> Option<&'m str> {
        let name = self.stream.read_topic(message.topic(), &mut Vec::new()).ok()?;
        (devices.look_up(name) == Lookup::Pending).then_some(name)
    }

    /// Refuses a message whose device has not been looked up, because too many messages wait.
    pub fn refuse_unknown<W: RowWriter>(&mut self, message: &InboundMessage, batch: &mut Batch<W>) {
        let cause = self.stream.read_topic(message.topic(), &mut Vec::new()).map_or_else(|cause| cause, unknown_device);
        let arrival = self.stream.arrival(message.arrival);
        let number = batch.add_message(message.place, &message.publish, arrival);
        batch.refuse(number, cause);
    }

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
                Lookup::Unknown => Err(unknown_device(name)),
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
        let (rows, chunks, interval) = (&mut batch.rows, &mut batch.chunks, self.rows.chunk_interval);
        let key_fields = self.rows.key_fields;
        let mut is_within = true;
        // Every consumer of typed values is called in this closure. It is called before it is known whether the whole message is well
        // formed: a consumer must be able to discard the readings of a message, as `truncate` does for the rows.
        let outcome = self.stream.decode(message.topic(), message.payload(), parsed, arrival, &mut |reading| {
            is_within = is_within && chunks.add(reading.time, interval);
            if is_within {
                let (key, values) = reading.values.split_at(key_fields);
                let columns = Columns { captures: origin.tags, key, values };
                rows.write(number, Key { time: reading.time, device: origin.device.id }, columns);
            }
        });
        let (cause, kept) = match outcome {
            Outcome::Malformed(cause) => (Some(cause), false),
            _ if !is_within => (Some(too_many_chunks()), false),
            Outcome::Complete => (None, true),
            Outcome::Partial(cause) => (Some(cause), true),
        };
        batch.chunks.end_message(kept);
        if !kept {
            batch.rows.truncate(before);
        }
        if let Some(cause) = cause {
            batch.refuse(number, cause);
        }
    }
}
