//! Who is connected to a broker, from the broker's own record of it: Mosquitto's log. Pure.
//!
//! [`line`] reads a line of the log; [`tracker`] keeps who is connected since when, and [`refused`] whom the broker turned
//! away; [`wire`] is what an agent tells the operator of that; [`damping`] says how long a device has to stay as it is before
//! that is worth a write.

pub mod damping;
pub mod line;
pub mod refused;
pub mod tracker;
pub mod wire;

/// The longest name of a Device (`metadata.name`, see the rule of the kind).
const MAX_DEVICE_NAME_BYTES: usize = 200;

/// Whether a client of this name can be a Device: a lower-case DNS name (RFC 1123), as Kubernetes asks of every object. The
/// users of the agent, of workers and of the operator begin with an underscore, and are none.
#[must_use]
pub fn can_be_device(client: &str) -> bool {
    let allowed = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-' || byte == b'.';
    !client.is_empty() && client.len() <= MAX_DEVICE_NAME_BYTES && client.bytes().all(allowed)
}
