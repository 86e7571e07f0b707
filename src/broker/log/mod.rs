//! The clients that are connected to a broker, from Mosquitto's log. Pure.
//!
//! [`line`] parses a line of the log; [`tracker`] stores the connected clients, and [`refused`] the refused ones; [`wire`] is the
//! protocol between agent and operator; [`damping`] computes the delay before a change of a device is written.

pub mod damping;
pub mod line;
pub mod refused;
pub mod tracker;
pub mod wire;

/// The longest name of a Device (`metadata.name`, see the rule of the kind).
const MAX_DEVICE_NAME_BYTES: usize = 200;

/// Whether a client of this name can be a Device: a lower-case DNS name (RFC 1123), as Kubernetes requires of every object. The
/// users of the agent, of workers and of the operator start with an underscore, and are not Devices.
#[must_use]
pub fn can_be_device(client: &str) -> bool {
    let allowed = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-' || byte == b'.';
    !client.is_empty() && client.len() <= MAX_DEVICE_NAME_BYTES && client.bytes().all(allowed)
}
