//! From what was observed to a Gateway that can be built, or why it cannot.

use jiff::Timestamp;

use super::build::QUEUE_MARGIN;
use super::client_authority::{ClientTrust, client_trust};
use super::observe::Observed;
use super::tls::{self, Certificates};
use crate::api::condition::Cause;
use crate::api::gateway::{Durability, GatewaySpec};
use crate::api::reason::Reason;
use crate::api::resources::ResourceQuantity;

/// The least memory that a broker may be limited to: it takes some 10 MiB itself, and a quarter is set aside.
const MIN_MEMORY: i64 = 32 << 20;

/// Percent of the container's memory that the broker may use for sessions and messages. The rest is for SQLite, for
/// fragmentation and for the stack: a broker at its own limit refuses messages, one at the container's is killed.
const BROKER_MEMORY_PERCENT: i64 = 75;

/// The smallest volume: the broker keeps 64 MiB of it for its journal.
const MIN_STORAGE: i64 = 128 << 20;

/// The most bytes that may wait for one client: Mosquitto takes no larger number than that with its margin.
const MAX_QUEUED_BYTES: i64 = i32::MAX as i64 / (QUEUE_MARGIN + 1) * QUEUE_MARGIN;

/// A Gateway that can be built.
#[derive(Clone, Debug)]
pub struct Valid {
    /// Namespace.
    pub namespace: String,

    /// Name.
    pub name: String,

    /// As declared.
    pub spec: GatewaySpec,

    /// Bytes that the broker may use for sessions and messages; without a limit of memory: as many as there are.
    pub memory_limit: Option<i64>,

    /// Bytes that may wait for one client.
    pub queued_bytes: i64,

    /// Names of the TLS Secrets, sorted, each once.
    pub tls_secrets: Vec<String>,

    /// What the TLS listeners are to present.
    pub tls: Certificates,

    /// Who signs the certificates of devices.
    pub clients: ClientTrust,

    /// What the spec names and cannot be used yet. The broker is built nevertheless: it starts as soon as this is
    /// resolved, and one that runs goes on with the certificate it has.
    pub awaiting: Option<Cause>,
}

/// A Gateway that can be built, or what in its spec has to change first.
///
/// # Errors
/// What only a change of the spec can heal.
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
    Ok(Valid {
        namespace: observed.gateway.metadata.namespace.clone().unwrap_or_default(),
        name: observed.gateway.metadata.name.clone().unwrap_or_default(),
        spec: spec.clone(),
        memory_limit: memory.map(|bytes| bytes / 100 * BROKER_MEMORY_PERCENT),
        queued_bytes,
        tls_secrets: observed.tls.keys().cloned().collect(),
        awaiting: tls.awaiting.clone().or_else(|| clients.awaiting.clone()),
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
