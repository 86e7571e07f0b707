//! Whether a device is connected, in eight bytes.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use k8s_openapi::jiff::Timestamp;

use crate::api::device::{ConnectionState, DeviceConnection};

/// Whether a device is connected, and since when.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct CompactConnection {
    /// Whether.
    pub state: ConnectionState,
    /// Seconds since 1970; enough until 2106.
    since: u32,
}

impl CompactConnection {
    /// From seconds since 1970.
    #[must_use]
    pub fn new(state: ConnectionState, since: i64) -> Self {
        Self { state, since: u32::try_from(since.max(0)).unwrap_or(u32::MAX) }
    }

    /// As a status says.
    #[must_use]
    pub fn of(status: &DeviceConnection) -> Self {
        Self::new(status.state, status.since.0.as_second())
    }

    /// Seconds since 1970.
    #[must_use]
    pub fn since(self) -> i64 {
        i64::from(self.since)
    }

    /// For a status.
    #[must_use]
    pub fn status(self) -> DeviceConnection {
        // Every u32 is a time that there is.
        DeviceConnection { state: self.state, since: Time(Timestamp::from_second(self.since()).unwrap_or_default()) }
    }
}
