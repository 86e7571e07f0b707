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
    let (reason, problem, advice) = match &report.fullness {
        Fullness::Nothing => {
            let was_full = previous.iter().any(|condition| condition.type_ == BROKER_FULL);
            return was_full.then(|| {
                Finding::fails(BROKER_FULL, Cause::new(Reason::AcceptingMessages, "the broker was full and accepts all messages again"))
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
                format!("the queue of Pipeline {pipeline} has reached limits.queuedBytesPerClient ({bound})"),
                format!("check its workers and its database (`kubectl describe fwp {pipeline}`), or raise the limit"),
            )
        }
        Fullness::Memory => {
            let limit = spec.resources.limits.get("memory").map_or("none", |limit| limit.0.as_str());
            (
                Reason::MemoryFull,
                format!("the broker has used up its share of resources.limits.memory ({limit})"),
                "check which Pipeline or client does not fetch its messages, or raise the limit".to_owned(),
            )
        }
        Fullness::Disk => (
            Reason::DiskFull,
            format!("the broker's volume (storage.size {}) is full except for the broker's reserve", spec.storage.size.0),
            "check which Pipeline or client does not fetch its messages, or expand the volume claim if its StorageClass supports this"
                .to_owned(),
        ),
    };
    let consequence = match spec.limits.when_full {
        WhenFull::Refuse => {
            "it refuses each message of MQTT 5 clients with reason code 0x97, and disconnects other clients without an acknowledgement"
        }
        WhenFull::Slow => "it disconnects publishers without an acknowledgement, and their libraries send the message again later",
    };
    let affected = if reason == Reason::QueueFull { "For the messages of this Pipeline" } else { "For all messages" };
    Some(Finding::holds(BROKER_FULL, reason, format!("{problem}. {affected} {consequence}. To do: {advice}")))
}
