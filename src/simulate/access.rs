//! Reads the logins of devices from the API server.

use std::time::Duration;

use bytes::Bytes;
use k8s_openapi::api::core::v1::Secret;
use kube::{Api, Client};
use tokio::time::timeout;

use crate::api::gateway::{Listener, ListenerAuthentication};
use crate::api::name::{device_credentials, service_host};
use crate::api::{self, Gateway};
use crate::mqtt::login::{ClientTls, Login};
use crate::runtime::tls::TlsError;

/// How long a request to the API server may take.
const API_TIMEOUT: Duration = Duration::from_secs(10);

/// The route of the devices to their brokers.
#[derive(Clone, Debug)]
pub struct Route {
    /// Host to connect to, instead of the Service of the Gateway.
    pub host: Option<String>,
    /// Port to connect to, instead of that of the first listener without TLS.
    pub port: Option<u16>,
    /// Whether the certificates of brokers are verified.
    pub verify: bool,
}

/// Why a device has no login yet.
#[derive(Debug, thiserror::Error)]
pub enum AccessError {
    /// The API server did not return an object.
    #[error("failed to get the {kind} {name}")]
    Get {
        /// The kind.
        kind: &'static str,
        /// The name.
        name: String,
        /// The cause.
        source: Box<kube::Error>,
    },

    /// The API server did not answer in time.
    #[error("failed to get the {kind} {name} within {} s", API_TIMEOUT.as_secs())]
    Timeout {
        /// The kind.
        kind: &'static str,
        /// The name.
        name: String,
    },

    /// A Secret lacks a key.
    #[error("failed to find the key {key} in the Secret {secret}")]
    FindKey {
        /// The Secret.
        secret: String,
        /// The key.
        key: String,
    },

    /// The Gateway has no matching listener.
    #[error("failed to find a listener in the Gateway {gateway}")]
    FindListener {
        /// The Gateway.
        gateway: String,
    },

    /// The certificate authority cannot be used.
    #[error(transparent)]
    TrustAuthority(#[from] TlsError),
}

/// Reads the login of a device from the API server.
#[derive(Clone)]
pub struct DeviceAccess {
    client: Client,
    namespace: String,
    route: Route,
}

impl DeviceAccess {
    /// Creates the access to a namespace.
    #[must_use]
    pub fn new(client: Client, namespace: String, route: Route) -> Self {
        Self { client, namespace, route }
    }

    /// The current login of a device.
    ///
    /// # Errors
    /// If an object or a key does not exist, or the API server does not answer.
    pub async fn login(&self, device: &str) -> Result<Login, AccessError> {
        let spec = self.get::<api::Device>("Device", device).await?.spec;
        let given = spec.authentication.password.and_then(|password| password.secret_ref);
        let (secret, key) = given.map_or_else(|| (device_credentials(device), "password".to_owned()), |given| (given.name, given.key));
        let password = self.key(&secret, &key).await?;
        let (host, port, tls) = self.endpoint(&spec.gateway_ref.name).await?;
        let name = || device.to_owned();
        Ok(Login { host, port, client_id: name(), username: name(), password, tls, addresses: None })
    }

    /// A client of the API server.
    #[must_use]
    pub fn client(&self) -> Client {
        self.client.clone()
    }

    /// The namespace of the Devices.
    #[must_use]
    pub fn namespace(&self) -> &str {
        &self.namespace
    }

    async fn endpoint(&self, name: &str) -> Result<(String, u16, Option<ClientTls>), AccessError> {
        let gateway = self.get::<Gateway>("Gateway", name).await?;
        let listener = choose(&gateway.spec.listeners, self.route.port);
        let (port, tls) = match (listener, self.route.port) {
            (Some(listener), port) => (port.or(u16::try_from(listener.port).ok()), listener.tls_secret(name)),
            // A port that is forwarded to a listener without TLS.
            (None, port) => (port, None),
        };
        let port = port.ok_or_else(|| AccessError::FindListener { gateway: name.to_owned() })?;
        let tls = match tls {
            None => None,
            Some(_) if !self.route.verify => Some(ClientTls::unverified()?),
            Some(secret) => {
                let authorities = match self.key(&secret, "ca.crt").await {
                    Ok(pem) => Some(pem.to_vec()),
                    Err(AccessError::FindKey { .. }) => None,
                    Err(error) => return Err(error),
                };
                Some(ClientTls::verified_by(authorities)?)
            }
        };
        let host = self.route.host.clone().unwrap_or_else(|| service_host(name, &self.namespace));
        Ok((host, port, tls))
    }

    async fn key(&self, name: &str, key: &str) -> Result<Bytes, AccessError> {
        let secret = self.get::<Secret>("Secret", name).await?;
        let found = secret.data.and_then(|mut data| data.remove(key));
        found.map(|value| Bytes::from(value.0)).ok_or_else(|| AccessError::FindKey { secret: name.to_owned(), key: key.to_owned() })
    }

    async fn get<K>(&self, kind: &'static str, name: &str) -> Result<K, AccessError>
    where
        K: kube::Resource<Scope = k8s_openapi::NamespaceResourceScope> + Clone + std::fmt::Debug + serde::de::DeserializeOwned,
        <K as kube::Resource>::DynamicType: Default,
    {
        let api: Api<K> = Api::namespaced(self.client.clone(), &self.namespace);
        match timeout(API_TIMEOUT, api.get(name)).await {
            Ok(Ok(object)) => Ok(object),
            Ok(Err(error)) => Err(AccessError::Get { kind, name: name.to_owned(), source: Box::new(error) }),
            Err(_) => Err(AccessError::Timeout { kind, name: name.to_owned() }),
        }
    }
}

/// The listener with this port. Without a port: of the listeners with password authentication the first one without TLS, or the first.
fn choose(listeners: &[Listener], port: Option<u16>) -> Option<&Listener> {
    match port {
        Some(port) => listeners.iter().find(|listener| listener.port == i32::from(port)),
        None => {
            let mut open = listeners.iter().filter(|listener| listener.authentication() == ListenerAuthentication::Password);
            let first = open.clone().next();
            open.find(|listener| listener.tls.is_none()).or(first)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::gateway::{ListenerTls, Protocol};

    fn listener(port: i32, secret: Option<&str>) -> Listener {
        let tls =
            secret.map(|secret| ListenerTls { secret_name: Some(secret.to_owned()), authentication: ListenerAuthentication::Password });
        Listener { name: format!("l{port}"), port, protocol: Protocol::Mqtt, tls }
    }

    #[test]
    fn a_listener_without_tls_is_preferred() {
        let listeners = [listener(8883, Some("a")), listener(1883, None), listener(1885, None)];
        assert_eq!(choose(&listeners, None).map(|listener| listener.port), Some(1883));
        assert_eq!(choose(&listeners[..1], None).map(|listener| listener.port), Some(8883));
        assert_eq!(choose(&listeners, Some(8883)).map(|listener| listener.port), Some(8883));
        assert_eq!(choose(&listeners, Some(31_883)), None);
    }
}
