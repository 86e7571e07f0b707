//! Limits of each client of a broker.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// What a single device may use of its broker. A device that exceeds a limit is refused; all other clients are not affected. The condition
/// `BrokerFull` (reason `ClientsLimited`) and its Event name it; the metric `fleetwright_broker_client_limits_exceeded` counts. The limits do
/// not apply to workers, to the agent and to the operator. `0` in a field that allows it switches that limit off.
///
/// How a device is refused: a client of MQTT 5 gets a reason code (0x97 "Quota exceeded" unless the field says otherwise) and stays
/// connected; one of MQTT 3.1.1, whose protocol has no such code, is disconnected without an acknowledgement. Messages of QoS 0 are
/// dropped.
#[derive(Clone, Debug, Deserialize, Eq, JsonSchema, PartialEq, Serialize)]
#[serde(rename_all = "camelCase", default)]
pub struct ClientLimits {
    /// The most messages that wait for a device that is offline or slow, 1 to 1,000,000. Further ones are dropped, as `MessagesDropped`
    /// reports. Default: 1,000, as in EMQX and VerneMQ, because a device that returns needs commands and not history.
    #[schemars(range(min = 1, max = 1_000_000))]
    pub queued_messages: i32,

    /// The most bytes of payloads that wait for a device or are in flight to it, 1 KiB to 1 GiB; also of messages of QoS 2 that it has not
    /// released. The message that reaches the limit is still accepted. Further ones are dropped, as `MessagesDropped` reports. Default:
    /// 4 MiB, a thousand messages of 4 KiB.
    #[schemars(range(min = 1024, max = 1_073_741_824))]
    pub queued_bytes: i32,

    /// The most messages of QoS 1 and 2 that are in flight to a device, or from it (the Receive Maximum of MQTT 5), 1 to 65,534. A client
    /// of MQTT 3.1.1 with more unreleased messages of QoS 2 gets no acknowledgement for the further ones. Once it has released the first
    /// ones it is disconnected, and sends the others again. Default: 1,000, because with a smaller window publishers wait for the disk.
    #[schemars(range(min = 1, max = 65_534))]
    pub in_flight_messages: i32,

    /// The most messages that a device has retained at once, 1 to 1,000,000. Replacing and deleting one is always possible. Messages of
    /// QoS 2 count from their release, so there can be up to `inFlightMessages` more. Default: 100, because a device retains its state,
    /// and what is retained stays until someone deletes it.
    #[schemars(range(min = 1, max = 1_000_000))]
    pub retained_messages: i32,

    /// The most bytes of topics and payloads that a device has retained at once, 1 KiB to 1 GiB. Messages of QoS 2 count from their release.
    /// Default: 1 MiB, a hundred messages of 10 KiB.
    #[schemars(range(min = 1024, max = 1_073_741_824))]
    pub retained_bytes: i32,

    /// The most subscriptions of a device, 1 to 100,000. A further one is refused in the SUBACK. Default: 100, because a device subscribes
    /// to its own topics, and each subscription takes memory and a row that last as long as the session.
    #[schemars(range(min = 1, max = 100_000))]
    pub subscriptions: i32,

    /// The most levels of a topic or of a topic filter, 2 to 200. Default: 16, because the broker keeps a node for each level of a
    /// retained message and of a subscription. (EMQX allows 128, VerneMQ 10.)
    #[schemars(range(min = 2, max = 200))]
    pub topic_levels: i32,

    /// The most bytes of a topic or of a topic filter, 32 to 65,535. Default: 1,024, four times the longest name of an object.
    #[schemars(range(min = 32, max = 65_535))]
    pub topic_bytes: i32,

    /// The most bytes of a message's properties (MQTT 5), 64 to 65,535. Default: 4,096, because the broker stores them with each message,
    /// and no other limit counts them.
    #[schemars(range(min = 64, max = 65_535))]
    pub property_bytes: i32,

    /// The most bytes of a last will's payload, 1 to 65,535. A larger one is refused with the connection (0x95, "Packet too large").
    /// Default: 4,096, because the broker holds a will in memory for each connection.
    #[schemars(range(min = 1, max = 65_535))]
    pub will_bytes: i32,

    /// Whether a last will may be retained. If not, such a connection is refused (0x9A, "Retain not supported"). Default: true, for devices
    /// that report their absence in this way. A retained will counts as a retained message of its device when it is published.
    pub retained_wills: bool,

    /// Seconds after which the session of a device that is offline ends, with its queue and its subscriptions, 60 to 315,360,000 (ten
    /// years). A device that asks for longer gets this (the Session Expiry Interval of MQTT 5). Default: 604,800 (seven days), for a
    /// device that is switched off over a weekend or a holiday.
    #[schemars(range(min = 60, max = 315_360_000))]
    pub session_expiry_seconds: i32,

    /// The most packets per second that a device sends on average, 1 to 1,000,000; `0`: not limited. The broker reads a faster device more
    /// slowly, which loses nothing. What a device sends to itself counts once more for each subscription. Default: 10,000, a sixth of
    /// what a broker on two cores accepts in total with `durability: Process` (61,000 messages of 100 bytes).
    #[schemars(range(min = 0, max = 1_000_000))]
    pub messages_per_second: i32,

    /// Packets that a device may send at once after a pause, beyond which `messagesPerSecond` applies, 1 to 10,000,000. A new connection
    /// does not renew them. Default: 20,000, what a device that was offline for some hours sends.
    #[schemars(range(min = 1, max = 10_000_000))]
    pub message_burst: i32,

    /// The most bytes per second that a device sends on average, 1 to 1 GiB; `0`: not limited. The broker reads a faster device more slowly.
    /// Default: 16 MiB, the larger part of a network of 150 Mbit/s.
    #[schemars(range(min = 0, max = 1_073_741_824))]
    pub bytes_per_second: i32,

    /// Bytes that a device may send at once after a pause, beyond which `bytesPerSecond` applies, 1 KiB to 1 GiB. Default: 32 MiB, two
    /// seconds' worth.
    #[schemars(range(min = 1024, max = 1_073_741_824))]
    pub byte_burst: i32,
}

/// The doc comments of the fields give the reasons. Neither EMQX 5 nor VerneMQ limits rates, retained messages or subscriptions of a client
/// unless configured.
impl Default for ClientLimits {
    fn default() -> Self {
        Self {
            queued_messages: 1_000,
            queued_bytes: 4 << 20,
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
            messages_per_second: 10_000,
            message_burst: 20_000,
            bytes_per_second: 16 << 20,
            byte_burst: 32 << 20,
        }
    }
}
