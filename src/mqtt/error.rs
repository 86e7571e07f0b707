//! Why a packet connection could not be opened, or failed.

use std::io;

use rumqttc::mqttbytes::v5::{ConnectReturnCode, DisconnectReasonCode};

use super::frame::FrameError;
use super::login::CONNECT_TIMEOUT;
use super::login_files::ReadLoginError;

/// Why a packet connection could not be opened, or failed.
#[derive(Debug, thiserror::Error)]
pub enum ConnectionError {
    /// The login could not be read.
    #[error(transparent)]
    ReadLogin(#[from] ReadLoginError),

    /// The broker did not answer in time.
    #[error("failed to connect to the broker at {address} within {} s", CONNECT_TIMEOUT.as_secs())]
    Timeout {
        /// Host and port.
        address: String,
    },

    /// The broker refused the login.
    #[error("failed to log in to the broker at {address}: it answered {code:?}; check user name and password")]
    Refused {
        /// Host and port.
        address: String,
        /// The reason code of the CONNACK.
        code: ConnectReturnCode,
    },

    /// The network or TLS failed while connecting.
    #[error("failed to connect to the broker at {address}")]
    Connect {
        /// Host and port.
        address: String,
        /// The cause.
        #[source]
        source: io::Error,
    },

    /// The broker refused the subscription.
    #[error("failed to subscribe to {filter}: the broker answered {reasons}")]
    Subscribe {
        /// The filter.
        filter: String,
        /// The reason codes of the SUBACK.
        reasons: String,
    },

    /// The network failed.
    #[error("failed to read from or write to the broker")]
    Io(#[from] io::Error),

    /// The broker sent bytes that are not MQTT.
    #[error("failed to read a packet of the broker")]
    Frame(#[from] FrameError),

    /// A packet could not be encoded.
    #[error("failed to encode a packet")]
    Encode(#[source] rumqttc::mqttbytes::Error),

    /// The broker sent another packet than the expected one.
    #[error("received an unexpected packet: expected {expected}, found {found}")]
    UnexpectedPacket {
        /// The expected packet type.
        expected: &'static str,
        /// The received packet type.
        found: String,
    },

    /// The broker ended the connection.
    #[error("the broker ended the connection: {reason:?}")]
    Disconnected {
        /// The reason code of the DISCONNECT.
        reason: DisconnectReasonCode,
    },

    /// The broker did not close the connection.
    #[error("failed to end the session: the broker did not close the connection within {seconds} s")]
    Close {
        /// The timeout, in seconds.
        seconds: u64,
    },

    /// The broker is silent.
    #[error("the broker has sent nothing for {seconds} s")]
    Silent {
        /// The duration, in seconds.
        seconds: u64,
    },
}
