//! The objects that a Pipeline owns: pure and infallible.

use std::collections::BTreeMap;

use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use k8s_openapi::ByteString;
use k8s_openapi::api::apps::v1::StatefulSet;
use k8s_openapi::api::apps::v1::StatefulSetSpec;
use k8s_openapi::api::core::v1::{
    ConfigMap, ConfigMapVolumeSource, Container, EnvVar, EnvVarSource, ObjectFieldSelector, PodSpec, PodTemplateSpec, Secret, Service,
    ServicePort, ServiceSpec, Volume, VolumeMount,
};
use k8s_openapi::api::networking::v1::{NetworkPolicy, NetworkPolicyEgressRule, NetworkPolicyPort, NetworkPolicySpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use kube::ResourceExt;
use serde_json::json;

use super::validate::Valid;
use super::{broker_files, external};
use crate::api::Pipeline;
use crate::api::name::{
    self, HTTP_PORT, INGEST_COMMANDS_ANNOTATION, INGEST_FILTER_ANNOTATION, INGEST_GATEWAYS_ANNOTATION, INTERNAL_MQTT_PORT, PIPELINE_LABEL,
    ROLE_INGEST_CREDENTIALS, ROLE_LABEL,
};
use crate::broker::credential::password::Password;
use crate::configuration::ingest::{FILE, IngestConfiguration, IngestGateway};
use crate::database::uri::{AUTHORITIES_KEY, ConnectionUri};
use crate::operator::context::Images;
use crate::operator::device::secret::PASSWORD_KEY;
use crate::operator::kubernetes::apply::standard_labels;
use crate::operator::kubernetes::pod::{
    HTTP_PORT_NAME, http_ingress, http_port, http_probe, matching, mount, policy_port, restricted_container, restricted_pod, secret_files,
};

/// The paths of the worker's files.
const CONFIGURATION_FOLDER: &str = "/etc/fleetwright/configuration";
const DATABASE_FOLDER: &str = "/etc/fleetwright/database";
const CREDENTIALS_FOLDER: &str = "/etc/fleetwright/credentials";

const CONFIGURATION_VOLUME: &str = "configuration";
const DATABASE_VOLUME: &str = "database";
const CREDENTIALS_VOLUME: &str = "credentials";

/// File of the connection URI in [`DATABASE_FOLDER`].
const URI_FILE: &str = "uri";

/// Annotation of the pods with a revision of the input that a worker reads only at its start: a new revision causes a rollout.
const REVISION_ANNOTATION: &str = "fleetwright.io/configuration-revision";

/// User and group of the image.
const USER: i64 = 65532;

/// Timeout for a stopping worker to commit and acknowledge the messages that it has read.
const TERMINATION_GRACE_SECONDS: i64 = 30;

/// The workers' objects.
#[derive(Debug)]
pub struct Workers {
    /// The configuration of the workers.
    pub configuration: ConfigMap,
    /// The headless Service for the DNS names of the pods.
    pub service: Service,
    /// The allowed connections to and from the workers.
    pub network_policy: NetworkPolicy,
    /// The StatefulSet of the workers.
    pub workers: StatefulSet,
}

/// The wanted number of workers.
#[must_use]
pub fn replicas(pipeline: &Pipeline, valid: &Valid) -> i32 {
    if pipeline.spec.paused { 0 } else { readers(pipeline, valid) }
}

/// The number of workers that share the Gateways: at most the number of sessions with their brokers, because one worker reads each
/// session.
#[must_use]
pub fn readers(pipeline: &Pipeline, valid: &Valid) -> i32 {
    pipeline.spec.workers.replicas.min(valid.sessions.len().try_into().unwrap_or(i32::MAX))
}

/// Labels of all objects of a Pipeline.
#[must_use]
pub fn labels(pipeline: &Pipeline) -> BTreeMap<String, String> {
    let mut labels = standard_labels("ingest", &pipeline.name_any());
    labels.insert(PIPELINE_LABEL.to_owned(), pipeline.name_any());
    labels
}

/// The Secret with which the workers log in. The workers of a paused Pipeline keep their users, because the broker keeps
/// a session and its queue as long as its user exists.
#[must_use]
pub fn credentials(pipeline: &Pipeline, valid: &Valid, password: &Password) -> Secret {
    // An external broker does not use this Secret.
    let own: Vec<&str> = valid.gateways.iter().filter(|name| !valid.externals.contains_key(*name)).map(String::as_str).collect();
    let mut metadata = metadata(pipeline);
    metadata.labels.get_or_insert_default().insert(ROLE_LABEL.to_owned(), ROLE_INGEST_CREDENTIALS.to_owned());
    let mut annotations = BTreeMap::from([(INGEST_GATEWAYS_ANNOTATION, own.join(",")), (INGEST_FILTER_ANNOTATION, valid.filter.clone())]);
    annotations.extend(valid.commands.clone().map(|commands| (INGEST_COMMANDS_ANNOTATION, commands)));
    metadata.annotations = Some(annotations.into_iter().map(|(key, value)| (key.to_owned(), value)).collect());
    let data = [(PASSWORD_KEY.to_owned(), ByteString(password.expose().as_bytes().to_vec()))].into();
    Secret { metadata, data: Some(data), ..Secret::default() }
}

/// The workers and their objects. `uri` is the content of the connection Secret, if it is available; the objects contain only a revision of
/// it.
#[must_use]
pub fn workers(pipeline: &Pipeline, valid: &Valid, password: &Password, uri: Option<&ConnectionUri>, images: &Images) -> Workers {
    let configuration = configuration(pipeline, valid);
    // The revision includes the random password, so that the URI cannot be guessed from the revision.
    let text = uri.map(|uri| uri.expose().as_bytes()).unwrap_or_default();
    let authorities = uri.and_then(ConnectionUri::authorities);
    let parts = [Some(password.expose().as_bytes()), Some(text), authorities, Some(configuration.as_bytes())];
    let revision = name::revision(parts.into_iter().flatten());
    Workers {
        configuration: ConfigMap {
            metadata: metadata(pipeline),
            data: Some([(FILE.to_owned(), configuration)].into()),
            ..ConfigMap::default()
        },
        service: service(pipeline),
        network_policy: network_policy(pipeline),
        workers: stateful_set(pipeline, valid, &revision, authorities.is_some(), images),
    }
}

fn configuration(pipeline: &Pipeline, valid: &Valid) -> String {
    let namespace = pipeline.namespace().unwrap_or_default();
    let gateway = |gateway: &String| match valid.externals.get(gateway) {
        Some(broker) => external::gateway(pipeline, gateway, broker),
        None => IngestGateway {
            name: gateway.clone(),
            host: name::service_host(&name::internal_service(gateway), &namespace),
            port: INTERNAL_MQTT_PORT.unsigned_abs().try_into().unwrap_or(u16::MAX),
            tls: true,
            external: None,
        },
    };
    let configuration = IngestConfiguration {
        cluster: valid.desired.owner.cluster.clone(),
        pipeline: pipeline.name_any(),
        gateways: valid.gateways.iter().map(gateway).collect(),
        topic: pipeline.spec.source.topic.clone(),
        decode: pipeline.spec.decode.clone(),
        descriptor: valid.descriptor.as_ref().ok().and_then(Option::as_ref).map(|descriptor| BASE64_STANDARD.encode(descriptor)),
        table: valid.desired.table.name.clone(),
        chunk_interval: pipeline.spec.sink.timescale.chunk_interval.clone(),
        dead_letter_bytes_per_hour: pipeline.spec.dead_letters.bytes_per_hour(),
        replay: pipeline.spec.replay.clone(),
        namespace,
    };
    json!(configuration).to_string()
}

fn metadata(pipeline: &Pipeline) -> ObjectMeta {
    ObjectMeta {
        name: Some(name::ingest(&pipeline.name_any())),
        namespace: pipeline.namespace(),
        labels: Some(labels(pipeline)),
        ..ObjectMeta::default()
    }
}

fn service(pipeline: &Pipeline) -> Service {
    let port = ServicePort {
        name: Some(HTTP_PORT_NAME.to_owned()),
        port: HTTP_PORT,
        target_port: Some(IntOrString::String(HTTP_PORT_NAME.to_owned())),
        protocol: Some("TCP".to_owned()),
        ..ServicePort::default()
    };
    let spec = ServiceSpec {
        cluster_ip: Some("None".to_owned()),
        publish_not_ready_addresses: Some(true),
        selector: Some(labels(pipeline)),
        ports: Some(vec![port]),
        ..ServiceSpec::default()
    };
    Service { metadata: metadata(pipeline), spec: Some(spec), ..Service::default() }
}

/// A worker connects to brokers, to its database and to DNS, and accepts probes and scrapes of metrics. Behind a Service a database may
/// listen on any port, and a policy applies to that port and not to the Service's: so the policy allows every TCP port.
fn network_policy(pipeline: &Pipeline) -> NetworkPolicy {
    let dns = NetworkPolicyPort { protocol: Some("UDP".to_owned()), ..policy_port(53) };
    let tcp = NetworkPolicyPort { end_port: Some(65535), ..policy_port(1) };
    let calls = NetworkPolicyEgressRule { ports: Some(vec![dns, tcp]), ..NetworkPolicyEgressRule::default() };
    let spec = NetworkPolicySpec {
        pod_selector: Some(matching(labels(pipeline))),
        policy_types: Some(vec!["Ingress".to_owned(), "Egress".to_owned()]),
        ingress: Some(vec![http_ingress()]),
        egress: Some(vec![calls]),
    };
    NetworkPolicy { metadata: metadata(pipeline), spec: Some(spec) }
}

fn stateful_set(pipeline: &Pipeline, valid: &Valid, revision: &str, verified: bool, images: &Images) -> StatefulSet {
    let template = ObjectMeta {
        labels: Some(labels(pipeline)),
        annotations: Some([(REVISION_ANNOTATION.to_owned(), revision.to_owned())].into()),
        ..ObjectMeta::default()
    };
    let spec = StatefulSetSpec {
        replicas: Some(replicas(pipeline, valid)),
        service_name: Some(name::ingest(&pipeline.name_any())),
        pod_management_policy: Some("Parallel".to_owned()),
        selector: matching(labels(pipeline)),
        template: PodTemplateSpec { metadata: Some(template), spec: Some(pod(pipeline, valid, verified, images)) },
        ..StatefulSetSpec::default()
    };
    StatefulSet { metadata: metadata(pipeline), spec, ..StatefulSet::default() }
}

/// `verified`: whether the connection Secret has the authorities of the database.
fn pod(pipeline: &Pipeline, valid: &Valid, verified: bool, images: &Images) -> PodSpec {
    let own = name::ingest(&pipeline.name_any());
    let (logins, place) = broker_files::volume(valid).unzip();
    let connection = &pipeline.spec.sink.timescale.connection_secret;
    let configuration = ConfigMapVolumeSource { name: own.clone(), ..ConfigMapVolumeSource::default() };
    let authorities = verified.then_some((AUTHORITIES_KEY, AUTHORITIES_KEY));
    let database_files = [(connection.key.as_str(), URI_FILE)].into_iter().chain(authorities);
    PodSpec {
        automount_service_account_token: Some(false),
        enable_service_links: Some(false),
        termination_grace_period_seconds: Some(TERMINATION_GRACE_SECONDS),
        security_context: Some(restricted_pod(USER)),
        containers: vec![container(pipeline, place, images)],
        volumes: Some(
            [
                Volume { name: CONFIGURATION_VOLUME.to_owned(), config_map: Some(configuration), ..Volume::default() },
                secret_files(CREDENTIALS_VOLUME, &own, [(PASSWORD_KEY, PASSWORD_KEY)]),
                secret_files(DATABASE_VOLUME, &connection.name, database_files),
            ]
            .into_iter()
            .chain(logins)
            .collect(),
        ),
        ..PodSpec::default()
    }
}

fn container(pipeline: &Pipeline, logins: Option<VolumeMount>, images: &Images) -> Container {
    let logins_folder = logins.is_some().then_some(["--gateways-folder", broker_files::FOLDER]);
    let arguments = [
        "ingest",
        "--config",
        &format!("{CONFIGURATION_FOLDER}/{FILE}"),
        "--database-uri-file",
        &format!("{DATABASE_FOLDER}/{URI_FILE}"),
        "--password-file",
        &format!("{CREDENTIALS_FOLDER}/{PASSWORD_KEY}"),
    ];
    let mounts =
        [(CONFIGURATION_VOLUME, CONFIGURATION_FOLDER), (CREDENTIALS_VOLUME, CREDENTIALS_FOLDER), (DATABASE_VOLUME, DATABASE_FOLDER)];
    let pod_name = ObjectFieldSelector { field_path: "metadata.name".to_owned(), ..ObjectFieldSelector::default() };
    Container {
        name: "ingest".to_owned(),
        image: Some(images.fleetwright.clone()),
        image_pull_policy: images.pull_policy.clone(),
        args: Some(arguments.into_iter().chain(logins_folder.into_iter().flatten()).map(str::to_owned).collect()),
        env: Some(vec![EnvVar {
            name: "POD_NAME".to_owned(),
            value_from: Some(EnvVarSource { field_ref: Some(pod_name), ..EnvVarSource::default() }),
            ..EnvVar::default()
        }]),
        ports: Some(vec![http_port()]),
        resources: Some(pipeline.spec.workers.resources.to_requirements()),
        security_context: Some(restricted_container()),
        // Probed every second until the worker runs, so that the readiness probe starts at once.
        startup_probe: Some(http_probe("/livez", 1, 60)),
        liveness_probe: Some(http_probe("/livez", 10, 3)),
        readiness_probe: Some(http_probe("/readyz", 2, 2)),
        volume_mounts: Some(mounts.map(|(volume, path)| mount(volume, path, true)).into_iter().chain(logins).collect()),
        ..Container::default()
    }
}

#[cfg(test)]
#[path = "build_tests.rs"]
mod tests;
