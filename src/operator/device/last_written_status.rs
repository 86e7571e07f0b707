//! The digest of the status that the operator last wrote for a Device.

use std::hash::{DefaultHasher, Hash, Hasher};

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use k8s_openapi::jiff::Timestamp;
use kube::ResourceExt;

use super::connection::CompactConnection;
use crate::api::condition::{ACCEPTED, CREDENTIALS_LIVE, READY, RECONCILING, STALLED, SYNCED};
use crate::api::{Device, DeviceStatus};

/// Types of a Device's conditions.
const TYPES: [&str; 6] = [ACCEPTED, CREDENTIALS_LIVE, SYNCED, READY, RECONCILING, STALLED];

/// The parts of the last written status that show whether another write is needed, and the transition times.
#[derive(Clone, Debug, Default)]
pub struct LastWrittenStatus {
    digest: u64,
    /// Index of the type in [`TYPES`], whether it is True, and the transition time in seconds since 1970 (the precision of the API
    /// server). Compact, because each Device has several.
    conditions: Box<[(u8, bool, u32)]>,
    /// The revision that the broker has proven, in the status.
    pub revision: Option<Box<str>>,
    /// Whether `Ready` is True in the status.
    pub ready: bool,
    /// The connection state in the status.
    pub connection: Option<CompactConnection>,
    resource_version: u64,
}

impl LastWrittenStatus {
    /// Stores the status of an object and returns it, unless it is older than the stored one.
    pub fn observe(&mut self, device: &Device) -> Option<DeviceStatus> {
        // Resource versions are ordered numbers (KEP-5504). The watch may lag behind the operator's own writes.
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

    /// Whether the status is equal to the last written one, apart from times.
    #[must_use]
    pub fn equals(&self, status: &DeviceStatus) -> bool {
        self.digest == digest(status)
    }

    /// The types, statuses and transition times of the written conditions.
    #[must_use]
    pub fn conditions(&self) -> Vec<Condition> {
        self.conditions
            .iter()
            .map(|(type_, holds, since)| Condition {
                type_: TYPES[usize::from(*type_)].to_owned(),
                status: if *holds { "True" } else { "False" }.to_owned(),
                // Every u32 is a valid timestamp.
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
    // The PEM text follows from the serial number.
    let second = |time: &Option<Time>| time.as_ref().map(|time| time.0.as_second());
    let certificate = status.certificate.as_ref();
    certificate
        .map(|one| (&one.serial_number, second(&one.not_after), second(&one.renewal_time), &one.issued_for, &one.revision))
        .hash(&mut hasher);
    status.desired.as_ref().map(|desired| (desired.generation, &desired.revision)).hash(&mut hasher);
    // A map that was read from JSON can be serialized.
    let reported = status.reported.as_ref();
    reported.map(|reported| (reported.generation, serde_json::to_string(&reported.state).unwrap_or_default())).hash(&mut hasher);
    for condition in &status.conditions {
        (&condition.type_, &condition.status, &condition.reason, &condition.message, condition.observed_generation).hash(&mut hasher);
    }
    hasher.finish()
}
