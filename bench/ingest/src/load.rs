//! The published readings, and the same readings as rows of a COPY.

use bytes::{BufMut, Bytes, BytesMut};
use rumqttc::mqttbytes::QoS;
use rumqttc::mqttbytes::v5::Publish;
use serde_json::{Value, json};

use crate::publisher::Load;

/// Number of devices in the load.
pub const DEVICES: u64 = 1_000;

/// 2026-05-04T03:02:01.5Z in microseconds since 1970: the time of the first reading.
const START: u64 = 1_777_863_721_500_000;

/// Time between two readings, in microseconds.
const STEP: u64 = 50;

/// Delay of a late reading, in microseconds: forty days, so that its row belongs to an old chunk.
const LATE: u64 = 40 * 86_400_000_000;

/// Seconds from 1970 to 2000, PostgreSQL's epoch.
const EPOCH: u64 = 946_684_800;

/// The head of a binary COPY.
const HEADER: &[u8] = b"PGCOPY\n\xff\r\n\0\0\0\0\0\0\0\0\0";

/// Rows per transaction in L1.
pub const COPY_ROWS: u64 = 10_000;

/// Messages of a row in [`Content::Parts`].
pub const PARTS: u64 = 4;

/// Number of messages between two messages of a row in [`Content::Parts`], so that they are in different batches of 10,000 readings.
const BETWEEN: u64 = 100;

/// Content of the messages.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Content {
    /// The given number of readings
    Readings(u64),
    /// One reading with the time of its publication
    Live,
    /// The given number of readings, of which each row arrives in four messages, one for each field
    Parts(u64),
    /// One reading; five percent of the messages repeat the previous one, one percent is malformed, and one percent is late
    Mixed,
}

/// Kind of a message in a mixed load.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Part {
    Good,
    Repeated,
    Malformed,
    Late,
}

impl Part {
    fn of(message: u64) -> Self {
        match message % 100 {
            10 | 30 | 50 | 70 | 90 => Self::Repeated,
            20 => Self::Malformed,
            40 => Self::Late,
            _ => Self::Good,
        }
    }
}

/// Number of malformed messages in a mixed load, and number of distinct readings.
pub fn mixture(messages: u64) -> (u64, u64) {
    let count = |part| (0..messages).filter(|message| Part::of(*message) == part).count() as u64;
    (count(Part::Malformed), count(Part::Good) + count(Part::Late))
}

/// The messages of a load. The devices publish in turn.
pub fn load(messages: u64, content: Content) -> Load {
    let start = now();
    let load = (0..messages).map(move |message| {
        let (device, payload) = match content {
            Content::Readings(1) => (message, reading(message, START + message * STEP)),
            Content::Readings(readings) => {
                let texts: Vec<String> =
                    (message * readings..(message + 1) * readings).map(|number| reading(number, START + number * STEP)).collect();
                (message, format!("[{}]", texts.join(",")))
            }
            Content::Parts(readings) => parts(message, readings, start),
            Content::Live => (message, reading(message, now())),
            Content::Mixed => mixed(message),
        };
        let mut publish = Publish::new(format!("devices/device-{}/telemetry", device % DEVICES), QoS::AtLeastOnce, payload, None);
        publish.pkid = u16::try_from(message % 65_535 + 1).unwrap_or(1);
        publish
    });
    if content == Content::Live {
        return Box::new(load);
    }
    // Prepared in advance, so that the loader uses little processor time.
    Box::new(load.collect::<Vec<_>>().into_iter())
}

impl Content {
    /// The number of readings of a message.
    pub fn readings(self) -> u64 {
        match self {
            Self::Readings(readings) | Self::Parts(readings) => readings,
            Self::Live | Self::Mixed => 1,
        }
    }

    /// The number of messages of a row.
    pub fn parts(self) -> u64 {
        if matches!(self, Self::Parts(_)) { PARTS } else { 1 }
    }
}

/// The group of rows of a message, and its field.
fn part(message: u64) -> (u64, u64) {
    let (block, within) = (message / (BETWEEN * PARTS), message % (BETWEEN * PARTS));
    (block * BETWEEN + within % BETWEEN, within / BETWEEN)
}

/// Readings with one field each. Their times are recent and close together, because Telegraf merges only readings of the last minutes.
fn parts(message: u64, readings: u64, start: u64) -> (u64, String) {
    let (group, part) = part(message);
    let texts = (group * readings..(group + 1) * readings).map(|number| {
        let ((rms, temperature), time) = (values(number), start + number);
        match part {
            0 => format!(r#"{{"ts":{time},"rms":{rms}}}"#),
            1 => format!(r#"{{"ts":{time},"temperature":{temperature}}}"#),
            2 => format!(r#"{{"ts":{time},"state":"running"}}"#),
            _ => format!(r#"{{"ts":{time},"count":{number}}}"#),
        }
    });
    (group, format!("[{}]", texts.collect::<Vec<_>>().join(",")))
}

/// A transaction of the same readings in the binary COPY format: those of the messages between two messages of a row.
pub fn part_rows(batch: u64, readings: u64) -> Bytes {
    let mut data = BytesMut::from(HEADER);
    for message in batch * BETWEEN..(batch + 1) * BETWEEN {
        let (group, part) = part(message);
        for number in group * readings..(group + 1) * readings {
            let (rms, temperature) = values(number);
            put_key(&mut data, START + number, group);
            for (field, value) in [rms, temperature].into_iter().enumerate() {
                put(&mut data, (part == field as u64).then_some(&value.to_be_bytes()[..]));
            }
            put(&mut data, (part == 2).then_some(b"running"));
            put(&mut data, (part == 3).then_some(&number.to_be_bytes()[..]));
        }
    }
    data.put_i16(-1);
    data.freeze()
}

/// The number of columns, the time and the device.
fn put_key(data: &mut BytesMut, time: u64, group: u64) {
    data.put_i16(6);
    put(data, Some(&(time - EPOCH * 1_000_000).to_be_bytes()));
    put(data, Some(&(u32::try_from(group % DEVICES).unwrap_or(0) + 1).to_be_bytes()));
}

fn put(data: &mut BytesMut, value: Option<&[u8]>) {
    data.put_i32(value.map_or(-1, |value| i32::try_from(value.len()).unwrap_or(i32::MAX)));
    data.put_slice(value.unwrap_or_default());
}

fn mixed(message: u64) -> (u64, String) {
    let time = START + message * STEP;
    match Part::of(message) {
        Part::Good => (message, reading(message, time)),
        Part::Repeated => (message - 1, reading(message - 1, time - STEP)),
        Part::Late => (message, reading(message, time - LATE)),
        // Alternately incomplete, of a wrong type, and without a time. Negative numbers identify such rows.
        Part::Malformed => match message / 100 % 3 {
            0 => (message, format!(r#"{{"ts":{time},"rms":1.5,"count":-{message}"#)),
            1 => (message, format!(r#"{{"ts":{time},"rms":"broken","count":-{message}}}"#)),
            _ => (message, format!(r#"{{"rms":1.5,"count":-{message}}}"#)),
        },
    }
}

fn now() -> u64 {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    u64::try_from(now.as_micros()).unwrap_or(0)
}

/// The worker's decoder for these messages.
pub fn decode(content: Content) -> Value {
    let is_whole = content.parts() == 1;
    json!({
        "time": {"pointer": "/ts", "unit": "Microseconds", "maxAge": "9999d"},
        "fields": [
            {"name": "rms", "type": "Float64", "min": 0, "max": 200, "required": is_whole},
            {"name": "temperature", "type": "Float64", "min": -60, "max": 300},
            {"name": "state", "type": "Text"},
            {"name": "count", "type": "Int64"},
        ],
    })
}

/// Values of a reading: rms, temperature.
fn values(number: u64) -> (f64, f64) {
    ((number % 1_999) as f64 / 100.0, 20.0 + (number % 777) as f64 / 10.0)
}

/// A reading of about 112 bytes.
fn reading(number: u64, time: u64) -> String {
    let (rms, temperature) = values(number);
    format!(r#"{{"ts":{time},"rms":{rms},"temperature":{temperature},"state":"running","count":{number},"firmware":"2.14.3","rssi":-61}}"#)
}

/// A transaction of rows in the binary COPY format. All readings of a message belong to one device.
pub fn rows(first: u64, rows: u64, readings: u64) -> Bytes {
    let mut data = BytesMut::from(HEADER);
    for number in first..(first + COPY_ROWS).min(rows) {
        let (rms, temperature) = values(number);
        put_key(&mut data, START + number * STEP, number / readings);
        for value in [rms, temperature] {
            put(&mut data, Some(&value.to_be_bytes()));
        }
        put(&mut data, Some(b"running"));
        put(&mut data, Some(&number.to_be_bytes()));
    }
    data.put_i16(-1);
    data.freeze()
}
