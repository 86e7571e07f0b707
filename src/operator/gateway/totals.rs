//! The totals of devices and clients in a Gateway's status. They change often and affect nothing else, so they are written separately,
//! without a full reconciliation.

use std::hash::{DefaultHasher, Hash, Hasher};
use std::time::Duration;

use kube::runtime::reflector::{ObjectRef, Store};
use tokio::sync::mpsc::UnboundedReceiver;
use tokio::time::{Instant, sleep_until};
use tracing::warn;

use super::observe::{clients, devices};
use crate::api::gateway::{Gateway, GatewayStatus};
use crate::api::is_reconciliation_paused;
use crate::operator::context::Context;
use crate::operator::device::key::GatewayKey;
use crate::operator::kubernetes::apply::{WriteError, Writer};
use crate::runtime::error::chain;
use crate::runtime::rate_limited_queue::{Limits, RateLimitedQueue};

/// The totals are compared again this long after a write: a concurrent reconciliation may have written older totals.
const AGAIN: Duration = Duration::from_secs(30);

/// Writes the totals of the Gateways from `changed`; `seen` receives each Gateway that was written, by any writer.
pub async fn keep(
    context: &Context,
    writer: &Writer,
    gateways: Store<Gateway>,
    mut changed: UnboundedReceiver<GatewayKey>,
    mut seen: UnboundedReceiver<GatewayKey>,
) {
    let mut queue = RateLimitedQueue::new(Limits::default(), Instant::now());
    loop {
        while let Some((key, ())) = queue.pop(Instant::now()) {
            match write(context, writer, &gateways, &key).await {
                Ok(()) => queue.done(&key, Instant::now()),
                Err(error) => {
                    let failures = queue.failed(&key, (), Instant::now(), rand::random());
                    let (gateway, namespace) = (&key.name, &key.namespace);
                    warn!(%gateway, %namespace, failures, error = chain(&error), "failed to write the totals of a Gateway: trying again");
                }
            }
        }
        let due = queue.next_due();
        tokio::select! {
            Some(key) = changed.recv() => queue.insert(key, (), Instant::now(), Instant::now()),
            Some(key) = seen.recv() => queue.insert(key, (), Instant::now() + AGAIN, Instant::now()),
            () = sleep_until(due.unwrap_or_else(Instant::now)), if due.is_some() => {}
            else => return,
        }
    }
}

async fn write(context: &Context, writer: &Writer, gateways: &Store<Gateway>, key: &GatewayKey) -> Result<(), WriteError> {
    let Some(gateway) = gateways.get(&ObjectRef::new(&key.name).within(&key.namespace)) else { return Ok(()) };
    if is_reconciliation_paused(gateway.as_ref()) || gateway.metadata.deletion_timestamp.is_some() {
        return Ok(());
    }
    let declared = context.fleet.lock().totals(key);
    let heard = context.presence.of(key);
    // The first reconciliation of a Gateway writes the whole status.
    let Some(previous) = &gateway.status else { return Ok(()) };
    let wanted = GatewayStatus {
        devices: devices(declared, heard.as_ref(), Some(previous)),
        clients: if gateway.spec.external.is_some() { None } else { clients(heard, Some(previous)) },
        ..previous.clone()
    };
    writer.write_status::<Gateway, _>(&key.namespace, &key.name, Some(previous), &wanted).await.map(drop)
}

/// A digest of a Gateway without its totals and `managedFields`.
#[must_use]
pub fn digest(gateway: &Gateway) -> Option<u64> {
    let mut gateway = gateway.clone();
    gateway.metadata.managed_fields = None;
    gateway.metadata.resource_version = None;
    if let Some(status) = &mut gateway.status {
        (status.devices, status.clients) = (None, None);
    }
    let mut hasher = DefaultHasher::new();
    serde_json::to_string(&gateway).ok()?.hash(&mut hasher);
    Some(hasher.finish())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn of_totals_nothing_follows() {
        let digest_of = |change: &serde_json::Value| {
            let mut gateway = json!({
                "apiVersion": "fleetwright.io/v1alpha1", "kind": "Gateway",
                "metadata": {"name": "g", "namespace": "n", "uid": "1", "generation": 1, "resourceVersion": "1"},
                "spec": {}, "status": {"observedGeneration": 1, "conditions": [], "devices": {"declared": 1, "live": 0}},
            });
            merge(&mut gateway, change);
            digest(&serde_json::from_value(gateway).unwrap()).unwrap()
        };
        let before = digest_of(&json!({}));
        for (change, same) in [
            (json!({"metadata": {"resourceVersion": "2"}, "status": {"devices": {"declared": 2, "live": 1, "connected": 1}}}), true),
            (json!({"status": {"clients": {"refused": 1, "recentlyRefused": []}}}), true),
            (json!({"status": {"observedGeneration": 2}}), false),
            (json!({"status": {"address": "g.n.svc"}}), false),
            (json!({"status": null}), false),
            (json!({"metadata": {"labels": {"site": "north"}}}), false),
            (json!({"metadata": {"deletionTimestamp": "2030-01-01T00:00:00Z"}}), false),
            (json!({"metadata": {"uid": "2"}}), false),
            (json!({"spec": {"resources": {"limits": {"memory": "1Gi"}}}}), false),
        ] {
            assert_eq!(digest_of(&change) == before, same, "{change}");
        }
    }

    fn merge(object: &mut serde_json::Value, patch: &serde_json::Value) {
        let Some(patch) = patch.as_object() else { return object.clone_from(patch) };
        for (key, value) in patch {
            merge(&mut object[key], value);
        }
    }
}
