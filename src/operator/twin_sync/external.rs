//! External brokers: their logins, as the reconciler of Gateways provides them, and the results.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rumqttc::mqttbytes::v5::ConnectReturnCode;
use rumqttc::{ConnectionError, SubscribeNoticeError, TlsError};
use tokio::sync::Notify;

use super::session::SessionError;
use super::session_loop::SyncError;
use crate::api::condition::Cause;
use crate::api::reason::Reason;
use crate::mqtt::login::Login;
use crate::operator::device::key::GatewayKey;
use crate::runtime::address::AddressError;
use crate::runtime::error::chain;

/// The state of one external broker.
#[derive(Clone, Debug)]
pub struct External {
    /// Name of the Secret with user name and password.
    pub secret: String,

    /// Login data; `None` while the Secret is missing or unusable.
    pub login: Option<Arc<Login>>,

    /// The result of this login; `None` before the first attempt.
    pub outcome: Option<Result<(), Cause>>,

    /// Notified when all connection states must be reported again.
    pub resync: Arc<Notify>,
}

/// All external brokers, shared by the reconciler of Gateways, twin synchronization and presence.
#[derive(Clone, Debug, Default)]
pub struct SharedExternals(Arc<Mutex<Known>>);

#[derive(Debug, Default)]
struct Known {
    externals: HashMap<GatewayKey, External>,
    /// The last logins of Gateways that were deleted in this process. Their brokers may still hold sessions.
    gone: HashMap<GatewayKey, Arc<Login>>,
}

impl SharedExternals {
    /// The state of a Gateway's external broker.
    #[must_use]
    pub fn of(&self, gateway: &GatewayKey) -> Option<External> {
        self.lock().externals.get(gateway).cloned()
    }

    /// Login data for the brokers of a namespace, by Gateway. For deleted Gateways, the last ones.
    #[must_use]
    pub fn logins(&self, namespace: &str) -> BTreeMap<Arc<str>, Arc<Login>> {
        let known = self.lock();
        let there = known.externals.iter().filter_map(|(key, external)| Some((key, external.login.as_ref()?)));
        let logins = known.gone.iter().chain(there).filter(|(key, _)| &*key.namespace == namespace);
        logins.map(|(key, login)| (Arc::clone(&key.name), Arc::clone(login))).collect()
    }

    /// Sets the login data. Changed data has no result yet.
    pub fn set(&self, gateway: &GatewayKey, secret: &str, login: Option<Login>) {
        let mut known = self.lock();
        let before = known.externals.get_mut(gateway);
        if let Some(before) = before
            && before.login.as_deref() == login.as_ref()
        {
            secret.clone_into(&mut before.secret);
            return;
        }
        let before = known.externals.get(gateway);
        let resync = before.map(|before| Arc::clone(&before.resync)).unwrap_or_default();
        known.gone.remove(gateway);
        let external = External { secret: secret.to_owned(), login: login.map(Arc::new), outcome: None, resync };
        known.externals.insert(gateway.clone(), external);
    }

    /// Whether a Gateway of the namespace logs in with this Secret.
    #[must_use]
    pub fn log_in_with(&self, namespace: &str, secret: &str) -> bool {
        self.lock().externals.iter().any(|(key, external)| &*key.namespace == namespace && external.secret == secret)
    }

    /// A Gateway was deleted.
    pub fn remove(&self, gateway: &GatewayKey) {
        let mut known = self.lock();
        if let Some(login) = known.externals.remove(gateway).and_then(|external| external.login) {
            known.gone.insert(gateway.clone(), login);
        }
    }

    /// Stores the result of a login. Returns whether it changed.
    pub fn record_outcome(&self, gateway: &GatewayKey, login: &Arc<Login>, outcome: Result<(), Cause>) -> bool {
        let mut known = self.lock();
        let current = |external: &&mut External| external.login.as_ref().is_some_and(|known| Arc::ptr_eq(known, login));
        let Some(external) = known.externals.get_mut(gateway).filter(current) else { return false };
        let has_changed = external.outcome.as_ref() != Some(&outcome);
        external.outcome = Some(outcome);
        has_changed
    }

    fn lock(&self) -> MutexGuard<'_, Known> {
        // Each change is one insertion or assignment, so the maps are consistent after a panic.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The cause of a failed login, with the remedy.
#[must_use]
pub fn cause(login: &Login, error: &SyncError) -> Cause {
    let address = login.address();
    match error {
        SyncError::Session(SessionError::Connection { source, .. }) => connection(login, source),
        SyncError::Session(SessionError::Subscribe { source, .. }) => subscription(&address, source),
        SyncError::Session(SessionError::Resolve(error @ AddressError::Forbid { .. })) => {
            Cause::new(Reason::AddressNotAllowed, format!("external.address: {error}"))
        }
        SyncError::Session(
            SessionError::Resolve(_) | SessionError::Timeout { .. } | SessionError::Flood { .. } | SessionError::Ended { .. },
        )
        | SyncError::Abandoned => unreachable(login, &chain(error)),
    }
}

fn connection(login: &Login, error: &ConnectionError) -> Cause {
    let address = login.address();
    match error {
        ConnectionError::Tls(error) => tls(login, error),
        ConnectionError::ConnectionRefused(code) => {
            let todo = match code {
                ConnectReturnCode::BadUserNamePassword | ConnectReturnCode::NotAuthorized => {
                    "correct user name and password in the Secret of external.credentialsSecret, or allow the user at that broker"
                }
                ConnectReturnCode::UnsupportedProtocolVersion => "it has to speak MQTT 5",
                ConnectReturnCode::ClientIdentifierNotValid => "allow that client identifier at that broker",
                _ => "see that broker's log",
            };
            let client = &login.client_id;
            let message = format!("the broker at {address} refuses the login with the client identifier {client} ({code:?}): {todo}");
            Cause::new(Reason::LoginRefused, message)
        }
        // A listener with TLS closes a connection without TLS.
        error => unreachable(login, &chain(error)),
    }
}

fn tls(login: &Login, error: &TlsError) -> Cause {
    let address = login.address();
    // A refused TCP connection has the same error type.
    if let TlsError::Io(error) = error
        && error.get_ref().is_none()
    {
        return unreachable(login, &chain(error));
    }
    let message = format!(
        "the TLS handshake with the broker at {address} failed ({}): its certificate has to be for the host in external.address, and of an \
         authority in ca.crt of the Secret that external.tls.caSecretName names, or of a public one where that is left out; and the port has to be one with TLS",
        chain(error)
    );
    Cause::new(Reason::TlsFailed, message)
}

fn subscription(address: &str, error: &SubscribeNoticeError) -> Cause {
    let message = format!(
        "the broker at {address} accepts the login and refuses a subscription ({}): allow the user to subscribe to devices/+/desired, \
         devices/+/reported and devices/+/connection there",
        chain(error)
    );
    Cause::new(Reason::SubscriptionRefused, message)
}

fn unreachable(login: &Login, why: &str) -> Cause {
    let tls = if login.tls.is_some() { "" } else { "; and whether the port expects TLS, which external.tls turns on" };
    let message = format!(
        "the operator does not reach the broker at {} ({why}): see whether external.address is right, the broker runs, and the network lets \
         the cluster through{tls}",
        login.address()
    );
    Cause::new(Reason::BrokerUnreachable, message)
}

#[cfg(test)]
#[path = "external_tests.rs"]
mod tests;
