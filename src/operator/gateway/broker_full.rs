//! The condition of a Gateway whose broker is full. Pure.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;

use super::observe::Observed;
use crate::api::condition::{BROKER_FULL, Cause, Finding};
use crate::api::gateway::WhenFull;
use crate::api::name::INGEST_USERNAME_PREFIX;
use crate::api::reason::Reason;
use crate::configuration::agent::Fullness;

/// The condition, if the broker is or was full.
#[must_use]
pub fn broker_full(observed: &Observed, previous: &[Condition]) -> Option<Finding> {
    let report = observed.report.as_ref()?;
    let spec = &observed.gateway.spec;
    let (reason, what, advice) = match &report.fullness {
        Fullness::Nothing => {
            let was_full = previous.iter().any(|condition| condition.type_ == BROKER_FULL);
            return was_full.then(|| {
                Finding::fails(BROKER_FULL, Cause::new(Reason::AcceptingMessages, "the broker was full, and takes all messages again"))
            });
        }
        Fullness::Clients { clients } => {
            let message = format!(
                "devices exceed their own limits (spec.limits.clients) and are refused; no other client is affected: {clients}. To do: check \
                 these devices, or raise the limit"
            );
            return Some(Finding::fails(BROKER_FULL, Cause::new(Reason::ClientsLimited, message)));
        }
        Fullness::Queue { session } => {
            let pipeline = session.strip_prefix(INGEST_USERNAME_PREFIX).unwrap_or(session);
            let bound = &spec.limits.queued_bytes_per_client.0;
            (
                Reason::QueueFull,
                format!("as much waits for the Pipeline {pipeline} as limits.queuedBytesPerClient allows ({bound}), and what it reads"),
                format!("see whether its workers and its database are there (`kubectl describe fwp {pipeline}`), or raise the limit"),
            )
        }
        Fullness::Memory => {
            let limit = spec.resources.limits.get("memory").map_or("none", |limit| limit.0.as_str());
            (
                Reason::MemoryFull,
                format!("the broker has used up its share of resources.limits.memory ({limit}), and what comes in"),
                "see which Pipeline or client does not take what waits for it, or raise the limit".to_owned(),
            )
        }
        Fullness::Disk => (
            Reason::DiskFull,
            format!(
                "the broker's volume (storage.size {}) is full but for what the broker needs itself, and what comes in",
                spec.storage.size.0
            ),
            "see which Pipeline or client does not take what waits for it, or expand the volume claim, if its class can".to_owned(),
        ),
    };
    let consequence = match spec.limits.when_full {
        WhenFull::Refuse => {
            "is refused: to clients of MQTT 5 with each message (reason code 0x97), to others by ending their connection without an \
             acknowledgement"
        }
        WhenFull::Slow => "is held up: connections are ended without an acknowledgement, so that clients send it again later",
    };
    Some(Finding::holds(BROKER_FULL, reason, format!("{what} {consequence}. To do: {advice}")))
}
