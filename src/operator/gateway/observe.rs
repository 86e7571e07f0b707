//! All reads of a Gateway's reconciliation.

use std::collections::{BTreeMap, BTreeSet};

use k8s_openapi::api::core::v1::{ConfigMap, Secret};
use kube::{Client, ResourceExt};
use tracing::warn;

use crate::api::gateway::{GatewayClients, GatewayDevices, GatewayStatus};
use crate::api::{Gateway, name};
use crate::broker::credential::Password;
use crate::configuration::agent::{AgentReport, CLIENT_AUTHORITIES_FILE, REPORT_KEY};
use crate::operator::context::Context;
use crate::operator::device::index::SharedDeviceIndex;
use crate::operator::device::key::GatewayKey;
use crate::operator::device::secret::PASSWORD_KEY;
use crate::operator::kubernetes::apply::{WriteError, read};
use crate::operator::kubernetes::secret::value;
use crate::operator::presence::totals::{GatewayTotals, SharedTotals};
use crate::operator::twin_sync::external::SharedExternals;
use crate::runtime::address::AddressPolicy;

/// The observed state of a Gateway and of the objects that it names. Without `Debug`, which would print private keys.
pub struct Observed {
    /// The Gateway.
    pub gateway: Gateway,

    /// The Secrets of its TLS listeners, named or issued, by name.
    pub tls: BTreeMap<String, Option<Secret>>,

    /// The Secret of the authority that issues its certificates, if a listener names no Secret.
    pub authority: Option<Secret>,

    /// The Secret of the authority of the internal ports.
    pub internal_authority: Option<Secret>,

    /// The Secret of the certificate of the internal ports.
    pub internal_certificate: Option<Secret>,

    /// The Secret of the authority that signs the certificates of its devices, if the spec names one.
    pub client_authority: Option<Secret>,

    /// The certificates of such authorities that the broker trusts now, as PEM.
    pub trusted_before: Option<String>,

    /// The operator's password at its broker; `None` before it is generated.
    pub link_password: Option<Password>,

    /// The agent's report; `None` before its first verification.
    pub report: Option<AgentReport>,

    /// Its devices; `None` before they are known.
    pub devices: Option<GatewayDevices>,

    /// The clients that its broker refused; `None` before they are known.
    pub clients: Option<GatewayClients>,
}

/// The sources of a Gateway's observed state.
#[derive(Clone)]
pub struct Sources {
    /// The client for reads.
    pub client: Client,

    /// The devices of all Gateways.
    pub fleet: SharedDeviceIndex,

    /// Totals of connected and refused clients.
    pub presence: SharedTotals,

    /// Logins and login results of external brokers.
    pub externals: SharedExternals,

    /// The addresses of external brokers that the operator connects to.
    pub addresses: AddressPolicy,
}

impl Sources {
    /// Takes the sources from the operator's handles.
    #[must_use]
    pub fn new(context: &Context) -> Self {
        let Context { client, fleet, presence, externals, addresses, .. } = context.clone();
        Self { client, fleet, presence, externals, addresses }
    }
}

/// Reads the input of a Gateway's reconciliation.
///
/// # Errors
/// If a call to the API server fails.
pub async fn observe(sources: &Sources, gateway: &Gateway) -> Result<Observed, WriteError> {
    let (namespace, name) = (gateway.namespace().unwrap_or_default(), gateway.name_any());
    let mut secrets = BTreeMap::new();
    for secret in gateway.spec.listeners.iter().filter_map(|listener| listener.tls_secret(&name)).collect::<BTreeSet<_>>() {
        let found = read::<Secret>(&sources.client, &namespace, &secret).await?;
        secrets.insert(secret, found);
    }
    let authority = if gateway.spec.issues_certificate() {
        read::<Secret>(&sources.client, &namespace, &name::server_authority(&name)).await?
    } else {
        None
    };
    let (client_authority, trusted_before) = match &gateway.spec.client_authority {
        Some(declared) => {
            let configuration = read::<ConfigMap>(&sources.client, &namespace, &name::broker(&name)).await?;
            let trusted = configuration.and_then(|object| object.data?.remove(CLIENT_AUTHORITIES_FILE));
            (read::<Secret>(&sources.client, &namespace, &declared.secret_name).await?, trusted)
        }
        None => (None, None),
    };
    let internal_authority = read::<Secret>(&sources.client, &namespace, &name::internal_authority(&name)).await?;
    let internal_certificate = read::<Secret>(&sources.client, &namespace, &name::internal_certificate(&name)).await?;
    let link = read::<Secret>(&sources.client, &namespace, &name::link_credentials(&name)).await?;
    let report = read::<ConfigMap>(&sources.client, &namespace, &name::agent_report(&name)).await?;
    let key = GatewayKey::new(&namespace, &name);
    let previous = gateway.status.as_ref();
    let heard = sources.presence.of(&key);
    let devices = devices(sources.fleet.lock().totals(&key), heard.as_ref(), previous);
    let clients = clients(heard, previous);
    Ok(Observed {
        gateway: gateway.clone(),
        tls: secrets,
        authority,
        internal_authority,
        internal_certificate,
        client_authority,
        trusted_before,
        link_password: link.as_ref().and_then(link_password),
        report: report.as_ref().and_then(parse_report),
        devices,
        clients,
    })
}

/// The devices of a Gateway: the number of `declared` and live ones, and the `heard` totals of connections. Values that are not
/// known since the operator's start keep their last status.
#[must_use]
pub fn devices(
    declared: Option<(usize, usize)>,
    heard: Option<&GatewayTotals>,
    previous: Option<&GatewayStatus>,
) -> Option<GatewayDevices> {
    let said = previous.and_then(|status| status.devices);
    let Some((declared, live)) = declared else { return said };
    let connected = heard.map_or_else(|| said?.connected, |totals| totals.connected);
    let count = |number: usize| i64::try_from(number).unwrap_or(i64::MAX);
    Some(GatewayDevices { declared: count(declared), live: count(live), connected })
}

/// The clients that a broker refused, by the same rule.
#[must_use]
pub fn clients(heard: Option<GatewayTotals>, previous: Option<&GatewayStatus>) -> Option<GatewayClients> {
    heard.and_then(|totals| totals.clients).or_else(|| previous?.clients.clone())
}

/// The operator's password at a broker; `None` if its Secret is malformed.
#[must_use]
pub fn link_password(secret: &Secret) -> Option<Password> {
    Password::given(value(secret, PASSWORD_KEY)?).ok()
}

/// An unreadable report counts as missing: the agent writes a new one after its next verification.
#[must_use]
pub fn parse_report(report: &ConfigMap) -> Option<AgentReport> {
    let text = report.data.as_ref()?.get(REPORT_KEY)?;
    let warn = |error: &serde_json::Error| warn!(name = report.name_any(), %error, "failed to read the report of an agent");
    serde_json::from_str(text).inspect_err(warn).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unknown_totals_keep_their_last_status() {
        let last = GatewayDevices { declared: 9, live: 8, connected: Some(7) };
        let previous = GatewayStatus { devices: Some(last), ..GatewayStatus::default() };
        let heard = |connected| GatewayTotals { connected, clients: None };
        for (declared, heard, previous, expected) in [
            (None, None, None, None),
            (None, Some(heard(Some(1))), Some(&previous), Some((9, 8, Some(7)))),
            (Some((3, 2)), None, Some(&previous), Some((3, 2, Some(7)))),
            (Some((3, 2)), None, None, Some((3, 2, None))),
            (Some((3, 2)), Some(heard(Some(1))), Some(&previous), Some((3, 2, Some(1)))),
            (Some((3, 2)), Some(heard(None)), Some(&previous), Some((3, 2, None))),
        ] {
            let expected = expected.map(|(declared, live, connected)| GatewayDevices { declared, live, connected });
            assert_eq!(devices(declared, heard.as_ref(), previous), expected);
        }
    }
}
