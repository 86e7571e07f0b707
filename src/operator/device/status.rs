//! The status of a Device. Pure.

use super::certificate::{Authority, Certificate};
use super::record::{DeviceRecord, PasswordSource, PasswordState};
use super::twin::Twin;
use crate::api::condition::{ACCEPTED, CREDENTIALS_LIVE, Cause, Finding, Readiness, conditions};
use crate::api::device::CredentialsSecret;
use crate::api::reason::Reason;
use crate::api::{DeviceStatus, name};
use crate::runtime::error::chain;

/// The inputs of a Device's status apart from the Device.
#[allow(clippy::struct_excessive_bools, reason = "independent facts in all combinations")]
#[derive(Clone, Copy, Debug)]
pub struct StatusContext<'a> {
    /// Name of the Gateway that the Device names.
    pub gateway: &'a str,

    /// Whether that Gateway exists.
    pub gateway_exists: bool,

    /// Whether the broker is external.
    pub external: bool,

    /// The authority for client certificates.
    pub authority: &'a Authority,

    /// Whether the current state of the Device was verified at the broker.
    pub proven: bool,

    /// Whether the operator is connected to the broker, so that it can publish the desired state.
    pub broker_connected: bool,

    /// Whether the Device has waited for the broker long enough for a status write.
    pub waited: bool,
}

/// The status of a Device, or `None` if the Device is about to become ready: it then needs one status write, not two.
#[must_use]
pub fn status(device: &str, record: &DeviceRecord, context: StatusContext<'_>) -> Option<DeviceStatus> {
    let revision = record.revision();
    // A Device stays ready while an external broker is unreachable, as a verified credential stays verified.
    let live = if context.external {
        context.broker_connected || record.last_written.ready
    } else {
        revision.is_some() && !record.excluded && (context.proven || record.last_written.revision.as_deref() == revision)
    };
    let (mut findings, readiness) =
        if context.external && context.gateway_exists { external(record, context, live)? } else { verdict(device, record, context, live)? };
    // The broker is about to confirm the desired state: one status write, not two.
    if live && context.broker_connected && !context.waited && record.twin().is_some_and(Twin::awaits_broker) {
        return None;
    }
    findings.extend(record.twin().and_then(|twin| twin.synced(device, context.gateway)));
    let (desired, reported) = record.twin().map(Twin::status).unwrap_or_default();
    Some(DeviceStatus {
        observed_generation: record.generation,
        username: (!context.external).then(|| device.to_owned()),
        credentials_secret: record
            .secret_name(device)
            .filter(|_| !context.external)
            .map(|name| CredentialsSecret { name, revision: revision.filter(|_| live).map(str::to_owned) }),
        certificate: record.certificate().and_then(|certificate| certificate.status(revision.filter(|_| live))),
        // Another field manager writes it.
        connection: None,
        desired,
        reported,
        conditions: conditions(&record.last_written.conditions(), record.generation, &findings, &readiness),
    })
}

fn verdict(device: &str, record: &DeviceRecord, context: StatusContext<'_>, live: bool) -> Option<(Vec<Finding>, Readiness)> {
    let gateway = context.gateway;
    if !context.gateway_exists {
        let message =
            format!("Gateway {gateway} does not exist in this namespace: create it, or create this Device again with another gatewayRef");
        return Some(refused(Cause::new(Reason::GatewayNotFound, message)));
    }
    if let Some(certificate) = record.certificate()
        && let Some(verdict) = without_certificate(device, record, certificate, context)
    {
        return verdict;
    }
    if record.enabled
        && record.source != PasswordSource::Absent
        && let PasswordState::Missing(cause, _) = record.password()
    {
        return Some(refused(cause.as_ref().clone()));
    }
    if let Err(error) = record.entry(device) {
        let cause = Cause::new(Reason::InvalidAuthorization, chain(&error));
        return Some(stalled(cause));
    }
    if let Some(cause) = record.twin().and_then(Twin::refusal) {
        return Some(stalled(cause));
    }
    let accepted = Finding::holds(ACCEPTED, Reason::Accepted, "the spec is valid");
    if record.excluded && record.enabled {
        let message = format!(
            "the credentials of the devices of Gateway {gateway} exceed what the operator can store, and this one is among the largest: shorten \
             spec.authorization, or create the Device at another Gateway"
        );
        let cause = Cause::new(Reason::CredentialsFull, message);
        return Some((vec![accepted, Finding::fails(CREDENTIALS_LIVE, cause.clone())], Readiness::Reconciling(cause)));
    }
    if let PasswordState::Failing(cause) = record.password() {
        return Some((
            vec![accepted, Finding::fails(CREDENTIALS_LIVE, cause.as_ref().clone())],
            Readiness::Reconciling(cause.as_ref().clone()),
        ));
    }
    if live && record.enabled {
        let message = format!("the broker of Gateway {gateway} has this credential");
        let refusal = record.certificate().and_then(Certificate::refusal);
        let addition = refusal.map(|refusal| format!("; its certificate is not renewed: {}", refusal.cause.message)).unwrap_or_default();
        let cause = Cause::new(Reason::Proven, format!("{message}{addition}"));
        return Some((vec![accepted, Finding::holds(CREDENTIALS_LIVE, Reason::Proven, message)], Readiness::Ready(cause)));
    }
    if live {
        let cause = Cause::new(Reason::Disabled, format!("the device is disabled, and the broker of Gateway {gateway} refuses it"));
        return Some((vec![accepted, Finding::fails(CREDENTIALS_LIVE, cause.clone())], Readiness::Ready(cause)));
    }
    let message = format!("this credential is not verified at the broker of Gateway {gateway} yet: see the Gateway's conditions");
    let cause = Cause::new(Reason::AwaitingBroker, message);
    context.waited.then(|| (vec![accepted, Finding::fails(CREDENTIALS_LIVE, cause.clone())], Readiness::Reconciling(cause)))
}

/// The conditions of a Device with an external broker. The operator does not manage its credentials.
fn external(record: &DeviceRecord, context: StatusContext<'_>, reached: bool) -> Option<(Vec<Finding>, Readiness)> {
    let gateway = context.gateway;
    if let Some(cause) = record.twin().and_then(Twin::refusal) {
        return Some(stalled(cause));
    }
    if record.certificate().is_some() {
        let message = format!(
            "the broker of Gateway {gateway} is external, and the operator signs no certificates for it: leave authentication.x509 out, and \
             get the certificate from an authority that this broker trusts"
        );
        let cause = Cause::new(Reason::NoClientAuthority, message);
        return Some(stalled(cause));
    }
    let managed =
        format!("the broker of Gateway {gateway} is external: that broker manages the credentials and access rights of this device");
    let findings = vec![
        Finding::holds(ACCEPTED, Reason::Accepted, "the spec is valid"),
        Finding::unknown(CREDENTIALS_LIVE, Cause::new(Reason::ManagedElsewhere, managed)),
    ];
    let readiness = match (reached, record.enabled) {
        (true, true) => {
            Readiness::Ready(Cause::new(Reason::BrokerReached, format!("the operator has reached the broker of Gateway {gateway}")))
        }
        (true, false) => {
            let message = format!(
                "the device is disabled: Pipelines refuse its messages. The broker of Gateway {gateway} is external: disable the device there, too"
            );
            Readiness::Ready(Cause::new(Reason::Disabled, message))
        }
        (false, _) if context.waited => {
            let message = format!("the operator has not reached the broker of Gateway {gateway} yet: see the Gateway's conditions");
            Readiness::Reconciling(Cause::new(Reason::AwaitingBroker, message))
        }
        (false, _) => return None,
    };
    Some((findings, readiness))
}

/// The conditions of a Device without the certificate that it requested. `Some(None)` means that no status is written yet.
#[allow(clippy::option_option, reason = "whether there is a verdict, and the verdict, which may be to wait")]
fn without_certificate(
    device: &str,
    record: &DeviceRecord,
    certificate: &Certificate,
    context: StatusContext<'_>,
) -> Option<Option<(Vec<Finding>, Readiness)>> {
    let gateway = context.gateway;
    if let Err(error) = certificate.key() {
        let cause = Cause::new(error.reason(), error.to_string());
        return Some(Some(stalled(cause)));
    }
    if !record.enabled {
        return None;
    }
    let failing = |cause: Cause| {
        let accepted = Finding::holds(ACCEPTED, Reason::Accepted, "the spec is valid");
        (vec![accepted, Finding::fails(CREDENTIALS_LIVE, cause.clone())], Readiness::Reconciling(cause))
    };
    let missing = certificate.is_missing();
    match context.authority {
        Authority::Usable(_) if missing && let Some(refusal) = certificate.refusal() => {
            let cause = refusal.cause.clone();
            Some(Some(if refusal.is_final { stalled(cause) } else { failing(cause) }))
        }
        Authority::Undeclared => {
            let message = format!(
                "Gateway {gateway} declares no authority for client certificates: set its spec.clientAuthority, or leave authentication.x509 out"
            );
            Some(Some(refused(Cause::new(Reason::NoClientAuthority, message))))
        }
        Authority::Unusable if missing => {
            let message = format!(
                "the authority of Gateway {gateway} cannot sign, and the device has no valid certificate: see the condition \
                 ClientAuthorityValid there"
            );
            Some(Some(failing(Cause::new(Reason::ClientAuthorityUnusable, message))))
        }
        _ if certificate.is_expired() => {
            let message = format!(
                "the certificate has expired, and the authority of Gateway {gateway} has issued no later one: renew that authority or, \
                 where it is an issuer, see the CertificateRequest {}",
                name::certificate_request(device)
            );
            Some(Some(failing(Cause::new(Reason::CertificateExpired, message))))
        }
        _ if !certificate.is_issued() => {
            let message = format!(
                "the authority of Gateway {gateway} has not issued the certificate yet: see the Gateway's conditions, and where that names an \
                 issuer, the CertificateRequest {}",
                name::certificate_request(device)
            );
            Some(context.waited.then(|| failing(Cause::new(Reason::AwaitingCertificate, message))))
        }
        _ => None,
    }
}

fn stalled(cause: Cause) -> (Vec<Finding>, Readiness) {
    (vec![Finding::fails(ACCEPTED, cause.clone())], Readiness::Stalled(cause))
}

fn refused(cause: Cause) -> (Vec<Finding>, Readiness) {
    (vec![Finding::fails(ACCEPTED, cause.clone())], Readiness::Reconciling(cause))
}
