//! Targets for topics, MQTT packets, the broker's log and the lines of the broker's files.

use bytes::{Bytes, BytesMut};
use fleetwright::api::pipeline::Format;
use fleetwright::api::topic::TopicPattern;
use fleetwright::broker::credential::{acl, hash};
use fleetwright::broker::log::line::{Event, parse};
use fleetwright::broker::log::refused::clean;
use fleetwright::broker::log::tracker::Tracker;
use fleetwright::mqtt::frame::{Frame, FrameError, frames, take_whole};
use rumqttc::mqttbytes::{matches, valid_filter};

/// A fixed time of arrival for log lines without one: 2026-05-04T12:00:00Z, in seconds since 1970.
const NOW: i64 = 1_777_896_000;

/// The input is the topic of a Pipeline, a line feed and the topic of a message: the pattern captures a device exactly if the MQTT filter
/// matches.
pub fn topic(input: &[u8]) -> usize {
    let Ok(text) = std::str::from_utf8(input) else { return 0 };
    let Some((pattern, topic)) = text.split_once('\n') else { return 0 };
    // The topic of a message contains no wildcard (MQTT 5.0, 4.7.1); a broker refuses it.
    if topic.contains(['+', '#']) {
        return 0;
    }
    let mut captured = 0;
    for format in [Format::Json, Format::SparkplugB] {
        let Ok(pattern) = TopicPattern::compile(pattern, format) else { continue };
        assert!(valid_filter(pattern.filter()), "{:?}", pattern.filter());
        let mut tags = Vec::new();
        let device = pattern.capture(topic, &mut tags);
        // A wildcard at the first level does not match a topic that begins with `$` (MQTT 5.0, 4.7.2); a subscriber never gets one.
        if format == Format::Json && !topic.starts_with('$') {
            assert_eq!(device.is_some(), matches(topic, pattern.filter()), "{:?} {topic:?}", pattern.filter());
        }
        if device.is_some() {
            assert!(matches(topic, pattern.filter()) || topic.starts_with('$'), "{:?} {topic:?}", pattern.filter());
            assert_eq!(tags.len(), pattern.tags().len());
            captured += 1;
        }
    }
    captured
}

/// The packets of a stream, up to the first error.
fn packets(block: &Bytes) -> Result<Vec<Frame>, FrameError> {
    let packets: Vec<Frame> = frames(block).collect::<Result<_, _>>()?;
    for packet in &packets {
        if let Frame::Publish(publish) = packet {
            assert!(publish.topic.end <= publish.payload.start && publish.payload.end <= block.len(), "{publish:?}");
        }
    }
    Ok(packets)
}

/// The first byte of the input says where the stream is cut in two: the cut must not change which packets are found.
pub fn mqtt_frame(input: &[u8]) -> usize {
    let Some((cut, stream)) = input.split_first() else { return 0 };
    let Ok(Some(block)) = take_whole(&mut BytesMut::from(stream), usize::MAX) else { return 0 };
    let Ok(found) = packets(&block) else { return 0 };
    let (first, second) = stream.split_at(usize::from(*cut).min(stream.len()));
    let (mut buffer, mut in_parts) = (BytesMut::new(), 0);
    for part in [first, second] {
        buffer.extend_from_slice(part);
        if let Some(block) = take_whole(&mut buffer, usize::MAX).expect("the stream is valid") {
            in_parts += packets(&block).expect("the stream is valid").len();
        }
    }
    assert_eq!(found.len(), in_parts, "the stream is cut at {cut}");
    found.len()
}

/// The input is a part of the broker's log. The tracker reads it line by line, as the agent does.
pub fn broker_log(input: &[u8]) -> usize {
    let mut tracker = Tracker::new("epoch".to_owned());
    let mut events = 0;
    for line in String::from_utf8_lossy(input).lines() {
        let Some(found) = parse(line) else { continue };
        events += 1;
        if let Event::Connected { client, address } | Event::Disconnected { client, address, .. } = found.event {
            assert!(line.contains(client) && line.contains(address), "{line:?}");
            assert!(!clean(client).contains(char::is_control), "{client:?}");
        }
        tracker.observe(&found, NOW);
    }
    // The agent keeps this state in a file: a restart must find the same devices.
    let resumed = Tracker::restore("epoch".to_owned(), tracker.snapshot());
    assert_eq!(resumed.connected(), tracker.connected());
    events
}

/// An accepted hash fits on one line of the password file, which separates its fields with colons.
pub fn password_hash(input: &[u8]) -> usize {
    let Ok(text) = std::str::from_utf8(input) else { return 0 };
    if !hash::is_well_formed(text) {
        return 0;
    }
    assert!(text.starts_with("$7$") && text.is_ascii() && !text.contains([':', '\n', '\r', '\0']), "{text:?}");
    1
}

/// An accepted rule is one line of the ACL file.
pub fn acl_line(input: &[u8]) -> usize {
    let Ok(text) = std::str::from_utf8(input) else { return 0 };
    if !acl::is_line(text) {
        return 0;
    }
    assert!(!text.contains(char::is_control) && text.starts_with("topic "), "{text:?}");
    1
}
