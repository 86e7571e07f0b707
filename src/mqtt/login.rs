//! A login at a broker: address, TLS, client identifier, user name and password.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use rustls::ClientConfig;

use crate::runtime::address::AddressPolicy;
use crate::runtime::tls::{TlsError, Verification, client_configuration};

/// How long a connect may take, including TLS and the CONNACK. A broker that reloads thousands of credentials does not answer for up
/// to a second.
pub const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// A login at a broker. `Debug` shows neither user name nor password: both are values of a Secret.
#[derive(Clone)]
pub struct Login {
    /// Host name or IP address.
    pub host: String,
    /// TCP port.
    pub port: u16,
    /// Client identifier.
    pub client_id: String,
    /// User name.
    pub username: String,
    /// Password.
    pub password: Bytes,
    /// TLS. `None` for a listener without TLS.
    pub tls: Option<ClientTls>,
    /// The addresses that the operator connects to for a tenant. `None`: any address.
    pub addresses: Option<AddressPolicy>,
}

/// The lifetime of a session at the broker (MQTT 5.0, 3.1.2.4 and 3.1.2.11.2).
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum BrokerSession {
    /// The connection starts without a session, and its session ends with it.
    Clean,
    /// The connection resumes the session, and the broker keeps the session for this number of seconds after a disconnect.
    Persistent {
        /// The session expiry interval, in seconds.
        expiry_seconds: u32,
    },
}

/// The TLS settings of a client.
#[derive(Clone)]
pub struct ClientTls {
    /// The trusted authorities (PEM). `None`: the public ones.
    pub authorities: Option<Vec<u8>>,
    /// The configuration with these authorities.
    pub configuration: Arc<ClientConfig>,
}

impl ClientTls {
    /// Verifies the broker by these authorities (PEM), or by the public ones.
    ///
    /// # Errors
    /// If the authorities are not certificates.
    pub fn verified_by(authorities: Option<Vec<u8>>) -> Result<Self, TlsError> {
        let verification = authorities.as_deref().map_or(Verification::Public, Verification::Authorities);
        let configuration = Arc::new(client_configuration(verification)?);
        Ok(Self { authorities, configuration })
    }

    /// Accepts any certificate.
    ///
    /// # Errors
    /// If the TLS library refuses the settings.
    pub fn unverified() -> Result<Self, TlsError> {
        Ok(Self { authorities: None, configuration: Arc::new(client_configuration(Verification::Unverified)?) })
    }
}

impl Login {
    /// `host:port`, with an IPv6 address in brackets.
    #[must_use]
    pub fn address(&self) -> String {
        if self.host.contains(':') { format!("[{}]:{}", self.host, self.port) } else { format!("{}:{}", self.host, self.port) }
    }
}

impl fmt::Debug for Login {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("Login").field("address", &self.address()).field("client_id", &self.client_id).finish_non_exhaustive()
    }
}

impl PartialEq for Login {
    fn eq(&self, other: &Self) -> bool {
        let fields = |login: &Self| {
            let authorities = login.tls.as_ref().map(|tls| tls.authorities.clone());
            (login.host.clone(), login.port, login.client_id.clone(), login.username.clone(), login.password.clone(), authorities)
        };
        fields(self) == fields(other)
    }
}

impl Eq for Login {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_ipv6_address_is_in_brackets_and_debug_hides_the_password() {
        let login = |host: &str| Login {
            host: host.to_owned(),
            port: 1883,
            client_id: "c".to_owned(),
            username: "secret user".to_owned(),
            password: "secret".into(),
            tls: None,
            addresses: None,
        };
        assert_eq!(login("broker").address(), "broker:1883");
        assert_eq!(login("::1").address(), "[::1]:1883");
        assert!(!format!("{:?}", login("broker")).contains("secret"));
    }
}
