//! All reads of a Gateway's reconciliation.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::{ConfigMap, Secret};
use kube::ResourceExt;
use tracing::warn;

use crate::api::gateway::{GatewayClients, GatewayDevices};
use crate::api::{Gateway, name};
use crate::certificate::server::{CertificateError, ServerCertificate};
use crate::configuration::agent::{AgentReport, REPORT_KEY, TLS_CERTIFICATE, TLS_KEY};
use crate::operator::apply::{WriteError, read};
use crate::operator::context::Context;
use crate::operator::device::key::GatewayKey;

/// What there is of a Gateway and of what it names.
#[derive(Debug)]
pub struct Observed {
    /// The Gateway.
    pub gateway: Gateway,

    /// The Secrets that its TLS listeners name.
    pub tls: BTreeMap<String, TlsSecret>,

    /// What the agent has proven of the broker; `None` before its first proof.
    pub report: Option<AgentReport>,

    /// Its devices.
    pub devices: GatewayDevices,

    /// The clients that its broker refused; `None` before that is known.
    pub clients: Option<GatewayClients>,
}

/// A Secret that a TLS listener names.
#[derive(Debug)]
pub enum TlsSecret {
    /// Not there.
    Missing,
    /// Without a key that it needs.
    Incomplete {
        /// Which.
        key: &'static str,
    },
    /// With content that no broker can use.
    Invalid(CertificateError),
    /// Usable, but for its time.
    Certificate(ServerCertificate),
}

/// Reads all that a Gateway's reconciliation needs.
///
/// # Errors
/// When the API server refuses or is away.
pub async fn observe(context: &Context, gateway: &Gateway) -> Result<Observed, WriteError> {
    let (namespace, name) = (gateway.namespace().unwrap_or_default(), gateway.name_any());
    let mut tls = BTreeMap::new();
    for secret in gateway.spec.listeners.iter().filter_map(|listener| listener.tls.as_ref()).map(|tls| &tls.secret_name) {
        if !tls.contains_key(secret) {
            let found = read::<Secret>(&context.client, &namespace, secret).await?;
            tls.insert(secret.clone(), tls_secret(found.as_ref()));
        }
    }
    let report = read::<ConfigMap>(&context.client, &namespace, &name::agent_report(&name)).await?;
    let key = GatewayKey::new(&namespace, &name);
    let (declared, live) = context.fleet.lock().totals(&key);
    // What has not been heard since the operator started stays as it was said.
    let previous = gateway.status.as_ref();
    let (connected, refused) = match context.presence.of(&key) {
        Some(totals) => (totals.connected, totals.clients),
        None => (previous.and_then(|status| status.devices?.connected), None),
    };
    let clients = refused.or_else(|| previous.and_then(|status| status.clients.clone()));
    let count = |number: usize| i64::try_from(number).unwrap_or(i64::MAX);
    Ok(Observed {
        gateway: gateway.clone(),
        tls,
        report: report.as_ref().and_then(parse_report),
        devices: GatewayDevices { declared: count(declared), live: count(live), connected },
        clients,
    })
}

fn tls_secret(secret: Option<&Secret>) -> TlsSecret {
    let Some(secret) = secret else { return TlsSecret::Missing };
    let value = |key: &'static str| secret.data.as_ref().and_then(|data| data.get(key)).ok_or(TlsSecret::Incomplete { key });
    match (value(TLS_CERTIFICATE), value(TLS_KEY)) {
        (Ok(chain), Ok(key)) => ServerCertificate::parse(&chain.0, &key.0).map_or_else(TlsSecret::Invalid, TlsSecret::Certificate),
        (Err(missing), _) | (_, Err(missing)) => missing,
    }
}

/// A report that cannot be read is as good as none: the agent writes another with its next proof.
#[must_use]
pub fn parse_report(report: &ConfigMap) -> Option<AgentReport> {
    let text = report.data.as_ref()?.get(REPORT_KEY)?;
    let warn = |error: &serde_json::Error| warn!(name = report.name_any(), %error, "failed to read the report of an agent");
    serde_json::from_str(text).inspect_err(warn).ok()
}
