//! The ConfigMaps: the configuration of Mosquitto and of the agent, and the agent's report.

use k8s_openapi::api::core::v1::ConfigMap;

use super::{Valid, metadata};
use crate::api::name;
use crate::broker::configuration::{BrokerConfiguration, render, started_listeners};
use crate::configuration::agent::{self, AgentConfiguration, CLIENT_AUTHORITIES_FILE, MOSQUITTO_FILE, TlsListener};
use crate::operator::gateway::internal;

pub(super) fn config_map(valid: &Valid) -> ConfigMap {
    let broker = broker_configuration(valid);
    let tls_listeners = started_listeners(&broker).filter_map(|listener| {
        let (secret, host_names) = (listener.tls_secret(&valid.name)?, valid.tls.host_names.clone());
        // The schema limits the port to this range.
        Some(TlsListener { port: u16::try_from(listener.port).ok()?, secret, host_names })
    });
    let agent = AgentConfiguration {
        namespace: valid.namespace.clone(),
        gateway: valid.name.clone(),
        internal: TlsListener {
            port: u16::try_from(name::INTERNAL_MQTT_PORT).unwrap_or_default(),
            secret: name::internal_certificate(&valid.name),
            host_names: internal::host_names(&valid.name, &valid.namespace),
        },
        tls_listeners: tls_listeners.collect(),
    };
    let trusted = valid.clients.trusted.clone().map(|trusted| (CLIENT_AUTHORITIES_FILE.to_owned(), trusted));
    let data = [
        (MOSQUITTO_FILE.to_owned(), render(&broker)),
        // A struct of strings always encodes; otherwise the agent would log that it cannot read the file.
        (agent::FILE.to_owned(), serde_json::to_string_pretty(&agent).unwrap_or_default()),
    ];
    let data = data.into_iter().chain(trusted).collect();
    ConfigMap { metadata: metadata(valid, name::broker(&valid.name)), data: Some(data), ..ConfigMap::default() }
}

/// Without data, so that the operator does not overwrite the agent's report.
pub(super) fn report(valid: &Valid) -> ConfigMap {
    let mut metadata = metadata(valid, name::agent_report(&valid.name));
    metadata.labels.get_or_insert_default().insert(name::ROLE_LABEL.to_owned(), name::ROLE_AGENT_REPORT.to_owned());
    ConfigMap { metadata, ..ConfigMap::default() }
}

/// The input of mosquitto.conf.
#[must_use]
pub fn broker_configuration(valid: &Valid) -> BrokerConfiguration<'_> {
    BrokerConfiguration {
        namespace: &valid.namespace,
        name: &valid.name,
        spec: &valid.spec,
        memory_limit: valid.memory_limit,
        queued_bytes: valid.queued_bytes,
        trusts_client_certificates: valid.clients.trusted.is_some(),
    }
}
