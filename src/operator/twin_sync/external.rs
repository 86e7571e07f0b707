//! The brokers that run elsewhere: what the reconciler of Gateways knows of them, and what came of the logins.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rumqttc::mqttbytes::v5::ConnectReturnCode;
use rumqttc::{ConnectionError, SubscribeNoticeError, TlsError};
use tokio::sync::Notify;

use super::keep::LinkError;
use super::session::SessionError;
use crate::api::condition::Cause;
use crate::mqtt::login::Login;
use crate::operator::device::key::GatewayKey;
use crate::runtime::error::chain;

/// What is known of the broker of an external Gateway.
#[derive(Clone, Debug)]
pub struct External {
    /// With what to log in; `None` while a Secret is missing.
    pub login: Option<Arc<Login>>,

    /// What came of logging in with exactly that; `None` before the first answer.
    pub outcome: Option<Result<(), Cause>>,

    /// Notified when everything that devices say of their connections is to be told anew.
    pub anew: Arc<Notify>,
}

/// The external Gateways, shared by the reconciler of Gateways, the links and those who follow presence.
#[derive(Clone, Debug, Default)]
pub struct SharedExternals(Arc<Mutex<Known>>);

#[derive(Debug, Default)]
struct Known {
    externals: HashMap<GatewayKey, External>,
    /// The last logins of Gateways that are gone since this process began, whose brokers may still hold sessions.
    gone: HashMap<GatewayKey, Arc<Login>>,
}

impl SharedExternals {
    /// What is known of a Gateway's broker, if that runs elsewhere.
    #[must_use]
    pub fn of(&self, gateway: &GatewayKey) -> Option<External> {
        self.lock().externals.get(gateway).cloned()
    }

    /// With what to log in at the brokers of a namespace, by Gateway; of one that is gone, with what that was last.
    #[must_use]
    pub fn logins(&self, namespace: &str) -> BTreeMap<Arc<str>, Arc<Login>> {
        let known = self.lock();
        let there = known.externals.iter().filter_map(|(key, external)| Some((key, external.login.as_ref()?)));
        let logins = known.gone.iter().chain(there).filter(|(key, _)| &*key.namespace == namespace);
        logins.map(|(key, login)| (Arc::clone(&key.name), Arc::clone(login))).collect()
    }

    /// With what to log in at a broker that runs elsewhere. Another login than before has no outcome yet.
    pub fn set(&self, gateway: &GatewayKey, login: Option<Login>) {
        let mut known = self.lock();
        let before = known.externals.get(gateway);
        if before.is_some_and(|before| before.login.as_deref() == login.as_ref()) {
            return;
        }
        let anew = before.map(|before| Arc::clone(&before.anew)).unwrap_or_default();
        known.gone.remove(gateway);
        known.externals.insert(gateway.clone(), External { login: login.map(Arc::new), outcome: None, anew });
    }

    /// The Gateway is gone.
    pub fn remove(&self, gateway: &GatewayKey) {
        let mut known = self.lock();
        if let Some(login) = known.externals.remove(gateway).and_then(|external| external.login) {
            known.gone.insert(gateway.clone(), login);
        }
    }

    /// What came of this login. Whether that is news.
    pub fn tried(&self, gateway: &GatewayKey, login: &Arc<Login>, outcome: Result<(), Cause>) -> bool {
        let mut known = self.lock();
        let current = |external: &&mut External| external.login.as_ref().is_some_and(|known| Arc::ptr_eq(known, login));
        let Some(external) = known.externals.get_mut(gateway).filter(current) else { return false };
        let news = external.outcome.as_ref() != Some(&outcome);
        external.outcome = Some(outcome);
        news
    }

    fn lock(&self) -> MutexGuard<'_, Known> {
        // Every change is one insertion or assignment, so that a panic elsewhere leaves the maps whole.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Why there is no login at a broker that runs elsewhere, and what to do about that.
#[must_use]
pub fn cause(login: &Login, error: &LinkError) -> Cause {
    let address = login.address();
    match error {
        LinkError::Session(SessionError::Connection { source, .. }) => connection(login, source),
        LinkError::Session(SessionError::Subscribe { source, .. }) => subscription(&address, source),
        LinkError::Session(SessionError::Timeout { .. } | SessionError::Ended { .. }) | LinkError::Abandoned => {
            unreachable(login, &chain(error))
        }
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
            let (user, client) = (&login.username, &login.client_id);
            let message = format!(
                "the broker at {address} refuses the login of the user {user} with the client identifier {client} ({code:?}): {todo}"
            );
            Cause::new("LoginRefused", message)
        }
        // A listener with TLS closes a connection that begins in plain text.
        error => unreachable(login, &chain(error)),
    }
}

fn tls(login: &Login, error: &TlsError) -> Cause {
    let address = login.address();
    // A refusal of TCP comes this way, too.
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
    Cause::new("TlsFailed", message)
}

fn subscription(address: &str, error: &SubscribeNoticeError) -> Cause {
    let message = format!(
        "the broker at {address} accepts the login and refuses a subscription ({}): allow the user to subscribe to devices/+/desired, \
         devices/+/reported and devices/+/connection there",
        chain(error)
    );
    Cause::new("SubscriptionRefused", message)
}

fn unreachable(login: &Login, why: &str) -> Cause {
    let tls = if login.tls.is_some() { "" } else { "; and whether the port expects TLS, which external.tls turns on" };
    let message = format!(
        "the operator does not reach the broker at {} ({why}): see whether external.address is right, the broker runs, and the network lets \
         the cluster through{tls}",
        login.address()
    );
    Cause::new("BrokerUnreachable", message)
}

#[cfg(test)]
#[path = "external_tests.rs"]
mod tests;
