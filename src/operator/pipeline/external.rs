//! The configuration with which workers read Gateways with external brokers: pure.

use std::collections::BTreeMap;

use kube::ResourceExt;

use crate::api::decode::Format;
use crate::api::external::ExternalBroker;
use crate::api::{Pipeline, name};
use crate::configuration::ingest::{ExternalAccess, IngestGateway};
use crate::state::assignment::session_name;

/// A worker's configuration of a Gateway with an external broker.
#[must_use]
pub fn gateway(pipeline: &Pipeline, name: &str, broker: &ExternalBroker) -> IngestGateway {
    // An invalid address is unreachable; the Gateway's condition reports it.
    let (host, port) = broker.host_and_port().unwrap_or_default();
    IngestGateway {
        name: name.to_owned(),
        host: host.to_owned(),
        port,
        tls: broker.tls.is_some(),
        external: Some(ExternalAccess {
            client_id: name::external_ingest_client(&pipeline.uid().unwrap_or_default(), name),
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
