//! Validates the observed state: a Gateway that can be built, or the cause why not.

use std::collections::BTreeSet;

use jiff::Timestamp;

use super::client_authority::{ClientTrust, client_trust};
use super::internal::{Internal, internal};
use super::observe::Observed;
use super::tls::{self, Certificates};
use crate::api::condition::Cause;
use crate::api::gateway::{Durability, GatewaySpec};
use crate::api::name;
use crate::api::reason::Reason;
use crate::api::resources::ResourceQuantity;
use crate::broker::configuration::QUEUE_MARGIN;

/// The minimum memory limit of a broker: the broker itself uses about 10 MiB, and a quarter is reserved.
const MIN_MEMORY: i64 = 32 << 20;

/// Percent of the container's memory that the broker may use for sessions and messages. The rest is for SQLite, for
/// fragmentation and for the stack: a broker at its own limit refuses messages, but the kernel kills a broker at the container's limit.
const BROKER_MEMORY_PERCENT: i64 = 75;

/// The minimum size of the volume: the broker reserves 64 MiB of it for its journal.
const MIN_STORAGE: i64 = 128 << 20;

/// The maximum of queued bytes for one client: Mosquitto accepts no larger number than this plus its margin.
const MAX_QUEUED_BYTES: i64 = i32::MAX as i64 / (QUEUE_MARGIN + 1) * QUEUE_MARGIN;

/// A Gateway that can be built.
#[derive(Clone, Debug)]
pub struct Valid {
    /// Namespace.
    pub namespace: String,

    /// Name.
    pub name: String,

    /// The declared spec.
    pub spec: GatewaySpec,

    /// Bytes that the broker may use for sessions and messages; unlimited without a memory limit.
    pub memory_limit: Option<i64>,

    /// Bytes that the broker may queue for one client.
    pub queued_bytes: i64,

    /// Names of the Secrets with the certificates of all listeners, sorted, each once.
    pub tls_secrets: Vec<String>,

    /// The authority and the certificate of the internal ports.
    pub internal: Internal,

    /// The certificates for the TLS listeners.
    pub tls: Certificates,

    /// The authority that signs the certificates of devices.
    pub clients: ClientTrust,

    /// An object that the spec names and that is not usable yet. The operator builds the broker anyway: the broker starts as soon as
    /// the object is usable, and a running broker keeps its certificate.
    pub awaiting: Option<Cause>,
}

/// Validates a Gateway's spec and the objects that it names.
///
/// # Errors
/// If only a change of the spec can resolve the cause.
pub fn validate(observed: &Observed, now: Timestamp) -> Result<Valid, Cause> {
    let spec = &observed.gateway.spec;
    let memory = spec.resources.limits.get("memory").map(|memory| quantity("resources.limits.memory", memory, MIN_MEMORY)).transpose()?;
    let queued_bytes = quantity("limits.queuedBytesPerClient", &spec.limits.queued_bytes_per_client, 1)?;
    if queued_bytes > MAX_QUEUED_BYTES {
        let message =
            format!("limits.queuedBytesPerClient is above what Mosquitto can count: expected at most {}Mi", MAX_QUEUED_BYTES >> 20);
        return Err(Cause::new(Reason::InvalidQuantity, message));
    }
    if spec.durability == Durability::Snapshot && memory.is_none() {
        let message = "with durability Snapshot the queues are bounded by the broker's memory alone: give resources.limits.memory";
        return Err(Cause::new(Reason::InvalidResources, message));
    }
    quantity("storage.size", &spec.storage.size, MIN_STORAGE)?;
    if let Some(request) = spec.resources.requests.get("memory").and_then(ResourceQuantity::to_units)
        && memory.is_some_and(|limit| request > limit)
    {
        let message = "resources.requests.memory is above resources.limits.memory: raise the limit or lower the request";
        return Err(Cause::new(Reason::InvalidResources, message));
    }
    if let Some(cause) = tls::invalid_host_name(&observed.gateway) {
        return Err(cause);
    }
    let tls = tls::certificates(observed, now);
    let clients = client_trust(observed, now);
    let internal = internal(observed, now);
    let awaiting = [&internal.awaiting, &tls.awaiting, &clients.awaiting].into_iter().flatten().next().cloned();
    let name = observed.gateway.metadata.name.clone().unwrap_or_default();
    Ok(Valid {
        namespace: observed.gateway.metadata.namespace.clone().unwrap_or_default(),
        spec: spec.clone(),
        memory_limit: memory.map(|bytes| bytes / 100 * BROKER_MEMORY_PERCENT),
        queued_bytes,
        tls_secrets: observed.tls.keys().cloned().chain([name::internal_certificate(&name)]).collect::<BTreeSet<_>>().into_iter().collect(),
        awaiting,
        internal,
        name,
        clients,
        tls,
    })
}

fn quantity(field: &str, quantity: &ResourceQuantity, least: i64) -> Result<i64, Cause> {
    let units = quantity.to_units().filter(|units| *units >= least);
    units
        .ok_or_else(|| Cause::new(Reason::InvalidQuantity, format!("{field} is {:?}: expected a quantity of at least {least}", quantity.0)))
}

#[cfg(test)]
#[path = "validate_tests.rs"]
mod tests;
