//! Limits of each client of a broker.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// What a single device may use of its broker. A device that exceeds a limit is refused; all other clients are not affected. The condition
/// `BrokerFull` (reason `ClientsLimited`) names it. The limits do not apply to workers, to the agent and to the operator. `0` in a field
/// that allows it switches that limit off.
///
/// How a device is refused: a client of MQTT 5 gets a reason code (0x97 "Quota exceeded" unless the field says otherwise) and stays
/// connected; one of MQTT 3.1.1, whose protocol has no such code, is disconnected without an acknowledgement. Messages of QoS 0 are
/// dropped.
#[derive(Clone, Debug, Deserialize, Eq, JsonSchema, PartialEq, Serialize)]
#[serde(rename_all = "camelCase", default)]
pub struct ClientLimits {
    /// The most messages that wait for a device that is offline or slow. Further ones are dropped, as `MessagesDropped` reports.
    #[schemars(range(min = 1, max = 1_000_000))]
    pub queued_messages: i32,

    /// The most bytes of payloads that wait for a device or are in flight to it; also of messages of QoS 2 that it has not released.
    /// The message that reaches the limit is still accepted. Further ones are dropped, as `MessagesDropped` reports.
    #[schemars(range(min = 1024, max = 1_073_741_824))]
    pub queued_bytes: i32,

    /// The most messages of QoS 1 and 2 that are in flight to a device, or from it (the Receive Maximum of MQTT 5).
    #[schemars(range(min = 1, max = 65_534))]
    pub in_flight_messages: i32,

    /// The most messages that a device has retained at once. Deleting one is always possible.
    #[schemars(range(min = 1, max = 1_000_000))]
    pub retained_messages: i32,

    /// The most bytes of topics and payloads that a device has retained at once.
    #[schemars(range(min = 1024, max = 1_073_741_824))]
    pub retained_bytes: i32,

    /// The most subscriptions of a device.
    #[schemars(range(min = 1, max = 100_000))]
    pub subscriptions: i32,

    /// The most levels of a topic or of a topic filter.
    #[schemars(range(min = 2, max = 200))]
    pub topic_levels: i32,

    /// The most bytes of a topic or of a topic filter.
    #[schemars(range(min = 32, max = 65_535))]
    pub topic_bytes: i32,

    /// The most bytes of a message's properties (MQTT 5).
    #[schemars(range(min = 64, max = 65_535))]
    pub property_bytes: i32,

    /// The most bytes of a last will's payload. A larger one is refused with the connection (0x95, "Packet too large").
    #[schemars(range(min = 1, max = 65_535))]
    pub will_bytes: i32,

    /// Whether a last will may be retained. If not, such a connection is refused (0x9A, "Retain not supported"). A retained will counts as
    /// a retained message of its device when it is published.
    pub retained_wills: bool,

    /// Seconds after which the session of a device that is offline ends, with its queue and its subscriptions. A device that asks for
    /// longer gets this (the Session Expiry Interval of MQTT 5).
    #[schemars(range(min = 60, max = 315_360_000))]
    pub session_expiry_seconds: i32,

    /// The most packets per second that a device sends on average. The broker reads a faster device more slowly, which loses nothing. `0`:
    /// not limited.
    #[schemars(range(min = 0, max = 1_000_000))]
    pub messages_per_second: i32,

    /// Packets that a device may send at once after a pause, beyond which `messagesPerSecond` applies.
    #[schemars(range(min = 1, max = 10_000_000))]
    pub message_burst: i32,

    /// The most bytes per second that a device sends on average. The broker reads a faster device more slowly. `0`: not limited.
    #[schemars(range(min = 0, max = 1_073_741_824))]
    pub bytes_per_second: i32,

    /// Bytes that a device may send at once after a pause, beyond which `bytesPerSecond` applies.
    #[schemars(range(min = 1024, max = 1_073_741_824))]
    pub byte_burst: i32,
}

/// Where a value has a counterpart: EMQX 5 queues 1,000 messages for a client, and VerneMQ 1,000; EMQX allows 128 levels of a topic and
/// VerneMQ 10. Neither limits rates, retained messages or subscriptions of a client unless configured.
impl Default for ClientLimits {
    fn default() -> Self {
        Self {
            queued_messages: 1_000,
            queued_bytes: 4 << 20,
            // A window of 20, Mosquitto's default, makes a publisher wait for the disk 20 messages at a time.
            in_flight_messages: 1_000,
            retained_messages: 100,
            retained_bytes: 1 << 20,
            subscriptions: 100,
            topic_levels: 16,
            topic_bytes: 1_024,
            property_bytes: 4_096,
            will_bytes: 4_096,
            retained_wills: true,
            session_expiry_seconds: 7 * 24 * 3_600,
            // A sixth of what a broker on two cores accepts in total with `durability: Process` (61,000 messages of 100 bytes).
            messages_per_second: 10_000,
            message_burst: 20_000,
            bytes_per_second: 16 << 20,
            byte_burst: 32 << 20,
        }
    }
}
