//! The status of a Gateway: pure.

use k8s_openapi::api::apps::v1::StatefulSet;

use super::observe::Observed;
use super::validate::Valid;
use crate::api::condition::{self, ACCEPTED, BROKER_AVAILABLE, Cause, Finding, MESSAGES_DROPPED, Readiness};
use crate::api::gateway::{Gateway, GatewayStatus};
use crate::api::name;
use crate::operator::apply::WriteError;
use crate::runtime::error::chain;

/// What became of a Gateway that was validated.
#[derive(Debug)]
pub enum Outcome<'a> {
    /// The spec has to change.
    Rejected(&'a Cause),

    /// An object could not be written.
    NotApplied(&'a Valid, &'a WriteError),

    /// All objects are as wanted; with the live StatefulSet.
    Applied(&'a Valid, &'a StatefulSet),
}

/// The status that follows.
#[must_use]
pub fn status(observed: &Observed, outcome: &Outcome<'_>) -> GatewayStatus {
    let gateway = &observed.gateway;
    let generation = gateway.metadata.generation.unwrap_or_default();
    let previous = gateway.status.as_ref().map_or(&[][..], |status| status.conditions.as_slice());
    let (mut findings, readiness) = match outcome {
        Outcome::Rejected(cause) => rejected(cause),
        Outcome::NotApplied(valid, error) => not_applied(valid, error),
        Outcome::Applied(valid, stateful_set) => applied(observed, valid, stateful_set),
    };
    if observed.report.as_ref().is_some_and(|report| report.messages_dropped) {
        findings.push(dropped(gateway));
    }
    GatewayStatus {
        observed_generation: generation,
        address: Some(address(gateway)),
        devices: Some(observed.devices),
        clients: observed.clients.clone(),
        conditions: condition::conditions(previous, generation, &findings, &readiness),
    }
}

fn address(gateway: &Gateway) -> String {
    let metadata = &gateway.metadata;
    name::service_host(metadata.name.as_deref().unwrap_or_default(), metadata.namespace.as_deref().unwrap_or_default())
}

fn rejected(cause: &Cause) -> (Vec<Finding>, Readiness) {
    let unknown = Cause::new("NotAccepted", "the spec cannot be carried out; a broker that runs goes on as it is");
    let findings = vec![Finding::fails(ACCEPTED, cause.clone()), Finding::unknown(BROKER_AVAILABLE, unknown)];
    (findings, Readiness::Stalled(cause.clone()))
}

fn not_applied(valid: &Valid, error: &WriteError) -> (Vec<Finding>, Readiness) {
    let cause = Cause::new(error.reason(), chain(error));
    // What the API server finds invalid stays so until the spec changes.
    let invalid = error.status().is_some_and(|status| status.code == 422);
    let readiness = if invalid { Readiness::Stalled(cause.clone()) } else { Readiness::Reconciling(cause.clone()) };
    (vec![accepted(valid), Finding::fails(BROKER_AVAILABLE, cause)], readiness)
}

fn applied(observed: &Observed, valid: &Valid, stateful_set: &StatefulSet) -> (Vec<Finding>, Readiness) {
    let broker = broker(observed, stateful_set);
    let readiness = match (&valid.awaiting, broker.holds) {
        (Some(cause), _) => Readiness::Reconciling(cause.clone()),
        (None, Some(true)) => Readiness::Ready(Cause::new("Ready", "the broker runs and accepts its devices")),
        (None, _) => Readiness::Reconciling(broker.cause.clone()),
    };
    (vec![accepted(valid), broker], readiness)
}

fn accepted(valid: &Valid) -> Finding {
    match &valid.awaiting {
        Some(cause) => Finding::fails(ACCEPTED, cause.clone()),
        None => Finding::holds(ACCEPTED, "Accepted", "the spec can be carried out"),
    }
}

/// The pod is ready while the broker accepts the agent's login, so that a ready pod is a proof and not a guess.
fn broker(observed: &Observed, stateful_set: &StatefulSet) -> Finding {
    let status = stateful_set.status.as_ref();
    let seen = status.and_then(|status| status.observed_generation) >= stateful_set.metadata.generation;
    let revisions = status.map(|status| (&status.current_revision, &status.update_revision));
    // With one replica the current revision follows once the pod of the new one is ready.
    let current = revisions.is_some_and(|(current, update)| update.is_none() || current == update);
    let ready = status.and_then(|status| status.ready_replicas).unwrap_or_default() > 0;
    let fails = |reason, message: &str| Finding::fails(BROKER_AVAILABLE, Cause::new(reason, message));
    match (ready, seen && current, &observed.report) {
        (false, ..) => {
            let pod = format!("{}-0", name::broker(observed.gateway.metadata.name.as_deref().unwrap_or_default()));
            fails("BrokerNotReady", &format!("the broker does not accept logins yet: if that lasts, see `kubectl describe pod {pod}`"))
        }
        (true, false, _) => fails("BrokerUpdating", "the broker is being brought to the current configuration"),
        (true, true, None) => fails("CredentialsNotProven", "the broker's agent has not reported a login yet"),
        (true, true, Some(_)) => Finding::holds(BROKER_AVAILABLE, "BrokerAvailable", "the broker runs and has accepted a login"),
    }
}

fn dropped(gateway: &Gateway) -> Finding {
    let message = format!(
        "since it started the broker has dropped messages for clients that were away or too slow: raise limits.queuedBytesPerClient (now {}), \
         or see which client does not keep up",
        gateway.spec.limits.queued_bytes_per_client.0
    );
    Finding::holds(MESSAGES_DROPPED, "QueueLimitReached", message)
}

#[cfg(test)]
#[path = "status_tests.rs"]
mod tests;
