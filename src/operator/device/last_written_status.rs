//! What the operator keeps of the status of a Device that it wrote.

use std::hash::{DefaultHasher, Hash, Hasher};

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use k8s_openapi::jiff::Timestamp;
use kube::ResourceExt;

use super::connection::CompactConnection;
use crate::api::condition::{ACCEPTED, CREDENTIALS_LIVE, READY, RECONCILING, STALLED, SYNCED};
use crate::api::{Device, DeviceStatus};

/// Types of a Device's conditions.
const TYPES: [&str; 6] = [ACCEPTED, CREDENTIALS_LIVE, SYNCED, READY, RECONCILING, STALLED];

/// What matters of a status that was written: enough to tell whether another write is needed, and to keep the transition
/// times.
#[derive(Clone, Debug, Default)]
pub struct LastWrittenStatus {
    digest: u64,
    /// By the place of the type in [`TYPES`], whether it holds, and since when, in seconds since 1970: the API server keeps no
    /// more, and there is one for each condition of each Device.
    conditions: Box<[(u8, bool, u32)]>,
    /// What the broker has proven, as the status says.
    pub revision: Option<Box<str>>,
    /// Whether the status says `Ready`.
    pub ready: bool,
    /// Whether the device is connected, as the status says.
    pub connection: Option<CompactConnection>,
    resource_version: u64,
}

impl LastWrittenStatus {
    /// Takes over the status of an object and returns it, unless it is older than what is known.
    pub fn observe(&mut self, device: &Device) -> Option<DeviceStatus> {
        // Resource versions are ordered numbers (KEP-5504); the watch may lag behind our own writes.
        let version = device.resource_version().and_then(|version| version.parse().ok()).unwrap_or(u64::MAX);
        if version < self.resource_version {
            return None;
        }
        let status = device.status.clone().unwrap_or_default();
        self.resource_version = version;
        self.connection = status.connection.as_ref().map(CompactConnection::of);
        self.digest = digest(&status);
        let secret = status.credentials_secret.as_ref().and_then(|secret| secret.revision.as_deref());
        let certificate = || status.certificate.as_ref().and_then(|certificate| certificate.revision.as_deref());
        self.revision = secret.or_else(certificate).map(Into::into);
        self.ready = status.conditions.iter().any(|condition| condition.type_ == READY && condition.status == "True");
        self.conditions = status
            .conditions
            .iter()
            .filter_map(|condition| {
                let type_ = TYPES.iter().position(|known| *known == condition.type_)?;
                let since = u32::try_from(condition.last_transition_time.0.as_second().max(0)).unwrap_or(u32::MAX);
                Some((u8::try_from(type_).ok()?, condition.status == "True", since))
            })
            .collect();
        Some(status)
    }

    /// Whether the status, times aside, is what was written.
    #[must_use]
    pub fn equals(&self, status: &DeviceStatus) -> bool {
        self.digest == digest(status)
    }

    /// The conditions that were written, for their types, statuses and times alone.
    #[must_use]
    pub fn conditions(&self) -> Vec<Condition> {
        self.conditions
            .iter()
            .map(|(type_, holds, since)| Condition {
                type_: TYPES[usize::from(*type_)].to_owned(),
                status: if *holds { "True" } else { "False" }.to_owned(),
                // Every u32 is a time that there is.
                last_transition_time: Time(Timestamp::from_second(i64::from(*since)).unwrap_or_default()),
                message: String::new(),
                observed_generation: None,
                reason: String::new(),
            })
            .collect()
    }
}

fn digest(status: &DeviceStatus) -> u64 {
    let mut hasher = DefaultHasher::new();
    status.observed_generation.hash(&mut hasher);
    status.username.hash(&mut hasher);
    if let Some(secret) = &status.credentials_secret {
        (&secret.name, &secret.revision).hash(&mut hasher);
    }
    // The certificate itself follows from its serial number.
    let second = |time: &Option<Time>| time.as_ref().map(|time| time.0.as_second());
    let certificate = status.certificate.as_ref();
    certificate
        .map(|one| (&one.serial_number, second(&one.not_after), second(&one.renewal_time), &one.issued_for, &one.revision))
        .hash(&mut hasher);
    status.desired.as_ref().map(|desired| (desired.generation, &desired.revision)).hash(&mut hasher);
    // A map that came from JSON can always be written.
    let reported = status.reported.as_ref();
    reported.map(|reported| (reported.generation, serde_json::to_string(&reported.state).unwrap_or_default())).hash(&mut hasher);
    for condition in &status.conditions {
        (&condition.type_, &condition.status, &condition.reason, &condition.message, condition.observed_generation).hash(&mut hasher);
    }
    hasher.finish()
}
