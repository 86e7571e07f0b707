//! The login of a worker's session at a broker.

use std::path::{Path, PathBuf};

use bytes::Bytes;

use crate::api::name::external_session_client;
use crate::configuration::ingest::IngestGateway;
use crate::mqtt::login::{BrokerSession, Login};
use crate::mqtt::login_files::{LoginFiles, ReadLoginError, verified_by_file};

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
    Internal {
        /// The login without TLS.
        login: Login,
        /// The folder with the authorities that verify the broker, which may change. `None` for a listener without TLS.
        authorities: Option<PathBuf>,
    },
    /// At an external broker, with a login from files.
    External(LoginFiles),
}

impl BrokerLogin {
    /// The login of the session `number` at the broker of `gateway`. The files of a broker are in a subfolder of `folder`.
    #[must_use]
    pub fn new(gateway: &IngestGateway, number: i32, username: &str, password: &Bytes, folder: &Path) -> Self {
        let (host, port) = (gateway.host.clone(), gateway.port);
        match &gateway.external {
            Some(external) => Self::External(LoginFiles {
                folder: folder.join(&gateway.name),
                host,
                port,
                client_id: external_session_client(&external.client_id, number),
                tls: gateway.tls,
                authorities: external.authorities,
            }),
            // A managed broker uses the user name as the client identifier.
            None => Self::Internal {
                login: Login {
                    host,
                    port,
                    client_id: username.to_owned(),
                    username: username.to_owned(),
                    password: password.clone(),
                    tls: None,
                    addresses: None,
                },
                authorities: gateway.tls.then(|| folder.join(&gateway.name)),
            },
        }
    }

    /// The current login.
    ///
    /// # Errors
    /// If a file cannot be read or is invalid.
    pub fn read(&self) -> Result<Login, ReadLoginError> {
        match self {
            Self::Internal { login, authorities } => {
                let tls = authorities.as_deref().map(verified_by_file).transpose()?;
                Ok(Login { tls, ..login.clone() })
            }
            Self::External(files) => files.read(),
        }
    }

    /// The largest packet that the broker may send, in bytes. A managed broker has the limit of its Gateway.
    #[must_use]
    pub fn max_packet_bytes(&self) -> Option<u32> {
        match self {
            Self::Internal { .. } => None,
            Self::External(_) => Some(MAX_EXTERNAL_PACKET_BYTES),
        }
    }

    /// The session at the broker.
    #[must_use]
    pub fn broker_session(&self) -> BrokerSession {
        let expiry_seconds = match self {
            Self::Internal { .. } => INTERNAL_SESSION_EXPIRY_SECONDS,
            Self::External(_) => EXTERNAL_SESSION_EXPIRY_SECONDS,
        };
        BrokerSession::Persistent { expiry_seconds }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_internal_listener_is_verified_with_the_current_file() {
        let folder = tempfile::tempdir().unwrap();
        let gateway = |tls: bool| IngestGateway {
            name: "plant-1".to_owned(),
            host: "plant-1-internal.fleet.svc".to_owned(),
            port: 1884,
            tls,
            external: None,
        };
        let login = BrokerLogin::new(&gateway(true), 0, "_ingest_vibration", &Bytes::from_static(b"password"), folder.path());
        assert!(matches!(login.read(), Err(ReadLoginError::ReadFile { .. })), "no file: it does not connect");
        std::fs::create_dir(folder.path().join("plant-1")).unwrap();
        let file = folder.path().join("plant-1/ca.crt");
        for _ in 0..2 {
            let pem = rcgen::CertificateParams::default().self_signed(&rcgen::KeyPair::generate().unwrap()).unwrap().pem();
            std::fs::write(&file, &pem).unwrap();
            assert_eq!(login.read().unwrap().tls.unwrap().authorities, Some(pem.trim_end().as_bytes().to_vec()));
        }
        let plain = BrokerLogin::new(&gateway(false), 0, "_ingest_vibration", &Bytes::from_static(b"password"), folder.path());
        assert!(plain.read().unwrap().tls.is_none());
    }
}
