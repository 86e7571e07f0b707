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

/// Rows per transaction in L1.
pub const COPY_ROWS: u64 = 10_000;

/// Content of the messages.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Content {
    /// The given number of readings
    Readings(u64),
    /// One reading with the time of its publication
    Live,
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
    let load = (0..messages).map(move |message| {
        let (device, payload) = match content {
            Content::Readings(1) => (message, reading(message, START + message * STEP)),
            Content::Readings(readings) => {
                let texts: Vec<String> =
                    (message * readings..(message + 1) * readings).map(|number| reading(number, START + number * STEP)).collect();
                (message, format!("[{}]", texts.join(",")))
            }
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
pub fn decode() -> Value {
    json!({
        "time": {"pointer": "/ts", "unit": "Microseconds", "maxAge": "9999d"},
        "fields": [
            {"name": "rms", "type": "Float64", "min": 0, "max": 200, "required": true},
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
    let mut data = BytesMut::from(&b"PGCOPY\n\xff\r\n\0\0\0\0\0\0\0\0\0"[..]);
    for number in first..(first + COPY_ROWS).min(rows) {
        let (rms, temperature) = values(number);
        data.put_i16(6);
        data.put_i32(8);
        data.put_u64(START + number * STEP - EPOCH * 1_000_000);
        data.put_i32(4);
        data.put_u32(u32::try_from(number / readings % DEVICES).unwrap_or(0) + 1);
        for value in [rms, temperature] {
            data.put_i32(8);
            data.put_f64(value);
        }
        data.put_i32(7);
        data.put_slice(b"running");
        data.put_i32(8);
        data.put_u64(number);
    }
    data.put_i16(-1);
    data.freeze()
}
