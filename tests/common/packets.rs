//! MQTT 5 packets for tests that need more control over a connection than existing clients give.

#![allow(clippy::panic, reason = "a helper of tests fails by panicking")]

use std::io::{ErrorKind, Read};

use bytes::BytesMut;
use rumqttc::mqttbytes::v5::{Connect, ConnectAuth, ConnectProperties, Packet};

/// CONNECT with user name and password.
pub fn login((username, password): (&str, &str)) -> ConnectAuth {
    ConnectAuth::UsernamePassword { username: username.to_owned(), password: password.to_owned().into() }
}

/// CONNECT with a session that survives its connection, or (clean start) with a session that ends with it.
pub fn hello(client_id: &str, auth: ConnectAuth, outlives: bool) -> BytesMut {
    let properties = ConnectProperties { session_expiry_interval: Some(if outlives { 600 } else { 0 }), ..ConnectProperties::new() };
    let connect = Connect { keep_alive: 60, client_id: client_id.to_owned(), clean_start: !outlives, properties: Some(properties) };
    let mut packet = BytesMut::new();
    Packet::Connect(connect, None, auth).write(&mut packet, None).unwrap();
    packet
}

/// Reads the next packet; `None` when the connection has ended.
pub fn next_packet(stream: &mut (impl Read + ?Sized), input: &mut BytesMut) -> Option<Packet> {
    let mut chunk = [0; 8192];
    loop {
        match Packet::read(input, None) {
            Ok(packet) => return Some(packet),
            Err(rumqttc::mqttbytes::Error::InsufficientBytes(_)) => {}
            Err(error) => panic!("{error}"),
        }
        match stream.read(&mut chunk) {
            Ok(0) => return None,
            Ok(read) => input.extend_from_slice(&chunk[..read]),
            Err(error) if error.kind() == ErrorKind::ConnectionReset => return None,
            Err(error) => panic!("{error}"),
        }
    }
}
