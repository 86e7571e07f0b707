//! Inputs that the parsers accept. Mutations start from these.

/// 2026-05-04T03:02:01.5Z, in milliseconds since 1970.
const MILLISECONDS: u64 = 1_777_863_721_500;

fn bytes(texts: &[&str]) -> Vec<Vec<u8>> {
    texts.iter().map(|text| text.as_bytes().to_vec()).collect()
}

pub fn json() -> Vec<Vec<u8>> {
    bytes(&[
        r#"{"ts":1777863721500,"rms":0.5,"count":-7,"running":true,"state":"l\u00e4uft","at":1777863721.5,"rest":[{"a":"x"},null]}"#,
        r#"[{"ts":1777863721500.25,"rms":1e-3},{"ts":1777863721501,"rest":{"a":{"b":[1,2.5,"\ud83d\ude00"]}}}]"#,
    ])
}

pub fn cbor() -> Vec<Vec<u8>> {
    vec![
        b"\xa4\x01\xc1\xfb\x41\xda\x7e\x03\x0a\x60\x00\x00\x63rms\xf9\x3e\x00\x62at\x1a\x69\xf7\xf9\xe9\x64rest\x82\x07\xa1\x61y\xf6"
            .to_vec(),
        b"\x82\xa3\x01\x1a\x69\xf7\xf9\xe9\x65count\x26\x65state\x62on\xbf\x01\x1a\x69\xf7\xf9\xe9\x67running\xf5\xff".to_vec(),
    ]
}

pub fn senml() -> Vec<Vec<u8>> {
    bytes(&[
        r#"[{"bn":"urn:dev:ow:1:","bt":1.777863721e9,"bu":"A","bver":5,"bv":1,"bs":2,"n":"rms","u":"V","v":0.5},{"n":"count","t":-5,"v":1}]"#,
        r#"[{"n":"running","vb":true},{"n":"state","vs":"caf\u00e9"},{"n":"rms","t":-60,"v":1e-3,"s":4,"ut":60},{"n":"x","vd":"QUJD"}]"#,
    ])
}

/// `{-2: "urn:", 0: "count", 2: 7}, {0: "rms", 2: 1.5}`; then records with a base time (-3), a text (3) and a relative time (6).
pub fn senml_cbor() -> Vec<Vec<u8>> {
    vec![
        b"\x82\xa3\x21\x64urn:\x00\x65count\x02\x07\xa2\x00\x63rms\x02\xf9\x3e\x00".to_vec(),
        b"\x82\xa3\x22\xfb\x41\xda\x7e\x03\x0a\x60\x00\x00\x00\x63rms\x02\xfb\x3f\xf3\x33\x33\x33\x33\x33\x33\xa3\x00\x65state\x03\x62on\x06\x24"
            .to_vec(),
    ]
}

pub fn plain_text() -> Vec<Vec<u8>> {
    bytes(&["2026-05-04T03:02:01.5Z", "2026-05-04T03:02:01+02:00"])
}

pub fn plain_number() -> Vec<Vec<u8>> {
    bytes(&["1.5", " -7e10 \n", "1"])
}

fn varint(mut number: u64) -> Vec<u8> {
    let mut bytes = Vec::new();
    while number >= 0x80 {
        bytes.push(number.to_le_bytes()[0] | 0x80);
        number >>= 7;
    }
    bytes.push(number.to_le_bytes()[0]);
    bytes
}

/// A message with these encoded metrics, on a topic of `SPARKPLUG_TOPICS`, in the form that the target reads.
fn sparkplug_message(topic: u8, sequence: u8, metrics: &[&[u8]]) -> Vec<u8> {
    let mut payload = [vec![0x08], varint(MILLISECONDS)].concat();
    for metric in metrics {
        payload.push(0x12);
        payload.extend(varint(u64::try_from(metric.len()).expect("a short metric")));
        payload.extend_from_slice(metric);
    }
    payload.extend([0x18, sequence]);
    let length = u16::try_from(payload.len()).expect("a short payload").to_be_bytes();
    [&[topic], &length[..], &payload].concat()
}

/// A birth of a node and of a device with name, alias, type and value of each metric; then data by alias, and data by name.
pub fn sparkplug() -> Vec<Vec<u8>> {
    let node = sparkplug_message(0, 0, &[b"\x0a\x05count\x10\x01\x20\x03\x50\x07"]);
    let birth = sparkplug_message(1, 1, &[b"\x0a\x05count\x10\x02\x20\x03\x50\x07", b"\x0a\x05state\x10\x03\x20\x0c\x7a\x02on"]);
    let data = sparkplug_message(2, 2, &[b"\x10\x02\x50\x08", b"\x10\x03\x7a\x03off"]);
    let at = [b"\x0a\x02at\x20\x0d\x58".to_vec(), varint(MILLISECONDS)].concat();
    let named = sparkplug_message(2, 3, &[b"\x0a\x07running\x20\x0b\x70\x01", &at]);
    vec![[node, birth.clone(), data.clone(), named].concat(), [birth, data].concat()]
}

pub fn protobuf() -> Vec<Vec<u8>> {
    let seconds = [vec![0x08], varint(MILLISECONDS / 1000)].concat();
    let time = [&[0x0a, 6][..], &seconds].concat();
    let full = [&time[..], b"\x11\0\0\0\0\0\0\xf0\x3f\x18\x0d\x20\x01\x2a\x02on\x35\xe9\xf9\xf7\x69\x3a\x04\x2a\x02ok"].concat();
    vec![full, time]
}

pub fn topic() -> Vec<Vec<u8>> {
    bytes(&[
        "devices/{device}/telemetry\ndevices/press-1/telemetry",
        "plants/{plant}/+/{line}/{device}\nplants/berlin/x/3/press-1",
        "spBv1.0/{group}/+/{node}/{device}\nspBv1.0/g/DDATA/n/d",
    ])
}

/// After the position of the cut: a PUBLISH with QoS 1 and a property, a CONNACK, a SUBACK and a PINGRESP.
pub fn mqtt_frame() -> Vec<Vec<u8>> {
    vec![
        b"\x05\x32\x0c\x00\x01a\x00\x01\x02\x01\x01{}\x7b\x7d\x20\x03\x00\x00\x00".to_vec(),
        b"\x03\x90\x04\x00\x01\x00\x01\xd0\x00\x30\x05\x00\x01a\x00x".to_vec(),
    ]
}

pub fn broker_log() -> Vec<Vec<u8>> {
    bytes(&[
        "2026-11-23T09:37:50: mosquitto version 2.1.2 starting\n2026-11-23T09:37:52: New client connected from 127.0.0.1:36840 as press-1 (p5, c1, k60, u'press-1').\n2026-11-23T09:37:53: Client press-1 [127.0.0.1:36840] disconnected: session taken over.\n",
        "1795426672: Client connection from 10.0.0.1 denied: max_connections exceeded.\n1795426673: OpenSSL Error while trying to get the error[0]: error:0A000126:x\n1795426673: Client 10.0.0.1 [10.0.0.1:5] disconnected: Protocol error.\n",
        "2026-11-23T09:38:30: Client ghost [10.0.0.2:7] disconnected: not authorised.\n2026-11-23T09:38:30: mosquitto version 2.1.2 terminating\n",
    ])
}

pub fn password_hash() -> Vec<Vec<u8>> {
    bytes(&[
        "$7$101$AVsPayrQ1yEMVvgO$4cdV0Vt0Celgv8Ndsbk/EBWK2r/j0bj9qhFjlQJYH8kvniCx3DYoBY54HZ2OaSnMhO1YNKaGq8AFN3awwt5H2w==",
        "$7$1$AAAA$AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA==",
    ])
}

pub fn acl_line() -> Vec<Vec<u8>> {
    bytes(&["topic read a/+/#", "topic write devices/%u/telemetry", "topic readwrite größe/°C"])
}
