//! Parts that the pods of brokers and workers have in common: security contexts, probes, ports and NetworkPolicy rules. Pure.

use k8s_openapi::api::core::v1::{
    Capabilities, ContainerPort, HTTPGetAction, KeyToPath, PodSecurityContext, Probe, SeccompProfile, SecretVolumeSource, SecurityContext,
    Volume, VolumeMount,
};
use k8s_openapi::api::networking::v1::{NetworkPolicyIngressRule, NetworkPolicyPeer, NetworkPolicyPort};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::LabelSelector;
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use std::collections::BTreeMap;

use crate::api::name::HTTP_PORT;

/// Name of [`HTTP_PORT`] in pods and Services.
pub const HTTP_PORT_NAME: &str = "http";

/// Timeout of a probe in seconds; the kubelet's default of one second is too short on a busy node.
pub const PROBE_TIMEOUT_SECONDS: i32 = 5;

/// Mode of mounted Secrets: readable by the user and the group of the pod.
pub const SECRET_MODE: i32 = 0o440;

/// The pod's security context that the Pod Security Standard "restricted" requires, with this user and group.
#[must_use]
pub fn restricted_pod(user: i64) -> PodSecurityContext {
    PodSecurityContext {
        run_as_non_root: Some(true),
        run_as_user: Some(user),
        run_as_group: Some(user),
        fs_group: Some(user),
        // A recursive change of ownership at every start would be slow for a large store.
        fs_group_change_policy: Some("OnRootMismatch".to_owned()),
        seccomp_profile: Some(SeccompProfile { type_: "RuntimeDefault".to_owned(), localhost_profile: None }),
        ..PodSecurityContext::default()
    }
}

/// The container's security context that the Pod Security Standard "restricted" requires, and a read-only root file system.
#[must_use]
pub fn restricted_container() -> SecurityContext {
    SecurityContext {
        allow_privilege_escalation: Some(false),
        read_only_root_filesystem: Some(true),
        capabilities: Some(Capabilities { drop: Some(vec!["ALL".to_owned()]), add: None }),
        ..SecurityContext::default()
    }
}

/// A probe of [`HTTP_PORT`].
#[must_use]
pub fn http_probe(path: &str, period_seconds: i32, failure_threshold: i32) -> Probe {
    let port = IntOrString::String(HTTP_PORT_NAME.to_owned());
    Probe {
        http_get: Some(HTTPGetAction { path: Some(path.to_owned()), port, ..HTTPGetAction::default() }),
        period_seconds: Some(period_seconds),
        timeout_seconds: Some(PROBE_TIMEOUT_SECONDS),
        failure_threshold: Some(failure_threshold),
        ..Probe::default()
    }
}

/// [`HTTP_PORT`] of a container.
#[must_use]
pub fn http_port() -> ContainerPort {
    container_port(Some(HTTP_PORT_NAME), HTTP_PORT)
}

/// A TCP port of a container.
#[must_use]
pub fn container_port(name: Option<&str>, port: i32) -> ContainerPort {
    ContainerPort { name: name.map(str::to_owned), container_port: port, protocol: Some("TCP".to_owned()), ..ContainerPort::default() }
}

/// A mounted volume.
#[must_use]
pub fn mount(volume: &str, path: &str, read_only: bool) -> VolumeMount {
    VolumeMount { name: volume.to_owned(), mount_path: path.to_owned(), read_only: read_only.then_some(true), ..VolumeMount::default() }
}

/// A volume with these keys of a Secret, each with the name of its file.
#[must_use]
pub fn secret_files<'a>(volume: &str, secret: &str, files: impl IntoIterator<Item = (&'a str, &'a str)>) -> Volume {
    let item = |(key, file): (&str, &str)| KeyToPath { key: key.to_owned(), path: file.to_owned(), ..KeyToPath::default() };
    let source = SecretVolumeSource {
        secret_name: Some(secret.to_owned()),
        items: Some(files.into_iter().map(item).collect()),
        default_mode: Some(SECRET_MODE),
        ..SecretVolumeSource::default()
    };
    Volume { name: volume.to_owned(), secret: Some(source), ..Volume::default() }
}

/// A TCP port of a NetworkPolicy.
#[must_use]
pub fn policy_port(port: i32) -> NetworkPolicyPort {
    NetworkPolicyPort { port: Some(IntOrString::Int(port)), protocol: Some("TCP".to_owned()), end_port: None }
}

/// The pods that may reach [`HTTP_PORT`]: those of this cluster, such as the operator and Prometheus, in any namespace. Kubernetes always
/// allows the probes of the pod's own node.
#[must_use]
pub fn http_ingress() -> NetworkPolicyIngressRule {
    let pods_of_the_cluster = NetworkPolicyPeer { namespace_selector: Some(LabelSelector::default()), ..NetworkPolicyPeer::default() };
    NetworkPolicyIngressRule { from: Some(vec![pods_of_the_cluster]), ports: Some(vec![policy_port(HTTP_PORT)]) }
}

/// A selector of objects with all these labels.
#[must_use]
pub fn matching(labels: BTreeMap<String, String>) -> LabelSelector {
    LabelSelector { match_labels: Some(labels), ..LabelSelector::default() }
}
