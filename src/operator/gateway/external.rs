//! A Gateway with an external broker: the operator builds nothing, and only verifies a login.

use bytes::Bytes;
use k8s_openapi::api::core::v1::Secret;
use kube::ResourceExt;

use super::observe::{Sources, devices};
use crate::api::condition::{self, ACCEPTED, BROKER_AVAILABLE, Cause, Finding, Readiness};
use crate::api::credentials_secret::{control_character, refusal};
use crate::api::external::ExternalBroker;
use crate::api::gateway::{Gateway, GatewayDevices, GatewayStatus};
use crate::api::name;
use crate::api::reason::Reason;
use crate::configuration::agent::TLS_AUTHORITIES;
use crate::mqtt::login::{ClientTls, Login};
use crate::operator::device::key::GatewayKey;
use crate::operator::kubernetes::apply::{WriteError, read};
use crate::operator::kubernetes::secret::{required, required_value};
use crate::runtime::error::chain;

/// Maximum length of a user name or password in bytes (MQTT 5.0, section 1.5.4).
const MAX_BYTES: usize = 65_535;

/// The observed state of a Gateway with an external broker. Without `Debug`, which would print a password.
pub struct Observed<'a> {
    /// The Gateway.
    pub gateway: &'a Gateway,

    /// Its devices; `None` before they are known.
    pub devices: Option<GatewayDevices>,

    /// The login, or why it is not available.
    pub login: Result<Login, Cause>,

    /// The result of the login; `None` before the first answer.
    pub outcome: Option<Result<(), Cause>>,
}

/// Reads the Secrets of the login, passes the login to the twin synchronisation, and returns the last result.
///
/// # Errors
/// If a call to the API server fails.
pub async fn observe<'a>(sources: &Sources, gateway: &'a Gateway, external: &ExternalBroker) -> Result<Observed<'a>, WriteError> {
    let (namespace, name) = (gateway.namespace().unwrap_or_default(), gateway.name_any());
    let key = GatewayKey::new(&namespace, &name);
    let credentials = read::<Secret>(&sources.client, &namespace, &external.credentials_secret.name).await?;
    let authorities = match external.tls.as_ref().and_then(|tls| tls.ca_secret_name.as_deref()) {
        Some(secret) => read::<Secret>(&sources.client, &namespace, secret).await?,
        None => None,
    };
    let client_id = name::external_link_client(&gateway.uid().unwrap_or_default());
    let login = login(external, client_id, credentials.as_ref(), authorities.as_ref());
    let login = login.map(|login| Login { addresses: Some(sources.addresses.clone()), ..login });
    sources.externals.set(&key, &external.credentials_secret.name, login.as_ref().ok().cloned());
    let declared = sources.fleet.lock().totals(&key);
    Ok(Observed {
        gateway,
        devices: devices(declared, sources.presence.of(&key).as_ref(), gateway.status.as_ref()),
        login,
        outcome: sources.externals.of(&key).and_then(|external| external.outcome),
    })
}

/// The login from the spec and the Secrets, or the cause why it is not available.
fn login(external: &ExternalBroker, client_id: String, credentials: Option<&Secret>, authorities: Option<&Secret>) -> Result<Login, Cause> {
    let (host, port) = external.host_and_port().ok_or_else(|| {
        Cause::new(
            Reason::InvalidAddress,
            format!("external.address is {:?}: expected host:port, with a port from 1 to 65535", external.address),
        )
    })?;
    let reference = &external.credentials_secret;
    if let Some(cause) = credentials.and_then(refusal) {
        return Err(cause);
    }
    let username = credential(credentials, &reference.name, &reference.username_key, "the user name")?;
    let username = String::from_utf8(username.to_vec()).map_err(|_| {
        let message = format!("Secret {}, key {}: the user name is not UTF-8", reference.name, reference.username_key);
        Cause::new(Reason::InvalidSecret, message)
    })?;
    let password = credential(credentials, &reference.name, &reference.password_key, "the password")?;
    let tls = external.tls.as_ref().map(|tls| encryption(tls.ca_secret_name.as_deref(), authorities)).transpose()?;
    Ok(Login { host: host.to_owned(), port, client_id, username, password, tls, addresses: None })
}

fn encryption(secret_name: Option<&str>, secret: Option<&Secret>) -> Result<ClientTls, Cause> {
    let authorities = secret_name.map(|name| value(secret, name, TLS_AUTHORITIES, "the certificates of the authorities")).transpose()?;
    ClientTls::verified_by(authorities.map(|pem| pem.to_vec())).map_err(|error| {
        let secret = secret_name.unwrap_or_default();
        Cause::new(Reason::InvalidSecret, format!("Secret {secret}, key {TLS_AUTHORITIES}: {}", chain(&error)))
    })
}

/// The value of a key, without a final line break from an editor.
fn value(secret: Option<&Secret>, name: &str, key: &str, what: &str) -> Result<Bytes, Cause> {
    let value = required_value(required(secret, name, key, what)?, name, key, what)?;
    let end = value.iter().rposition(|byte| !matches!(byte, b'\r' | b'\n')).map_or(0, |last| last + 1);
    if end == 0 {
        return Err(Cause::new(Reason::InvalidSecret, format!("Secret {name}, key {key}: {what} is empty")));
    }
    Ok(Bytes::copy_from_slice(&value[..end]))
}

/// A user name or password: the value of a key, without control characters.
fn credential(secret: Option<&Secret>, name: &str, key: &str, what: &str) -> Result<Bytes, Cause> {
    let value = value(secret, name, key, what)?;
    let invalid = |problem: String| Cause::new(Reason::InvalidSecret, format!("Secret {name}, key {key}: {what} {problem}"));
    if value.len() > MAX_BYTES {
        return Err(invalid(format!("has {} bytes: expected at most {MAX_BYTES}", value.len())));
    }
    match control_character(&value) {
        Some(position) => Err(invalid(format!("has a line break or control character at byte {position}: write it without"))),
        None => Ok(value),
    }
}

/// The resulting status: pure.
#[must_use]
pub fn status(observed: &Observed<'_>) -> GatewayStatus {
    let gateway = observed.gateway;
    let generation = gateway.metadata.generation.unwrap_or_default();
    let previous = gateway.status.as_ref().map_or(&[][..], |status| status.conditions.as_slice());
    let accepted = Finding::holds(ACCEPTED, Reason::Accepted, "the spec is valid");
    let (findings, readiness) = match (&observed.login, &observed.outcome) {
        (Err(cause), _) => {
            let findings = vec![Finding::fails(ACCEPTED, cause.clone()), Finding::unknown(BROKER_AVAILABLE, cause.clone())];
            (findings, Readiness::Reconciling(cause.clone()))
        }
        (Ok(_), Some(Err(cause))) => {
            (vec![accepted, Finding::fails(BROKER_AVAILABLE, cause.clone())], Readiness::Reconciling(cause.clone()))
        }
        (Ok(login), None) if !condition::is_true(previous, BROKER_AVAILABLE, generation) => {
            let cause = Cause::new(Reason::AwaitingBroker, format!("the operator logs in at the broker at {}", login.address()));
            (vec![accepted, Finding::unknown(BROKER_AVAILABLE, cause.clone())], Readiness::Reconciling(cause))
        }
        // Until its first answer, a restarted operator keeps the result of its predecessor.
        (Ok(login), Some(Ok(())) | None) => {
            let message = format!("the broker at {} has accepted the operator's login", login.address());
            let ready = Cause::new(Reason::Ready, "the operator is logged in at the broker");
            (vec![accepted, Finding::holds(BROKER_AVAILABLE, Reason::BrokerAvailable, message)], Readiness::Ready(ready))
        }
    };
    GatewayStatus {
        observed_generation: generation,
        address: gateway.spec.external.as_ref().map(|external| external.address.clone()),
        devices: observed.devices,
        clients: None,
        certificate: None,
        conditions: condition::conditions(previous, generation, &findings, &readiness),
    }
}

#[cfg(test)]
#[path = "external_tests.rs"]
mod tests;
