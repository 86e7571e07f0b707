//! The status of a Gateway: pure.

use k8s_openapi::api::apps::v1::StatefulSet;

use super::broker_full::broker_full;
use super::observe::Observed;
use super::tls;
use super::validate::Valid;
use crate::api::condition::{
    self, ACCEPTED, BROKER_AVAILABLE, CERTIFICATE_VALID, CLIENT_AUTHORITY_VALID, Cause, Finding, MESSAGES_DROPPED, Readiness,
};
use crate::api::gateway::{Gateway, GatewayCertificate, GatewayStatus};
use crate::api::name;
use crate::api::reason::Reason;
use crate::operator::kubernetes::apply::WriteError;
use crate::runtime::error::chain;

/// The outcome of a reconciliation.
#[derive(Debug)]
pub enum Outcome<'a> {
    /// The spec is invalid.
    Rejected(&'a Cause),

    /// A write of an object failed.
    NotApplied(&'a Valid, &'a WriteError),

    /// All objects are applied. Holds the live StatefulSet.
    Applied(&'a Valid, &'a StatefulSet),
}

/// The resulting status.
#[must_use]
pub fn status(observed: &Observed, outcome: &Outcome<'_>) -> GatewayStatus {
    let gateway = &observed.gateway;
    let generation = gateway.metadata.generation.unwrap_or_default();
    let previous = gateway.status.as_ref().map_or(&[][..], |status| status.conditions.as_slice());
    let (mut findings, readiness) = match outcome {
        Outcome::Rejected(cause) => rejected(cause),
        Outcome::NotApplied(valid, error) => not_applied(observed, valid, error),
        Outcome::Applied(valid, stateful_set) => applied(observed, valid, stateful_set),
    };
    if observed.report.as_ref().is_some_and(|report| report.messages_dropped) {
        findings.push(dropped(gateway));
    }
    findings.extend(broker_full(observed, previous));
    GatewayStatus {
        observed_generation: generation,
        address: Some(address(gateway)),
        devices: observed.devices,
        clients: observed.clients.clone(),
        certificate: presented(observed),
        conditions: condition::conditions(previous, generation, &findings, &readiness),
    }
}

fn address(gateway: &Gateway) -> String {
    let metadata = &gateway.metadata;
    name::service_host(metadata.name.as_deref().unwrap_or_default(), metadata.namespace.as_deref().unwrap_or_default())
}

fn rejected(cause: &Cause) -> (Vec<Finding>, Readiness) {
    let unknown = Cause::new(Reason::NotAccepted, "the spec cannot be carried out; a broker that runs goes on as it is");
    let findings = vec![Finding::fails(ACCEPTED, cause.clone()), Finding::unknown(BROKER_AVAILABLE, unknown)];
    (findings, Readiness::Stalled(cause.clone()))
}

fn not_applied(observed: &Observed, valid: &Valid, error: &WriteError) -> (Vec<Finding>, Readiness) {
    let cause = Cause::new(error.reason(), chain(error));
    // An object that the API server rejects as invalid stays invalid until the spec changes.
    let invalid = error.status().is_some_and(|status| status.code == 422);
    let readiness = if invalid { Readiness::Stalled(cause.clone()) } else { Readiness::Reconciling(cause.clone()) };
    let findings = [
        Some(accepted(valid)),
        Some(Finding::fails(BROKER_AVAILABLE, cause)),
        certificate(observed, valid),
        client_authority(observed, valid),
    ];
    (findings.into_iter().flatten().collect(), readiness)
}

fn applied(observed: &Observed, valid: &Valid, stateful_set: &StatefulSet) -> (Vec<Finding>, Readiness) {
    let broker = broker(observed, stateful_set);
    let certificate = certificate(observed, valid);
    let failing = [Some(&broker), certificate.as_ref()].into_iter().flatten().find(|finding| finding.holds != Some(true));
    let readiness = match (&valid.awaiting, failing) {
        (Some(cause), _) => Readiness::Reconciling(cause.clone()),
        (None, Some(failing)) => Readiness::Reconciling(failing.cause.clone()),
        (None, None) => Readiness::Ready(Cause::new(Reason::Ready, "the broker runs and accepts its devices")),
    };
    ([Some(accepted(valid)), Some(broker), certificate, client_authority(observed, valid)].into_iter().flatten().collect(), readiness)
}

/// The condition of the authority that signs the certificates of devices.
fn client_authority(observed: &Observed, valid: &Valid) -> Option<Finding> {
    let declared = observed.gateway.spec.client_authority.as_ref()?;
    Some(match (&valid.clients.awaiting, &valid.clients.expiring) {
        (Some(cause), _) => Finding::fails(CLIENT_AUTHORITY_VALID, cause.clone()),
        (None, Some(Cause { reason, message })) => Finding::holds(CLIENT_AUTHORITY_VALID, *reason, message),
        (None, None) => {
            let message = format!("the authority in Secret {} can sign the certificates of devices", declared.secret_name);
            Finding::holds(CLIENT_AUTHORITY_VALID, Reason::ClientAuthorityUsable, message)
        }
    })
}

/// The condition of the certificates: whether the Secrets are usable, and whether the broker presents them.
fn certificate(observed: &Observed, valid: &Valid) -> Option<Finding> {
    if let Some(cause) = &valid.tls.awaiting {
        return Some(Finding::fails(CERTIFICATE_VALID, cause.clone()));
    }
    let presented = |secret: &str| observed.report.as_ref().and_then(|report| report.certificates.get(secret));
    let unproven = valid.tls.usable.iter().find(|(secret, certificate)| !tls::is_presented(certificate, presented(secret)));
    if let Some((secret, _)) = unproven {
        let message = format!(
            "the broker does not present the certificate in Secret {secret} yet: if that lasts, see the log of the container `agent`"
        );
        return Some(Finding::fails(CERTIFICATE_VALID, Cause::new(Reason::CertificateNotProven, message)));
    }
    let former = valid.tls.usable.keys().find_map(|secret| Some((secret, presented(secret)?.former_not_after.as_ref()?)));
    if let Some((secret, not_after)) = former {
        let message = format!(
            "the certificate in Secret {secret} has a key of another kind (RSA, ECDSA) than the one before, which the broker goes on \
             presenting to some clients until it starts anew, and which expires at {}: delete the pod {}-0 when its clients may connect \
             again",
            not_after.0,
            name::broker(&valid.name)
        );
        return Some(Finding::fails(CERTIFICATE_VALID, Cause::new(Reason::FormerCertificatePresented, message)));
    }
    if let Some(Cause { reason, message }) = &valid.tls.expiring {
        return Some(Finding::holds(CERTIFICATE_VALID, *reason, message));
    }
    let (secret, first) = valid.tls.usable.iter().min_by_key(|(_, certificate)| certificate.not_after)?;
    let message = format!("the broker presents the certificate in Secret {secret}, which expires at {}", first.not_after);
    Some(Finding::holds(CERTIFICATE_VALID, Reason::CertificateProven, message))
}

/// The certificate in use that expires first. The report may contain others that an older spec named.
fn presented(observed: &Observed) -> Option<GatewayCertificate> {
    let report = observed.report.as_ref()?;
    let in_use = report.certificates.iter().filter(|(secret, _)| observed.tls.contains_key(*secret));
    let (secret, first) = in_use.min_by_key(|(_, certificate)| certificate.not_after.0)?;
    Some(GatewayCertificate { secret_name: secret.clone(), not_after: first.not_after.clone(), sha256: first.fingerprint.clone() })
}

fn accepted(valid: &Valid) -> Finding {
    match &valid.awaiting {
        Some(cause) => Finding::fails(ACCEPTED, cause.clone()),
        None => Finding::holds(ACCEPTED, Reason::Accepted, "the spec can be carried out"),
    }
}

/// The pod is ready while the broker accepts the agent's login, so a ready pod means that the broker works.
fn broker(observed: &Observed, stateful_set: &StatefulSet) -> Finding {
    let status = stateful_set.status.as_ref();
    let seen = status.and_then(|status| status.observed_generation) >= stateful_set.metadata.generation;
    let revisions = status.map(|status| (&status.current_revision, &status.update_revision));
    // With one replica, `currentRevision` changes when the pod of the new revision is ready.
    let current = revisions.is_some_and(|(current, update)| update.is_none() || current == update);
    let ready = status.and_then(|status| status.ready_replicas).unwrap_or_default() > 0;
    let fails = |reason, message: &str| Finding::fails(BROKER_AVAILABLE, Cause::new(reason, message));
    match (ready, seen && current, &observed.report) {
        (false, ..) => {
            let pod = format!("{}-0", name::broker(observed.gateway.metadata.name.as_deref().unwrap_or_default()));
            fails(
                Reason::BrokerNotReady,
                &format!("the broker does not accept logins yet: if that lasts, see `kubectl describe pod {pod}`"),
            )
        }
        (true, false, _) => fails(Reason::BrokerUpdating, "the broker is being brought to the current configuration"),
        (true, true, None) => fails(Reason::CredentialsNotProven, "the broker's agent has not reported a login yet"),
        (true, true, Some(_)) => Finding::holds(BROKER_AVAILABLE, Reason::BrokerAvailable, "the broker runs and has accepted a login"),
    }
}

fn dropped(gateway: &Gateway) -> Finding {
    let message = format!(
        "since it started the broker has dropped messages for clients that were away or too slow: raise limits.queuedBytesPerClient (now {}), \
         or see which client does not keep up",
        gateway.spec.limits.queued_bytes_per_client.0
    );
    Finding::holds(MESSAGES_DROPPED, Reason::QueueLimitReached, message)
}

#[cfg(test)]
#[path = "status_tests.rs"]
mod tests;
