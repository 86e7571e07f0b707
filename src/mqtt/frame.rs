//! Splits a stream of bytes into packets (MQTT 5.0, section 2.1).
//!
//! A PUBLISH is only located: its topic and payload stay in the read buffer, without an allocation or a reference count for each. The
//! codec of `rumqttc` decodes all other packets.

use std::ops::Range;

use bytes::{Bytes, BytesMut};
use rumqttc::mqttbytes::v5::Packet;

/// The largest packet of MQTT (section 1.5.5), including the fixed header, in bytes.
pub const MAX_PACKET_BYTES: usize = 268_435_455 + 5;

/// Why bytes are not a packet. The connection must end.
#[derive(Debug, thiserror::Error)]
pub enum FrameError {
    /// The length of a packet takes more than four bytes.
    #[error("failed to read the length of a packet: expected at most four bytes (MQTT 5.0, 1.5.5)")]
    MeasurePacket,

    /// A packet is larger than the connection accepts.
    #[error("received a packet of {bytes} bytes: expected at most {max}")]
    TooLarge {
        /// The size of the packet.
        bytes: usize,
        /// The maximum.
        max: usize,
    },

    /// A PUBLISH ends before its parts do.
    #[error("failed to read a PUBLISH: expected topic, packet identifier and properties within the packet (MQTT 5.0, 3.3)")]
    LocatePublish,

    /// Another packet is malformed.
    #[error("failed to read a packet")]
    Decode(#[source] rumqttc::mqttbytes::Error),
}

/// The position of a message in its block.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Publish {
    /// The packet identifier. 0 for QoS 0, which has no acknowledgement.
    pub packet_id: u16,
    /// Whether the broker may have sent it before (DUP).
    pub duplicate: bool,
    /// The position of the topic.
    pub topic: Range<usize>,
    /// The position of the payload.
    pub payload: Range<usize>,
}

/// A packet.
#[derive(Debug)]
pub enum Frame {
    /// A message.
    Publish(Publish),
    /// Any other packet.
    Other(Box<Packet>),
}

/// Takes all whole packets from the front of `input`. Reserves memory for the packet that is not whole.
///
/// # Errors
/// If the bytes are not a packet, or a packet is larger than `max` bytes.
pub fn take_whole(input: &mut BytesMut, max: usize) -> Result<Option<Bytes>, FrameError> {
    let mut end = 0;
    while let Some((header, length)) = measure(&input[end..])? {
        if header + length > max {
            return Err(FrameError::TooLarge { bytes: header + length, max });
        }
        let next = end + header + length;
        if next > input.len() {
            input.reserve(next - input.len());
            break;
        }
        end = next;
    }
    Ok((end > 0).then(|| input.split_to(end).freeze()))
}

/// The lengths of the fixed header and of the rest. `None` if the header is not whole.
fn measure(bytes: &[u8]) -> Result<Option<(usize, usize)>, FrameError> {
    let mut length = 0;
    for (index, byte) in bytes.iter().skip(1).take(4).enumerate() {
        length |= usize::from(byte & 0x7f) << (7 * index);
        if byte & 0x80 == 0 {
            debug_assert!(length <= MAX_PACKET_BYTES, "the range of four bytes");
            return Ok(Some((2 + index, length)));
        }
    }
    if bytes.len() > 4 { Err(FrameError::MeasurePacket) } else { Ok(None) }
}

/// The packets of a block from [`take_whole`].
pub fn frames(block: &Bytes) -> impl Iterator<Item = Result<Frame, FrameError>> + '_ {
    let mut position = 0;
    std::iter::from_fn(move || {
        let (header, length) = match measure(&block[position..]) {
            Ok(Some(measured)) => measured,
            Ok(None) => return None,
            Err(error) => return Some(Err(error)),
        };
        let (first, body) = (block[position], position + header..position + header + length);
        let whole = position..body.end;
        position = body.end;
        if first >> 4 == 3 {
            return Some(publish(block, first, body).map(Frame::Publish).ok_or(FrameError::LocatePublish));
        }
        let mut packet = BytesMut::from(&block[whole]);
        Some(Packet::read(&mut packet, None).map(|packet| Frame::Other(Box::new(packet))).map_err(FrameError::Decode))
    })
}

/// Locates the parts of a PUBLISH (section 3.3). Its properties are skipped. Only topic aliases would matter, and CONNECT does not
/// allow them.
fn publish(block: &[u8], first: u8, body: Range<usize>) -> Option<Publish> {
    let quality = (first >> 1) & 3;
    let topic = body.start + 2..body.start + 2 + usize::from(number(block, body.start, body.end)?);
    let mut position = topic.end;
    let mut packet_id = 0;
    if quality > 0 {
        packet_id = number(block, position, body.end).filter(|id| *id > 0)?;
        position += 2;
    }
    // The same variable byte integer as a packet's length.
    let properties = block.get(position.checked_sub(1)?..body.end)?;
    let (header, length) = measure(properties).ok()??;
    let payload = position + header - 1 + length..body.end;
    let duplicate = first & 8 != 0;
    (payload.start <= payload.end && topic.end <= body.end && quality < 3).then_some(Publish { packet_id, duplicate, topic, payload })
}

fn number(block: &[u8], position: usize, end: usize) -> Option<u16> {
    let bytes = block.get(position..end.min(position + 2))?;
    Some(u16::from_be_bytes(bytes.try_into().ok()?))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use rumqttc::mqttbytes::QoS;
    use rumqttc::mqttbytes::v5::{PingResp, PublishProperties};

    use super::*;

    fn packet(topic: &str, id: u16, duplicate: bool, payload: &[u8], properties: Option<PublishProperties>) -> Vec<u8> {
        let quality = if id == 0 { QoS::AtMostOnce } else { QoS::AtLeastOnce };
        let mut publish = rumqttc::mqttbytes::v5::Publish::new(topic, quality, payload.to_vec(), properties);
        publish.pkid = id;
        publish.dup = duplicate;
        let mut bytes = BytesMut::new();
        publish.write(&mut bytes).unwrap();
        bytes.to_vec()
    }

    fn located(block: &Bytes) -> Vec<(u16, bool, Vec<u8>, Vec<u8>)> {
        frames(block)
            .filter_map(|frame| match frame.unwrap() {
                Frame::Publish(found) => {
                    Some((found.packet_id, found.duplicate, block[found.topic].to_vec(), block[found.payload].to_vec()))
                }
                Frame::Other(_) => None,
            })
            .collect()
    }

    #[test]
    fn malformed_bytes_are_errors() {
        assert!(take_whole(&mut BytesMut::from(&b"\x30\xff\xff\xff\xff\x01"[..]), MAX_PACKET_BYTES).is_err());
        for bytes in [
            &b"\x32\x02\x00\x00"[..],
            b"\x32\x03\x00\x05a",
            b"\x32\x06\x00\x01a\x00\x00\x00",
            b"\x36\x06\x00\x01a\x00\x01\x00",
            b"\x32\x06\x00\x01a\x00\x01\x09",
        ] {
            let block = take_whole(&mut BytesMut::from(bytes), MAX_PACKET_BYTES).unwrap().unwrap();
            assert!(frames(&block).any(|frame| frame.is_err()), "{bytes:?}");
        }
    }

    #[test]
    fn a_packet_above_the_maximum_is_refused_by_its_header() {
        let mut input = BytesMut::from(&b"\x30\xff\x7f"[..]);
        assert!(matches!(take_whole(&mut input, 1_000), Err(FrameError::TooLarge { bytes: 16_386, max: 1_000 })));
    }

    proptest! {
        /// For every fragmentation of the stream, each message is found once, whole and in order.
        #[test]
        fn fragmented_packets_are_found_in_order(
            messages in prop::collection::vec(("[a-z]{1,5}/[a-z]{0,5}", 0_u16..3, any::<bool>(), prop::collection::vec(any::<u8>(), 0..300), any::<bool>()), 1..20),
            cuts in prop::collection::vec(1_usize..200, 1..50),
        ) {
            let mut stream = Vec::new();
            let mut expected = Vec::new();
            for (topic, id, duplicate, payload, with_properties) in messages {
                let duplicate = duplicate && id > 0;
                let properties = with_properties.then(|| PublishProperties { user_properties: vec![("key".into(), "v".repeat(200))], ..Default::default() });
                stream.extend(packet(&topic, id, duplicate, &payload, properties));
                let mut ping = BytesMut::new();
                PingResp::write(&mut ping).unwrap();
                stream.extend_from_slice(&ping);
                expected.push((id, duplicate, topic.into_bytes(), payload));
            }
            let (mut input, mut found, mut rest) = (BytesMut::new(), Vec::new(), &stream[..]);
            for cut in cuts.iter().cycle() {
                let (piece, later) = rest.split_at((*cut).min(rest.len()));
                input.extend_from_slice(piece);
                if let Some(block) = take_whole(&mut input, MAX_PACKET_BYTES).unwrap() {
                    found.extend(located(&block));
                }
                rest = later;
                if rest.is_empty() {
                    break;
                }
            }
            prop_assert!(input.is_empty());
            prop_assert_eq!(found, expected);
        }

        #[test]
        fn arbitrary_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..300), head in 0_u8..=255) {
            let mut input = BytesMut::from(&[&[head], &bytes[..]].concat()[..]);
            if let Ok(Some(block)) = take_whole(&mut input, MAX_PACKET_BYTES) {
                for frame in frames(&block) {
                    if frame.is_err() {
                        break;
                    }
                }
            }
        }
    }
}
