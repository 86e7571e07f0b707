//! The StatefulSet: Mosquitto, with its agent as a sidecar that starts first and stops last.

use std::collections::BTreeMap;

use k8s_openapi::api::apps::v1::{StatefulSet, StatefulSetSpec};
use k8s_openapi::api::core::v1::{
    ConfigMap, ConfigMapProjection, ConfigMapVolumeSource, Container, DownwardAPIProjection, DownwardAPIVolumeFile, EmptyDirVolumeSource,
    KeyToPath, ObjectFieldSelector, PersistentVolumeClaim, PersistentVolumeClaimSpec, PodSpec, PodTemplateSpec, ProjectedVolumeSource,
    ResourceRequirements, SecretProjection, ServiceAccountTokenProjection, Volume, VolumeProjection, VolumeResourceRequirements,
};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;

use super::{Valid, labels, metadata, selector};
use crate::api::name::{self, INTERNAL_MQTT_PORT, MAX_SHARDS, PRESENCE_PORT};
use crate::broker::credential::shard;
use crate::configuration::agent::{
    self, CONFIGURATION_FOLDER, DATA_FOLDER, LOG_FOLDER, MOSQUITTO_FILE, RUNTIME_FOLDER, SECRETS_FOLDER, TLS_CERTIFICATE, TLS_KEY,
};
use crate::operator::context::Images;
use crate::operator::kubernetes::pod::{
    SECRET_MODE, container_port, http_port, http_probe, matching, mount, restricted_container, restricted_pod,
};

/// User and group of both containers: the agent writes files that only Mosquitto may read, and signals it.
const USER: i64 = 1883;

/// Seconds for a graceful stop: a snapshot of a full store takes a few seconds.
const STOP_SECONDS: i64 = 60;

/// Annotation of the pod with the revision of the configuration that Mosquitto reads only at its start. The revision excludes
/// credentials and certificates, which reach the running broker.
const CONFIGURATION_ANNOTATION: &str = "fleetwright.io/configuration-revision";

const CONFIGURATION_VOLUME: &str = "configuration";
const RUNTIME_VOLUME: &str = "runtime";
const SECRETS_VOLUME: &str = "secrets";
const LOG_VOLUME: &str = "log";
const DATA_VOLUME: &str = "data";
const API_ACCESS_VOLUME: &str = "api-access";

/// Folder in which a Kubernetes client expects its token.
const API_ACCESS_FOLDER: &str = "/var/run/secrets/kubernetes.io/serviceaccount";

/// Lifetime of the agent's token in seconds: the kubelet's default for projected tokens. The kubelet renews the token.
const TOKEN_SECONDS: i64 = 3607;

pub(super) fn stateful_set(valid: &Valid, images: &Images, configuration: &ConfigMap) -> StatefulSet {
    let content = configuration.data.iter().flatten().flat_map(|(key, value)| [key.as_bytes(), value.as_bytes()]);
    let annotations = BTreeMap::from([(CONFIGURATION_ANNOTATION.to_owned(), name::revision(content))]);
    StatefulSet {
        metadata: metadata(valid, name::broker(&valid.name)),
        spec: StatefulSetSpec {
            replicas: Some(1),
            service_name: Some(name::internal_service(&valid.name)),
            selector: matching(selector(valid)),
            template: PodTemplateSpec {
                metadata: Some(ObjectMeta { labels: Some(labels(valid)), annotations: Some(annotations), ..ObjectMeta::default() }),
                spec: Some(pod(valid, images)),
            },
            volume_claim_templates: Some(vec![claim(valid)]),
            ..StatefulSetSpec::default()
        },
        ..StatefulSet::default()
    }
}

fn pod(valid: &Valid, images: &Images) -> PodSpec {
    PodSpec {
        service_account_name: Some(name::broker(&valid.name)),
        // Only the agent's container mounts a token, see `api_access`.
        automount_service_account_token: Some(false),
        share_process_namespace: Some(true),
        termination_grace_period_seconds: Some(STOP_SECONDS),
        enable_service_links: Some(false),
        security_context: Some(restricted_pod(USER)),
        init_containers: Some(vec![agent_container(images)]),
        containers: vec![broker_container(valid, images)],
        volumes: Some(volumes(valid)),
        ..PodSpec::default()
    }
}

/// A Kubernetes sidecar: an init container with `restartPolicy: Always`. Mosquitto starts when the startup probe succeeds, which
/// is when its files exist. The pod is ready while Mosquitto accepts the agent's login, so Mosquitto needs no separate probe
/// (a probe that only connects would succeed on a broker that hangs).
fn agent_container(images: &Images) -> Container {
    Container {
        name: "agent".to_owned(),
        image: Some(images.fleetwright.clone()),
        image_pull_policy: images.pull_policy.clone(),
        args: Some(vec!["agent".to_owned()]),
        restart_policy: Some("Always".to_owned()),
        ports: Some(vec![http_port(), container_port(Some("https"), PRESENCE_PORT)]),
        startup_probe: Some(http_probe("/livez", 1, 300)),
        readiness_probe: Some(http_probe("/readyz", 2, 3)),
        liveness_probe: Some(http_probe("/livez", 10, 6)),
        resources: Some(ResourceRequirements {
            limits: Some(quantities(&[("memory", "256Mi")])),
            requests: Some(quantities(&[("cpu", "10m"), ("memory", "32Mi")])),
            claims: None,
        }),
        security_context: Some(restricted_container()),
        volume_mounts: Some(vec![
            mount(CONFIGURATION_VOLUME, CONFIGURATION_FOLDER, true),
            mount(SECRETS_VOLUME, SECRETS_FOLDER, true),
            mount(API_ACCESS_VOLUME, API_ACCESS_FOLDER, true),
            mount(RUNTIME_VOLUME, RUNTIME_FOLDER, false),
            mount(LOG_VOLUME, LOG_FOLDER, false),
            mount(DATA_VOLUME, DATA_FOLDER, false),
        ]),
        ..Container::default()
    }
}

fn broker_container(valid: &Valid, images: &Images) -> Container {
    // The ports have no names: users choose the names of listeners, and these could collide with ours.
    let ports = valid.spec.listeners.iter().map(|listener| listener.port).chain([INTERNAL_MQTT_PORT]);
    Container {
        name: "mosquitto".to_owned(),
        image: Some(images.mosquitto.clone()),
        image_pull_policy: images.pull_policy.clone(),
        args: Some(vec!["-c".to_owned(), format!("{CONFIGURATION_FOLDER}/{MOSQUITTO_FILE}")]),
        ports: Some(ports.map(|port| container_port(None, port)).collect()),
        resources: Some(valid.spec.resources.to_requirements()),
        security_context: Some(restricted_container()),
        volume_mounts: Some(vec![
            mount(CONFIGURATION_VOLUME, CONFIGURATION_FOLDER, true),
            mount(RUNTIME_VOLUME, RUNTIME_FOLDER, true),
            mount(LOG_VOLUME, LOG_FOLDER, false),
            mount(DATA_VOLUME, DATA_FOLDER, false),
        ]),
        ..Container::default()
    }
}

fn volumes(valid: &Valid) -> Vec<Volume> {
    // The kernel accounts this memory to the agent, which writes it.
    let memory = EmptyDirVolumeSource {
        medium: Some("Memory".to_owned()),
        size_limit: Some(Quantity("128Mi".to_owned())),
        ..EmptyDirVolumeSource::default()
    };
    // The agent keeps the log below a few MiB; above the limit the kubelet would evict the pod.
    let log = EmptyDirVolumeSource { size_limit: Some(Quantity("1Gi".to_owned())), ..EmptyDirVolumeSource::default() };
    let configuration = ConfigMapVolumeSource { name: name::broker(&valid.name), ..ConfigMapVolumeSource::default() };
    vec![
        Volume { name: CONFIGURATION_VOLUME.to_owned(), config_map: Some(configuration), ..Volume::default() },
        Volume { name: RUNTIME_VOLUME.to_owned(), empty_dir: Some(memory), ..Volume::default() },
        Volume { name: LOG_VOLUME.to_owned(), empty_dir: Some(log), ..Volume::default() },
        Volume { name: SECRETS_VOLUME.to_owned(), projected: Some(secrets(valid)), ..Volume::default() },
        Volume { name: API_ACCESS_VOLUME.to_owned(), projected: Some(api_access()), ..Volume::default() },
    ]
}

/// Mounts each Secret in a separate folder. All are optional, so that the pod starts without them.
fn secrets(valid: &Valid) -> ProjectedVolumeSource {
    let shards = (0..MAX_SHARDS).map(|number| {
        let keys = [shard::PASSWORDS_KEY, shard::CERTIFICATE_KEYS_KEY, shard::ACLS_KEY, shard::COUNT_KEY];
        projection(name::auth_shard(&valid.name, number), &agent::shard_folder(number), &keys)
    });
    let tls = valid.tls_secrets.iter().map(|secret| projection(secret.clone(), &agent::tls_folder(secret), &[TLS_CERTIFICATE, TLS_KEY]));
    ProjectedVolumeSource {
        sources: Some(shards.chain(tls).collect()),
        default_mode: Some(SECRET_MODE),
        ..ProjectedVolumeSource::default()
    }
}

/// The volume that Kubernetes mounts into every container by default (token, CA certificates of the API server, namespace), only for
/// the agent.
fn api_access() -> ProjectedVolumeSource {
    let token = ServiceAccountTokenProjection {
        expiration_seconds: Some(TOKEN_SECONDS),
        path: "token".to_owned(),
        ..ServiceAccountTokenProjection::default()
    };
    let certificates = ConfigMapProjection {
        name: "kube-root-ca.crt".to_owned(),
        items: Some(vec![KeyToPath { key: "ca.crt".to_owned(), path: "ca.crt".to_owned(), ..KeyToPath::default() }]),
        optional: None,
    };
    let field = ObjectFieldSelector { api_version: Some("v1".to_owned()), field_path: "metadata.namespace".to_owned() };
    let namespace = DownwardAPIVolumeFile { path: "namespace".to_owned(), field_ref: Some(field), ..DownwardAPIVolumeFile::default() };
    let sources = vec![
        VolumeProjection { service_account_token: Some(token), ..VolumeProjection::default() },
        VolumeProjection { config_map: Some(certificates), ..VolumeProjection::default() },
        VolumeProjection { downward_api: Some(DownwardAPIProjection { items: Some(vec![namespace]) }), ..VolumeProjection::default() },
    ];
    ProjectedVolumeSource { sources: Some(sources), default_mode: Some(SECRET_MODE), ..ProjectedVolumeSource::default() }
}

fn projection(secret: String, folder: &str, keys: &[&str]) -> VolumeProjection {
    let item = |key: &&str| KeyToPath { key: (*key).to_owned(), path: format!("{folder}/{key}"), ..KeyToPath::default() };
    let source = SecretProjection { name: secret, items: Some(keys.iter().map(item).collect()), optional: Some(true) };
    VolumeProjection { secret: Some(source), ..VolumeProjection::default() }
}

fn claim(valid: &Valid) -> PersistentVolumeClaim {
    PersistentVolumeClaim {
        metadata: ObjectMeta { name: Some(DATA_VOLUME.to_owned()), labels: Some(selector(valid)), ..ObjectMeta::default() },
        spec: Some(PersistentVolumeClaimSpec {
            access_modes: Some(vec!["ReadWriteOnce".to_owned()]),
            storage_class_name: valid.spec.storage.storage_class_name.clone(),
            resources: Some(VolumeResourceRequirements {
                requests: Some(BTreeMap::from([("storage".to_owned(), valid.spec.storage.size.to_quantity())])),
                limits: None,
            }),
            ..PersistentVolumeClaimSpec::default()
        }),
        ..PersistentVolumeClaim::default()
    }
}

fn quantities(pairs: &[(&str, &str)]) -> BTreeMap<String, Quantity> {
    pairs.iter().map(|(name, quantity)| ((*name).to_owned(), Quantity((*quantity).to_owned()))).collect()
}
