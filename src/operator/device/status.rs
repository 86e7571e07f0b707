//! The status of a Device: pure.

use super::record::{PasswordState, Record};
use super::twin::Twin;
use crate::api::DeviceStatus;
use crate::api::condition::{ACCEPTED, CREDENTIALS_LIVE, Cause, Finding, Readiness, conditions};
use crate::api::device::CredentialsSecret;
use crate::runtime::error::chain;

/// What a Device's status depends on, beside the Device.
#[allow(clippy::struct_excessive_bools, reason = "each is a fact of its own, and all combinations occur")]
#[derive(Clone, Copy, Debug)]
pub struct Surroundings<'a> {
    /// Name of the Gateway that the Device names.
    pub gateway: &'a str,

    /// Whether that Gateway is there.
    pub gateway_exists: bool,

    /// Whether the broker has proven to hold the Device as it is now.
    pub proven: bool,

    /// Whether the operator is logged in at the broker, so that a desired state is kept there in a moment.
    pub linked: bool,

    /// Whether the wait for the broker has been long enough to be worth a write.
    pub waited: bool,
}

/// The status of a Device, or `None` where there is nothing to say yet: a Device that becomes ready in a moment gets one
/// status, not two.
#[must_use]
pub fn status(device: &str, record: &Record, around: Surroundings<'_>) -> Option<DeviceStatus> {
    let revision = record.revision();
    let live = revision.is_some() && (around.proven || record.written.revision.as_deref() == revision);
    let (mut findings, readiness) = verdict(device, record, around, live)?;
    // In a moment the broker will have confirmed the desired state: one status then, and not two.
    if live && around.linked && !around.waited && record.twin().is_some_and(Twin::awaits_broker) {
        return None;
    }
    findings.extend(record.twin().and_then(|twin| twin.synced(device, around.gateway)));
    let (desired, reported) = record.twin().map(Twin::status).unwrap_or_default();
    Some(DeviceStatus {
        observed_generation: record.generation,
        username: Some(device.to_owned()),
        credentials_secret: Some(CredentialsSecret {
            name: record.secret_name(device),
            revision: revision.filter(|_| live).map(str::to_owned),
        }),
        // Another writer's: what is written here leaves it alone.
        connection: None,
        desired,
        reported,
        conditions: conditions(&record.written.conditions(), record.generation, &findings, &readiness),
    })
}

fn verdict(device: &str, record: &Record, around: Surroundings<'_>, live: bool) -> Option<(Vec<Finding>, Readiness)> {
    let gateway = around.gateway;
    if !around.gateway_exists {
        let message =
            format!("there is no Gateway {gateway} in this namespace: create it, or create this Device again with another gatewayRef");
        return Some(refused(Cause::new("GatewayNotFound", message)));
    }
    if record.enabled
        && let PasswordState::Missing(cause, _) = record.password()
    {
        return Some(refused(cause.as_ref().clone()));
    }
    if let Err(error) = record.entry(device) {
        let cause = Cause::new("InvalidAuthorization", chain(&error));
        return Some((vec![Finding::fails(ACCEPTED, cause.clone())], Readiness::Stalled(cause)));
    }
    if let Some(cause) = record.twin().and_then(Twin::refusal) {
        return Some((vec![Finding::fails(ACCEPTED, cause.clone())], Readiness::Stalled(cause)));
    }
    let accepted = Finding::holds(ACCEPTED, "Accepted", "the spec can be carried out");
    if let PasswordState::Failing(cause) = record.password() {
        return Some((
            vec![accepted, Finding::fails(CREDENTIALS_LIVE, cause.as_ref().clone())],
            Readiness::Reconciling(cause.as_ref().clone()),
        ));
    }
    if live && record.enabled {
        let message = format!("the broker of Gateway {gateway} has proven that it accepts this credential");
        let cause = Cause::new("Proven", message.clone());
        return Some((vec![accepted, Finding::holds(CREDENTIALS_LIVE, "Proven", message)], Readiness::Ready(cause)));
    }
    if live {
        let cause = Cause::new("Disabled", format!("the device is disabled, and the broker of Gateway {gateway} refuses it"));
        return Some((vec![accepted, Finding::fails(CREDENTIALS_LIVE, cause.clone())], Readiness::Ready(cause)));
    }
    let message = format!("the broker of Gateway {gateway} has not proven yet that it holds this credential: see the Gateway's conditions");
    let cause = Cause::new("AwaitingBroker", message);
    around.waited.then(|| (vec![accepted, Finding::fails(CREDENTIALS_LIVE, cause.clone())], Readiness::Reconciling(cause)))
}

fn refused(cause: Cause) -> (Vec<Finding>, Readiness) {
    (vec![Finding::fails(ACCEPTED, cause.clone())], Readiness::Reconciling(cause))
}
