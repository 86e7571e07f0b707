//! The files with which workers log in to brokers and verify them: pure.
//!
//! They are in a separate folder for each Gateway. A changed Secret reaches a running worker, because it reads them at each connection. All
//! are optional, because a missing Secret must not keep the workers from reading the other Gateways. The Secret with the certificate of a
//! broker's internal ports has a private key too: a worker gets only its `ca.crt`.

use k8s_openapi::api::core::v1::{KeyToPath, ProjectedVolumeSource, SecretProjection, Volume, VolumeMount, VolumeProjection};

use super::validate::Valid;
use crate::api::external::ExternalBroker;
use crate::api::name;
use crate::configuration::agent::TLS_AUTHORITIES;
use crate::configuration::ingest::{AUTHORITIES_FILE, PASSWORD_FILE, USERNAME_FILE};
use crate::operator::kubernetes::pod::{SECRET_MODE, mount};

/// The folder of the files in the worker.
pub const FOLDER: &str = "/etc/fleetwright/gateways";

const VOLUME: &str = "gateways";

/// The volume with the files of all Gateways, and its mount; `None` if the workers need no file. The login of an external broker is in it
/// only if its Secret allows the use: a worker would send its values to the address in the Gateway.
#[must_use]
pub fn volume(valid: &Valid) -> Option<(Volume, VolumeMount)> {
    let files = |gateway: &String| match valid.externals.get(gateway) {
        Some(broker) if valid.usable_logins.contains(gateway) => external(gateway, broker),
        Some(_) => Vec::new(),
        None => vec![file(gateway, &name::internal_certificate(gateway), TLS_AUTHORITIES, AUTHORITIES_FILE)],
    };
    let sources: Vec<VolumeProjection> = valid.gateways.iter().flat_map(files).collect();
    if sources.is_empty() {
        return None;
    }
    let projected = ProjectedVolumeSource { default_mode: Some(SECRET_MODE), sources: Some(sources), ..ProjectedVolumeSource::default() };
    let volume = Volume { name: VOLUME.to_owned(), projected: Some(projected), ..Volume::default() };
    Some((volume, mount(VOLUME, FOLDER, true)))
}

fn external(gateway: &str, broker: &ExternalBroker) -> Vec<VolumeProjection> {
    let credentials = &broker.credentials_secret;
    let authorities = broker.tls.as_ref().and_then(|tls| tls.ca_secret_name.as_deref());
    [
        Some(file(gateway, &credentials.name, &credentials.username_key, USERNAME_FILE)),
        Some(file(gateway, &credentials.name, &credentials.password_key, PASSWORD_FILE)),
        authorities.map(|secret| file(gateway, secret, TLS_AUTHORITIES, AUTHORITIES_FILE)),
    ]
    .into_iter()
    .flatten()
    .collect()
}

fn file(gateway: &str, secret: &str, key: &str, file: &str) -> VolumeProjection {
    let item = KeyToPath { key: key.to_owned(), path: format!("{gateway}/{file}"), ..KeyToPath::default() };
    let secret = SecretProjection { name: secret.to_owned(), items: Some(vec![item]), optional: Some(true) };
    VolumeProjection { secret: Some(secret), ..VolumeProjection::default() }
}
