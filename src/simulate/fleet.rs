//! The devices of a namespace: which there are, and how each connects.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures::TryStreamExt;
use k8s_openapi::api::core::v1::Secret;
use kube::runtime::WatchStreamExt;
use kube::runtime::watcher::{self, Event, watcher};
use kube::{Api, Client, ResourceExt};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use super::connection::Endpoint;
use super::device::{Device, Plan};
use super::report::Tally;
use crate::api::gateway::{Listener, ListenerAuthentication};
use crate::api::name::{device_credentials, service_host};
use crate::api::{self, Gateway};
use crate::runtime::error::chain;
use crate::runtime::tls::{TlsError, Verification, client_configuration};

/// How long the API server may take for an answer.
const API_TIMEOUT: Duration = Duration::from_secs(10);

/// How the devices reach their brokers.
#[derive(Clone, Debug)]
pub struct Route {
    /// Host to connect to instead of the Gateway's Service.
    pub host: Option<String>,
    /// Port to connect to instead of that of the Gateway's first plain listener.
    pub port: Option<u16>,
    /// Whether the certificates of brokers are verified.
    pub verify: bool,
}

/// How a device logs in.
#[derive(Clone, Debug)]
pub struct Login {
    /// Where.
    pub endpoint: Endpoint,
    /// As whom.
    pub username: String,
    /// Password.
    pub password: Bytes,
}

/// Why a device cannot log in yet.
#[derive(Debug, thiserror::Error)]
pub enum AccessError {
    /// The API server does not give an object.
    #[error("failed to get the {kind} {name}")]
    Get {
        /// Its kind.
        kind: &'static str,
        /// Its name.
        name: String,
        /// Why.
        source: Box<kube::Error>,
    },

    /// No answer in time.
    #[error("failed to get the {kind} {name} within {} s", API_TIMEOUT.as_secs())]
    Await {
        /// Its kind.
        kind: &'static str,
        /// Its name.
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

    /// The Gateway has no listener that fits.
    #[error("failed to find a listener in the Gateway {gateway}")]
    FindListener {
        /// The Gateway.
        gateway: String,
    },

    /// The certificate authority cannot be used.
    #[error(transparent)]
    TrustAuthority(#[from] TlsError),
}

/// What a device needs to log in, read from the API server when it is needed.
#[derive(Clone)]
pub struct Access {
    client: Client,
    namespace: String,
    route: Route,
}

impl Access {
    /// Access by this client.
    #[must_use]
    pub fn new(client: Client, namespace: String, route: Route) -> Self {
        Self { client, namespace, route }
    }

    /// The login of a device, as its objects say now.
    pub async fn login(&self, device: &str) -> Result<Login, AccessError> {
        let spec = self.get::<api::Device>("Device", device).await?.spec;
        let given = spec.authentication.password.and_then(|password| password.secret_ref);
        let (secret, key) = given.map_or_else(|| (device_credentials(device), "password".to_owned()), |given| (given.name, given.key));
        let password = self.key(&secret, &key).await?;
        let endpoint = self.endpoint(&spec.gateway_ref.name).await?;
        Ok(Login { endpoint, username: device.to_owned(), password })
    }

    async fn endpoint(&self, name: &str) -> Result<Endpoint, AccessError> {
        let gateway = self.get::<Gateway>("Gateway", name).await?;
        let listener = choose(&gateway.spec.listeners, self.route.port);
        let (port, tls) = match (listener, self.route.port) {
            (Some(listener), port) => (port.or(u16::try_from(listener.port).ok()), listener.tls_secret(name)),
            // A port that is forwarded to a plain listener.
            (None, port) => (port, None),
        };
        let port = port.ok_or_else(|| AccessError::FindListener { gateway: name.to_owned() })?;
        let tls = match tls {
            None => None,
            Some(_) if !self.route.verify => Some(Arc::new(client_configuration(Verification::Unverified)?)),
            Some(tls) => {
                let authority = self.key(&tls, "ca.crt").await;
                let verification = match &authority {
                    Ok(pem) => Verification::Authorities(pem),
                    Err(AccessError::FindKey { .. }) => Verification::Public,
                    Err(_) => return Err(authority.err().unwrap_or_else(|| AccessError::FindListener { gateway: name.to_owned() })),
                };
                Some(Arc::new(client_configuration(verification)?))
            }
        };
        let host = self.route.host.clone().unwrap_or_else(|| service_host(name, &self.namespace));
        Ok(Endpoint { host, port, tls })
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
            Err(_) => Err(AccessError::Await { kind, name: name.to_owned() }),
        }
    }
}

/// The listener with this port; or of those that ask for a password alone the first plain one, or the first.
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

/// How fast the fleet speaks.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Rate {
    /// Messages a second of all devices together.
    Total(f64),
    /// Messages a second of each device.
    PerDevice(f64),
}

impl Rate {
    /// The time between two messages of one of so many devices; a day at the most.
    #[must_use]
    pub fn interval(self, devices: usize) -> Duration {
        #[allow(clippy::cast_precision_loss, reason = "a number of devices")]
        let seconds = match self {
            Self::Total(rate) => devices.max(1) as f64 / rate,
            Self::PerDevice(rate) => 1.0 / rate,
        };
        Duration::from_secs_f64(seconds.clamp(1e-6, 86_400.0))
    }
}

/// The running devices.
pub struct Fleet {
    access: Arc<Access>,
    rate: Rate,
    readings: u32,
    most: Option<usize>,
    tally: Tally,
    interval: watch::Sender<Duration>,
    /// Every Device that there is, and how to end it while it runs.
    devices: BTreeMap<String, Option<CancellationToken>>,
    running: JoinSet<()>,
}

impl Fleet {
    /// A fleet without devices.
    #[must_use]
    pub fn new(access: Access, rate: Rate, readings: u32, most: Option<usize>, tally: Tally) -> Self {
        let interval = watch::Sender::new(rate.interval(1));
        Self { access: Arc::new(access), rate, readings, most, tally, interval, devices: BTreeMap::new(), running: JoinSet::new() }
    }

    /// Plays every Device that the selector matches, as they come and go, until `stop`.
    pub async fn run(mut self, selector: &str, stop: &CancellationToken) {
        let api: Api<api::Device> = Api::namespaced(self.access.client.clone(), &self.access.namespace);
        let events = watcher(api, watcher::Config::default().labels(selector)).default_backoff();
        let mut events = std::pin::pin!(events);
        let mut listed = Vec::new();
        loop {
            let event = tokio::select! {
                () = stop.cancelled() => break,
                event = events.try_next() => event,
                Some(_) = self.running.join_next() => continue,
            };
            match event {
                Ok(Some(Event::Init)) => listed.clear(),
                Ok(Some(Event::InitApply(device))) => listed.push(device.name_any()),
                Ok(Some(Event::InitDone)) => {
                    let gone: Vec<String> = self.devices.keys().filter(|name| !listed.contains(name)).cloned().collect();
                    for name in gone {
                        self.remove(&name);
                    }
                    for name in listed.drain(..) {
                        self.devices.entry(name).or_default();
                    }
                    self.arrange();
                }
                Ok(Some(Event::Apply(device))) => {
                    self.devices.entry(device.name_any()).or_default();
                    self.arrange();
                }
                Ok(Some(Event::Delete(device))) => {
                    self.remove(&device.name_any());
                    self.arrange();
                }
                // The watch comes back by itself, after a while.
                Err(error) => warn!(failure = chain(&error), "the Devices cannot be watched"),
                Ok(None) => break,
            }
        }
        for stop in self.devices.values().flatten() {
            stop.cancel();
        }
        while self.running.join_next().await.is_some() {}
    }

    fn remove(&mut self, name: &str) {
        if let Some(Some(stop)) = self.devices.remove(name) {
            info!(device = name, "gone");
            stop.cancel();
        }
    }

    /// Starts what should run, and spreads the rate.
    fn arrange(&mut self) {
        let most = self.most.unwrap_or(usize::MAX);
        let known = self.devices.len().min(most);
        let interval = self.rate.interval(known);
        self.interval.send_if_modified(|current| std::mem::replace(current, interval) != interval);
        self.tally.set_known(known);
        for (index, (name, running)) in self.devices.iter_mut().enumerate() {
            if index >= most {
                if let Some(stop) = running.take() {
                    stop.cancel();
                }
            } else if running.is_none() {
                let plan = Plan { interval: self.interval.subscribe(), readings: self.readings };
                let device = Device::new(name, plan, self.access.clone(), self.tally.clone());
                let stop = CancellationToken::new();
                self.running.spawn(device.run(stop.clone()));
                *running = Some(stop);
            }
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
    fn a_plain_listener_comes_first() {
        let listeners = [listener(8883, Some("a")), listener(1883, None), listener(1885, None)];
        assert_eq!(choose(&listeners, None).map(|listener| listener.port), Some(1883));
        assert_eq!(choose(&listeners[..1], None).map(|listener| listener.port), Some(8883));
        assert_eq!(choose(&listeners, Some(8883)).map(|listener| listener.port), Some(8883));
        assert_eq!(choose(&listeners, Some(31_883)), None);
    }

    #[test]
    fn the_rate_is_shared() {
        assert_eq!(Rate::Total(100.0).interval(20), Duration::from_millis(200));
        assert_eq!(Rate::PerDevice(5.0).interval(20), Duration::from_millis(200));
        assert_eq!(Rate::Total(0.000_001).interval(20), Duration::from_hours(24));
    }
}
