//! Builds every object that a valid Gateway owns. Pure and infallible.

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
pub use configuration::broker_configuration;

use super::validate::Valid;
use crate::api::name;
use crate::operator::context::Images;
use crate::operator::kubernetes::apply::standard_labels;

/// Label `app.kubernetes.io/component` of all objects of a broker.
pub const COMPONENT: &str = "broker";

/// Label `app.kubernetes.io/component` of a Pipeline's workers, which reach the internal listener.
const INGEST_COMPONENT: &str = "ingest";

/// Label `app.kubernetes.io/component` of the operator's own pods, as the chart sets it.
const OPERATOR_COMPONENT: &str = "operator";

/// All objects that a Gateway owns. Without `Debug`, which would print private keys.
#[derive(Clone, PartialEq)]
pub struct Desired {
    /// The authority and certificate of the internal ports, and those of the listeners if one names no Secret, in the order of the writes.
    pub issued: Vec<Secret>,

    /// mosquitto.conf and the agent's configuration.
    pub configuration: ConfigMap,

    /// The agent's report; only the agent writes its data.
    pub report: ConfigMap,

    /// The ServiceAccount of the pod.
    pub service_account: ServiceAccount,

    /// The permissions of the agent.
    pub role: Role,

    /// Binds the Role to the ServiceAccount.
    pub role_binding: RoleBinding,

    /// The Service for devices.
    pub service: Service,

    /// The Service for workers.
    pub internal_service: Service,

    /// The Service for the operator.
    pub agent_service: Service,

    /// The allowed connections.
    pub network_policy: NetworkPolicy,

    /// The allowed evictions of the pod.
    pub disruption_budget: PodDisruptionBudget,

    /// The broker with its agent.
    pub stateful_set: StatefulSet,
}

/// Builds the objects.
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
    let internal = [name::internal_authority(&valid.name), name::internal_certificate(&valid.name)];
    issued.into_iter().flatten().chain(internal).chain([name::link_credentials(&valid.name)]).collect()
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
