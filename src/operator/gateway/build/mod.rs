//! From a valid Gateway to every object it owns. Pure, and cannot fail.

mod access;
mod certificate;
mod configuration;
mod network;
mod workload;

use std::collections::BTreeMap;

use k8s_openapi::api::apps::v1::StatefulSet;
use k8s_openapi::api::core::v1::{ConfigMap, Secret, Service, ServiceAccount};
use k8s_openapi::api::networking::v1::NetworkPolicy;
use k8s_openapi::api::policy::v1::PodDisruptionBudget;
use k8s_openapi::api::rbac::v1::{Role, RoleBinding};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;

pub use access::link_credentials;
pub(super) use configuration::QUEUE_MARGIN;
pub use configuration::mosquitto_configuration;

use super::validate::Valid;
use crate::api::name;
use crate::operator::context::Images;
use crate::operator::kubernetes::apply::standard_labels;

/// Label `app.kubernetes.io/component` of all that belongs to a broker.
pub const COMPONENT: &str = "broker";

/// Label `app.kubernetes.io/component` of a Pipeline's workers, which reach the internal listener.
const INGEST_COMPONENT: &str = "ingest";

/// Label `app.kubernetes.io/component` of the operator's own pods, as the chart sets it.
const OPERATOR_COMPONENT: &str = "operator";

/// All objects that a Gateway owns. Without `Debug`, which would print private keys.
#[derive(Clone, PartialEq)]
pub struct Desired {
    /// The authority and the certificate that it issued, where a listener names no Secret.
    pub issued: Option<(Secret, Secret)>,

    /// mosquitto.conf and the agent's configuration.
    pub configuration: ConfigMap,

    /// Where the agent reports; its data is the agent's alone.
    pub report: ConfigMap,

    /// Who the pod is.
    pub service_account: ServiceAccount,

    /// What the agent may read and write.
    pub role: Role,

    /// Gives the one to the other.
    pub role_binding: RoleBinding,

    /// For devices.
    pub service: Service,

    /// For workers.
    pub internal_service: Service,

    /// For the operator.
    pub agent_service: Service,

    /// Who may reach what.
    pub network_policy: NetworkPolicy,

    /// How the pod may be evicted.
    pub disruption_budget: PodDisruptionBudget,

    /// The broker with its agent.
    pub stateful_set: StatefulSet,
}

/// Builds them.
#[must_use]
pub fn build(valid: &Valid, images: &Images, operator_namespace: &str) -> Desired {
    let configuration = configuration::config_map(valid);
    Desired {
        stateful_set: workload::stateful_set(valid, images, &configuration),
        issued: certificate::issued(valid),
        report: configuration::report(valid),
        configuration,
        service_account: access::service_account(valid),
        role: access::role(valid),
        role_binding: access::role_binding(valid),
        service: network::service(valid),
        internal_service: network::internal_service(valid),
        agent_service: network::agent_service(valid),
        network_policy: network::network_policy(valid, operator_namespace),
        disruption_budget: network::disruption_budget(valid),
    }
}

/// Names of the Secrets that the Gateway needs. An issued certificate is kept while a listener needs one, even if issuing fails.
#[must_use]
pub fn secret_names(valid: &Valid) -> Vec<String> {
    let issued = valid.spec.issues_certificate().then(|| [name::server_authority(&valid.name), name::server_certificate(&valid.name)]);
    issued.into_iter().flatten().chain([name::link_credentials(&valid.name)]).collect()
}

fn metadata(valid: &Valid, name: String) -> ObjectMeta {
    ObjectMeta { name: Some(name), namespace: Some(valid.namespace.clone()), labels: Some(labels(valid)), ..ObjectMeta::default() }
}

fn labels(valid: &Valid) -> BTreeMap<String, String> {
    let mut labels = standard_labels(COMPONENT, &valid.name);
    labels.insert(name::GATEWAY_LABEL.to_owned(), valid.name.clone());
    labels
}

/// Labels that select the pods of this Gateway's broker and nothing else.
fn selector(valid: &Valid) -> BTreeMap<String, String> {
    [("app.kubernetes.io/component", COMPONENT), (name::GATEWAY_LABEL, &valid.name)]
        .into_iter()
        .map(|(key, value)| (key.to_owned(), value.to_owned()))
        .collect()
}

#[cfg(test)]
#[path = "../build_tests.rs"]
mod tests;
