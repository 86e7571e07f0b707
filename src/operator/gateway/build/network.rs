//! The Services, the NetworkPolicy and the PodDisruptionBudget of the broker.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::{Service, ServicePort, ServiceSpec};
use k8s_openapi::api::networking::v1::{NetworkPolicy, NetworkPolicyIngressRule, NetworkPolicyPeer, NetworkPolicySpec};
use k8s_openapi::api::policy::v1::{PodDisruptionBudget, PodDisruptionBudgetSpec};
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;

use super::{INGEST_COMPONENT, OPERATOR_COMPONENT, Valid, metadata, selector};
use crate::api::gateway::ServiceType;
use crate::api::name::{self, INTERNAL_MQTT_PORT, PRESENCE_PORT};
use crate::operator::kubernetes::pod::{http_ingress, matching, policy_port};

/// Label `app.kubernetes.io/name` of the operator's own pods, as the chart sets it.
const OPERATOR_NAME: &str = "fleetwright";

/// Label of a namespace that holds its name: <https://kubernetes.io/docs/reference/labels-annotations-taints/#kubernetes-io-metadata-name>.
const NAMESPACE_LABEL: &str = "kubernetes.io/metadata.name";

pub(super) fn service(valid: &Valid) -> Service {
    let mut metadata = metadata(valid, valid.name.clone());
    metadata.annotations = (!valid.spec.service.annotations.is_empty()).then(|| valid.spec.service.annotations.clone());
    let type_ = match valid.spec.service.type_ {
        ServiceType::ClusterIP => "ClusterIP",
        ServiceType::NodePort => "NodePort",
        ServiceType::LoadBalancer => "LoadBalancer",
    };
    let ports = valid.spec.listeners.iter().map(|listener| port(&listener.name, listener.port)).collect();
    service_of(valid, metadata, type_, ports)
}

/// A Service with a cluster IP, which outlives the pod: a client of a headless Service would use the address of a dead pod until
/// its resolver's cache expires.
pub(super) fn internal_service(valid: &Valid) -> Service {
    let metadata = metadata(valid, name::internal_service(&valid.name));
    service_of(valid, metadata, "ClusterIP", vec![port("mqtt-internal", INTERNAL_MQTT_PORT)])
}

/// For the operator, which follows the connected clients. It includes a pod that is not ready, so that the operator sees that the
/// broker is down.
pub(super) fn agent_service(valid: &Valid) -> Service {
    let metadata = metadata(valid, name::agent_service(&valid.name));
    let mut service = service_of(valid, metadata, "ClusterIP", vec![port("https", PRESENCE_PORT)]);
    if let Some(spec) = &mut service.spec {
        spec.publish_not_ready_addresses = Some(true);
    }
    service
}

fn service_of(
    valid: &Valid,
    metadata: k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta,
    type_: &str,
    ports: Vec<ServicePort>,
) -> Service {
    let spec = ServiceSpec { type_: Some(type_.to_owned()), selector: Some(selector(valid)), ports: Some(ports), ..ServiceSpec::default() };
    Service { metadata, spec: Some(spec), ..Service::default() }
}

fn port(name: &str, port: i32) -> ServicePort {
    ServicePort {
        name: Some(name.to_owned()),
        port,
        target_port: Some(IntOrString::Int(port)),
        protocol: Some("TCP".to_owned()),
        ..ServicePort::default()
    }
}

/// Allows listeners from anywhere, HTTP from this cluster, the internal listener only from workers of this namespace and from the operator,
/// and the agent's endpoint only from the operator.
pub(super) fn network_policy(valid: &Valid, operator_namespace: &str) -> NetworkPolicy {
    let workers = BTreeMap::from([("app.kubernetes.io/component".to_owned(), INGEST_COMPONENT.to_owned())]);
    let worker_peer = NetworkPolicyPeer { pod_selector: Some(matching(workers)), ..NetworkPolicyPeer::default() };
    let operator = ["app.kubernetes.io/name", "app.kubernetes.io/component"].map(str::to_owned);
    let operator = operator.into_iter().zip([OPERATOR_NAME, OPERATOR_COMPONENT].map(str::to_owned)).collect();
    let operator_peer = NetworkPolicyPeer {
        // Kubernetes sets this label on every namespace, and it is immutable.
        namespace_selector: Some(matching(BTreeMap::from([(NAMESPACE_LABEL.to_owned(), operator_namespace.to_owned())]))),
        pod_selector: Some(matching(operator)),
        ..NetworkPolicyPeer::default()
    };
    let open = valid.spec.listeners.iter().map(|listener| policy_port(listener.port));
    NetworkPolicy {
        metadata: metadata(valid, name::broker(&valid.name)),
        spec: Some(NetworkPolicySpec {
            pod_selector: Some(matching(selector(valid))),
            policy_types: Some(vec!["Ingress".to_owned()]),
            ingress: Some(vec![
                NetworkPolicyIngressRule { from: None, ports: Some(open.collect()) },
                http_ingress(),
                NetworkPolicyIngressRule {
                    from: Some(vec![worker_peer, operator_peer.clone()]),
                    ports: Some(vec![policy_port(INTERNAL_MQTT_PORT)]),
                },
                NetworkPolicyIngressRule { from: Some(vec![operator_peer]), ports: Some(vec![policy_port(PRESENCE_PORT)]) },
            ]),
            egress: None,
        }),
    }
}

/// Allows the eviction of the only pod. A budget that forbade it would block every drain of a node, and an eviction loses
/// nothing: sessions and queues are on the volume, publishers keep unacknowledged messages, and the pod is back in seconds.
/// An unhealthy pod may be evicted at any time.
pub(super) fn disruption_budget(valid: &Valid) -> PodDisruptionBudget {
    PodDisruptionBudget {
        metadata: metadata(valid, name::broker(&valid.name)),
        spec: Some(PodDisruptionBudgetSpec {
            selector: Some(matching(selector(valid))),
            max_unavailable: Some(IntOrString::Int(1)),
            unhealthy_pod_eviction_policy: Some("AlwaysAllow".to_owned()),
            ..PodDisruptionBudgetSpec::default()
        }),
        ..PodDisruptionBudget::default()
    }
}
