//! The status of a Device: pure.

use super::certificate::{Authority, Certificate};
use super::record::{PasswordSource, PasswordState, Record};
use super::twin::Twin;
use crate::api::condition::{ACCEPTED, CREDENTIALS_LIVE, Cause, Finding, Readiness, conditions};
use crate::api::device::CredentialsSecret;
use crate::api::reason::Reason;
use crate::api::{DeviceStatus, name};
use crate::runtime::error::chain;

/// What a Device's status depends on, beside the Device.
#[allow(clippy::struct_excessive_bools, reason = "each is a fact of its own, and all combinations occur")]
#[derive(Clone, Copy, Debug)]
pub struct Surroundings<'a> {
    /// Name of the Gateway that the Device names.
    pub gateway: &'a str,

    /// Whether that Gateway is there.
    pub gateway_exists: bool,

    /// Whether the broker of that Gateway runs elsewhere.
    pub external: bool,

    /// Who signs the certificates of its devices.
    pub authority: &'a Authority,

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
    // Who was reached once stays so while the broker is away, as a credential stays proven.
    let live = if around.external {
        around.linked || record.written.ready
    } else {
        revision.is_some() && (around.proven || record.written.revision.as_deref() == revision)
    };
    let (mut findings, readiness) =
        if around.external && around.gateway_exists { external(record, around, live)? } else { verdict(device, record, around, live)? };
    // In a moment the broker will have confirmed the desired state: one status then, and not two.
    if live && around.linked && !around.waited && record.twin().is_some_and(Twin::awaits_broker) {
        return None;
    }
    findings.extend(record.twin().and_then(|twin| twin.synced(device, around.gateway)));
    let (desired, reported) = record.twin().map(Twin::status).unwrap_or_default();
    Some(DeviceStatus {
        observed_generation: record.generation,
        username: (!around.external).then(|| device.to_owned()),
        credentials_secret: record
            .secret_name(device)
            .filter(|_| !around.external)
            .map(|name| CredentialsSecret { name, revision: revision.filter(|_| live).map(str::to_owned) }),
        certificate: record.certificate().and_then(|certificate| certificate.status(revision.filter(|_| live))),
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
        return Some(refused(Cause::new(Reason::GatewayNotFound, message)));
    }
    if let Some(certificate) = record.certificate()
        && let Some(verdict) = without_certificate(device, record, certificate, around)
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
    let accepted = Finding::holds(ACCEPTED, Reason::Accepted, "the spec can be carried out");
    if let PasswordState::Failing(cause) = record.password() {
        return Some((
            vec![accepted, Finding::fails(CREDENTIALS_LIVE, cause.as_ref().clone())],
            Readiness::Reconciling(cause.as_ref().clone()),
        ));
    }
    if live && record.enabled {
        let message = format!("the broker of Gateway {gateway} has proven that it accepts this credential");
        let refusal = record.certificate().and_then(Certificate::refusal);
        let besides = refusal.map(|refusal| format!("; but its certificate is not renewed: {}", refusal.cause.message)).unwrap_or_default();
        let cause = Cause::new(Reason::Proven, format!("{message}{besides}"));
        return Some((vec![accepted, Finding::holds(CREDENTIALS_LIVE, Reason::Proven, message)], Readiness::Ready(cause)));
    }
    if live {
        let cause = Cause::new(Reason::Disabled, format!("the device is disabled, and the broker of Gateway {gateway} refuses it"));
        return Some((vec![accepted, Finding::fails(CREDENTIALS_LIVE, cause.clone())], Readiness::Ready(cause)));
    }
    let message = format!("the broker of Gateway {gateway} has not proven yet that it holds this credential: see the Gateway's conditions");
    let cause = Cause::new(Reason::AwaitingBroker, message);
    around.waited.then(|| (vec![accepted, Finding::fails(CREDENTIALS_LIVE, cause.clone())], Readiness::Reconciling(cause)))
}

/// Of a device whose broker runs elsewhere, with credentials that are no concern of ours.
fn external(record: &Record, around: Surroundings<'_>, reached: bool) -> Option<(Vec<Finding>, Readiness)> {
    let gateway = around.gateway;
    if let Some(cause) = record.twin().and_then(Twin::refusal) {
        return Some(stalled(cause));
    }
    if record.certificate().is_some() {
        let message = format!(
            "the broker of Gateway {gateway} runs elsewhere, and nobody here signs certificates for it: leave authentication.x509 out, and have \
             the certificate signed by an authority that this broker trusts"
        );
        let cause = Cause::new(Reason::NoClientAuthority, message);
        return Some(stalled(cause));
    }
    let elsewhere = format!(
        "the broker of Gateway {gateway} runs elsewhere: with what this device logs in there, and what it may do, is left to that broker"
    );
    let findings = vec![
        Finding::holds(ACCEPTED, Reason::Accepted, "the spec can be carried out"),
        Finding::unknown(CREDENTIALS_LIVE, Cause::new(Reason::ManagedElsewhere, elsewhere)),
    ];
    let readiness = match (reached, record.enabled) {
        (true, true) => {
            Readiness::Ready(Cause::new(Reason::BrokerReached, format!("the operator has reached the broker of Gateway {gateway}")))
        }
        (true, false) => {
            let message = format!(
                "the device is disabled: Pipelines refuse what it sends; the broker of Gateway {gateway} runs elsewhere, and has to be told there"
            );
            Readiness::Ready(Cause::new(Reason::Disabled, message))
        }
        (false, _) if around.waited => {
            let message = format!("the operator has not reached the broker of Gateway {gateway} yet: see the Gateway's conditions");
            Readiness::Reconciling(Cause::new(Reason::AwaitingBroker, message))
        }
        (false, _) => return None,
    };
    Some((findings, readiness))
}

/// What there is to say of a Device that has not got the certificate that it asks for; `Some(None)` is: nothing yet.
#[allow(clippy::option_option, reason = "whether there is a verdict, and the verdict, which may be to wait")]
fn without_certificate(
    device: &str,
    record: &Record,
    certificate: &Certificate,
    around: Surroundings<'_>,
) -> Option<Option<(Vec<Finding>, Readiness)>> {
    let gateway = around.gateway;
    if let Err(error) = certificate.key() {
        let cause = Cause::new(error.reason(), error.to_string());
        return Some(Some(stalled(cause)));
    }
    if !record.enabled {
        return None;
    }
    let failing = |cause: Cause| {
        let accepted = Finding::holds(ACCEPTED, Reason::Accepted, "the spec can be carried out");
        (vec![accepted, Finding::fails(CREDENTIALS_LIVE, cause.clone())], Readiness::Reconciling(cause))
    };
    let missing = certificate.is_missing();
    match around.authority {
        Authority::Usable(_) if missing && let Some(refusal) = certificate.refusal() => {
            let cause = refusal.cause.clone();
            Some(Some(if refusal.is_final { stalled(cause) } else { failing(cause) }))
        }
        Authority::Undeclared => {
            let message = format!(
                "Gateway {gateway} names no authority that signs certificates: set its spec.clientAuthority, or leave authentication.x509 out"
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
                "the certificate has expired, and the authority of Gateway {gateway} has given none that lasts longer: renew that authority or, \
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
            Some(around.waited.then(|| failing(Cause::new(Reason::AwaitingCertificate, message))))
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
