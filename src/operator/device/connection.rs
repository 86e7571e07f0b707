//! The connection state of a device in eight bytes.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use k8s_openapi::jiff::Timestamp;

use crate::api::device::{ConnectionState, DeviceConnection};

/// The connection state of a device, and since when.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct CompactConnection {
    /// The state.
    pub state: ConnectionState,
    /// Seconds since 1970; enough until 2106.
    since: u32,
}

impl CompactConnection {
    /// From a time in seconds since 1970.
    #[must_use]
    pub fn new(state: ConnectionState, since: i64) -> Self {
        Self { state, since: u32::try_from(since.max(0)).unwrap_or(u32::MAX) }
    }

    /// From the status of a Device.
    #[must_use]
    pub fn of(status: &DeviceConnection) -> Self {
        Self::new(status.state, status.since.0.as_second())
    }

    /// The time of the last change, in seconds since 1970.
    #[must_use]
    pub fn since(self) -> i64 {
        i64::from(self.since)
    }

    /// For the status of a Device.
    #[must_use]
    pub fn status(self) -> DeviceConnection {
        // Every u32 is a valid timestamp.
        DeviceConnection { state: self.state, since: Time(Timestamp::from_second(self.since()).unwrap_or_default()) }
    }
}
