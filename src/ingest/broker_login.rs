//! The login of a worker's session at a broker.

use std::path::Path;

use bytes::Bytes;

use crate::api::name::external_session_client;
use crate::configuration::ingest::IngestGateway;
use crate::mqtt::login::{BrokerSession, Login};
use crate::mqtt::login_files::{LoginFiles, ReadLoginError};

/// How long an internal broker keeps the session of a worker without a connection: 30 days, for a paused Pipeline. The limits of the
/// Gateway bound the queue.
const INTERNAL_SESSION_EXPIRY_SECONDS: u32 = 30 * 86_400;

/// How long an external broker keeps the session: a week. Its limits are unknown, and some brokers allow no longer expiry
/// (<https://docs.aws.amazon.com/general/latest/gr/iot-core.html>).
const EXTERNAL_SESSION_EXPIRY_SECONDS: u32 = 7 * 86_400;

/// The largest packet from an external broker, in bytes: an eighth of the memory of a worker, and larger than what the brokers of clouds and
/// the defaults of EMQX and VerneMQ let a device publish (128 KiB to 1 MiB). A broker sends no larger message (MQTT 5.0, 3.1.2.11.4).
const MAX_EXTERNAL_PACKET_BYTES: u32 = 16 << 20;

/// The login of a session.
#[derive(Clone, Debug)]
pub enum BrokerLogin {
    /// At the internal listener of a managed broker.
    Internal(Login),
    /// At an external broker, with a login from files.
    External(LoginFiles),
}

impl BrokerLogin {
    /// The login of the session `number` at the broker of `gateway`. The files of an external broker are in a subfolder of `folder`.
    #[must_use]
    pub fn new(gateway: &IngestGateway, number: i32, username: &str, password: &Bytes, folder: &Path) -> Self {
        let (host, port) = (gateway.host.clone(), gateway.port);
        match &gateway.external {
            Some(external) => Self::External(LoginFiles {
                folder: folder.join(&gateway.name),
                host,
                port,
                client_id: external_session_client(&external.client_id, number),
                tls: external.tls,
                authorities: external.authorities,
            }),
            // A managed broker uses the user name as the client identifier.
            None => Self::Internal(Login {
                host,
                port,
                client_id: username.to_owned(),
                username: username.to_owned(),
                password: password.clone(),
                tls: None,
                addresses: None,
            }),
        }
    }

    /// The current login.
    ///
    /// # Errors
    /// If a file cannot be read or is invalid.
    pub fn read(&self) -> Result<Login, ReadLoginError> {
        match self {
            Self::Internal(login) => Ok(login.clone()),
            Self::External(files) => files.read(),
        }
    }

    /// The largest packet that the broker may send, in bytes. A managed broker has the limit of its Gateway.
    #[must_use]
    pub fn max_packet_bytes(&self) -> Option<u32> {
        match self {
            Self::Internal(_) => None,
            Self::External(_) => Some(MAX_EXTERNAL_PACKET_BYTES),
        }
    }

    /// The session at the broker.
    #[must_use]
    pub fn broker_session(&self) -> BrokerSession {
        let expiry_seconds = match self {
            Self::Internal(_) => INTERNAL_SESSION_EXPIRY_SECONDS,
            Self::External(_) => EXTERNAL_SESSION_EXPIRY_SECONDS,
        };
        BrokerSession::Persistent { expiry_seconds }
    }
}
