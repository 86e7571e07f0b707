//! The configuration and volumes with which workers read Gateways with external brokers: pure.
//!
//! The logins are files in a separate folder for each Gateway, so that a changed Secret reaches a running worker: it reads them at
//! each connection. All are optional, because a deleted Secret must not keep the workers from reading the other Gateways.

use std::collections::{BTreeMap, BTreeSet};

use k8s_openapi::api::core::v1::{KeyToPath, ProjectedVolumeSource, SecretProjection, Volume, VolumeMount, VolumeProjection};
use kube::ResourceExt;

use crate::api::decode::Format;
use crate::api::external::ExternalBroker;
use crate::api::{Pipeline, name};
use crate::configuration::agent::TLS_AUTHORITIES;
use crate::configuration::ingest::{AUTHORITIES_FILE, ExternalAccess, IngestGateway, PASSWORD_FILE, USERNAME_FILE};
use crate::operator::kubernetes::pod::{SECRET_MODE, mount};
use crate::state::assignment::session_name;

/// The folder of the logins in the worker.
pub const FOLDER: &str = "/etc/fleetwright/gateways";

const VOLUME: &str = "gateways";

/// A worker's configuration of a Gateway with an external broker.
#[must_use]
pub fn gateway(pipeline: &Pipeline, name: &str, broker: &ExternalBroker) -> IngestGateway {
    // An invalid address is unreachable; the Gateway's condition reports it.
    let (host, port) = broker.host_and_port().unwrap_or_default();
    IngestGateway {
        name: name.to_owned(),
        host: host.to_owned(),
        port,
        external: Some(ExternalAccess {
            client_id: name::external_ingest_client(&pipeline.uid().unwrap_or_default(), name),
            tls: broker.tls.is_some(),
            shared_by: sessions(pipeline, broker),
            authorities: broker.tls.as_ref().is_some_and(|tls| tls.ca_secret_name.is_some()),
        }),
    }
}

/// The number of sessions that share the subscription at a broker, if any. One session must receive all messages of a Sparkplug B node, in
/// their order.
fn sessions(pipeline: &Pipeline, broker: &ExternalBroker) -> Option<i32> {
    let shared = broker.shared_subscription.as_ref().filter(|_| pipeline.spec.decode.format != Format::SparkplugB);
    shared.map(|shared| shared.sessions)
}

/// The sessions in which workers read the Gateways: the first session of every Gateway precedes the second of any, so that the workers
/// share every Gateway.
#[must_use]
pub fn session_names(pipeline: &Pipeline, gateways: &[String], externals: &BTreeMap<String, ExternalBroker>) -> Vec<String> {
    let count = |gateway: &String| externals.get(gateway).and_then(|broker| sessions(pipeline, broker)).unwrap_or(1);
    let mut sessions: Vec<(i32, &String)> =
        gateways.iter().flat_map(|gateway| (0..count(gateway)).map(move |number| (number, gateway))).collect();
    sessions.sort_unstable();
    sessions.into_iter().map(|(number, gateway)| session_name(gateway, number)).collect()
}

/// The volume with the logins of the `usable` Gateways, and its mount; `None` if the workers need no login. A Secret that does not allow its
/// use must not reach a worker, which would send its values to the address in the Gateway.
#[must_use]
pub fn volume(brokers: &BTreeMap<String, ExternalBroker>, usable: &BTreeSet<String>) -> Option<(Volume, VolumeMount)> {
    let brokers = brokers.iter().filter(|(name, _)| usable.contains(*name));
    let sources: Vec<VolumeProjection> = brokers.flat_map(|(name, broker)| files(name, broker)).collect();
    if sources.is_empty() {
        return None;
    }
    let projected = ProjectedVolumeSource { default_mode: Some(SECRET_MODE), sources: Some(sources), ..ProjectedVolumeSource::default() };
    let volume = Volume { name: VOLUME.to_owned(), projected: Some(projected), ..Volume::default() };
    Some((volume, mount(VOLUME, FOLDER, true)))
}

fn files(gateway: &str, broker: &ExternalBroker) -> Vec<VolumeProjection> {
    let file = |secret: &str, key: &str, file: &str| {
        let item = KeyToPath { key: key.to_owned(), path: format!("{gateway}/{file}"), ..KeyToPath::default() };
        let secret = SecretProjection { name: secret.to_owned(), items: Some(vec![item]), optional: Some(true) };
        VolumeProjection { secret: Some(secret), ..VolumeProjection::default() }
    };
    let credentials = &broker.credentials_secret;
    let authorities = broker.tls.as_ref().and_then(|tls| tls.ca_secret_name.as_deref());
    [
        Some(file(&credentials.name, &credentials.username_key, USERNAME_FILE)),
        Some(file(&credentials.name, &credentials.password_key, PASSWORD_FILE)),
        authorities.map(|secret| file(secret, TLS_AUTHORITIES, AUTHORITIES_FILE)),
    ]
    .into_iter()
    .flatten()
    .collect()
}
