//! Rotation of a Device's generated password. The previous password is accepted for some time. Pure.

use std::num::NonZeroU64;

use k8s_openapi::api::core::v1::Secret;
use k8s_openapi::jiff::Timestamp;
use kube::ResourceExt;

use super::endpoint;
use crate::api::Device;
use crate::api::device::DEFAULT_OVERLAP_SECONDS;
use crate::api::duration;
use crate::api::name::{PASSWORD_SINCE_ANNOTATION, PREVIOUS_PASSWORD_ANNOTATION, ROTATE_PASSWORD_ANNOTATION};
use crate::broker::credential::hash;

/// The metadata of a Secret with a generated password. Times are seconds since 1970.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Lifetime {
    /// The rotation request that was completed last.
    pub completed: Option<Box<str>>,
    /// Time of the last password change.
    pub since: i64,
    /// The previous password.
    pub previous: Option<Box<Previous>>,
    /// Digest of the address in the Secret.
    pub endpoint: Option<NonZeroU64>,
}

/// A replaced password that is still accepted.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Previous {
    /// The salted hash.
    pub hash: Box<str>,
    /// End of acceptance.
    pub until: i64,
}

impl Lifetime {
    /// Reads the metadata of a Secret. Malformed annotations are ignored.
    #[must_use]
    pub fn of(secret: &Secret) -> Self {
        let annotation = |key: &str| secret.annotations().get(key);
        let time = |text: &str| text.parse::<Timestamp>().ok().map(Timestamp::as_second);
        let created = secret.metadata.creation_timestamp.as_ref().map(|time| time.0.as_second());
        let previous = annotation(PREVIOUS_PASSWORD_ANNOTATION).and_then(|text| text.split_once(' '));
        Self {
            completed: annotation(ROTATE_PASSWORD_ANNOTATION).map(|token| token.as_str().into()),
            since: annotation(PASSWORD_SINCE_ANNOTATION).and_then(|text| time(text)).or(created).unwrap_or_default(),
            previous: previous.and_then(|(until, hash)| {
                hash::is_well_formed(hash).then_some(())?;
                Some(Box::new(Previous { hash: hash.into(), until: time(until)? }))
            }),
            endpoint: Some(endpoint::digest_of(secret)),
        }
    }
}

/// The requested and the present state of a Device's password.
#[derive(Clone, Debug, Default)]
pub struct Rotation {
    requested: Option<Box<str>>,
    every: Option<i64>,
    overlap: i64,
    lifetime: Option<Lifetime>,
    /// Whether the age limit is reached.
    due: bool,
}

impl Rotation {
    /// Stores the rotation settings of a Device.
    pub fn ask(&mut self, device: &Device) {
        let password = device.spec.authentication.password.as_ref();
        let rotation = password.and_then(|password| password.rotation.as_ref());
        self.requested = device.annotations().get(ROTATE_PASSWORD_ANNOTATION).map(|token| token.as_str().into());
        self.every = rotation.and_then(|rotation| rotation.every.as_deref()).and_then(duration::seconds);
        self.overlap = rotation.and_then(|rotation| duration::seconds(&rotation.overlap)).unwrap_or(DEFAULT_OVERLAP_SECONDS);
        self.due = false;
    }

    /// Stores the metadata of the Secret.
    pub fn observe(&mut self, lifetime: Lifetime) {
        self.lifetime = Some(lifetime);
        self.due = false;
    }

    /// The rotation request on the Device.
    #[must_use]
    pub fn requested(&self) -> Option<&str> {
        self.requested.as_deref()
    }

    /// Whether the password must be replaced now.
    #[must_use]
    pub fn is_due(&self) -> bool {
        let asked = |lifetime: &Lifetime| self.requested.is_some() && self.requested != lifetime.completed;
        self.due || self.lifetime.as_ref().is_some_and(asked)
    }

    /// How long the replaced password is accepted, in seconds.
    #[must_use]
    pub fn overlap(&self) -> i64 {
        self.overlap
    }

    /// Hash of the previous password, while it is accepted.
    #[must_use]
    pub fn previous(&self) -> Option<&str> {
        Some(&*self.lifetime.as_ref()?.previous.as_ref()?.hash)
    }

    /// Digest of the address in the Secret, if the Secret has been read.
    #[must_use]
    pub fn endpoint(&self) -> Option<NonZeroU64> {
        self.lifetime.as_ref()?.endpoint
    }

    /// The next time at which the state changes without an event. `spread` (from the uid) distributes the rotations of many Devices
    /// over the last tenth of the period.
    #[must_use]
    pub fn deadline(&self, spread: u64) -> Option<i64> {
        let lifetime = self.lifetime.as_ref()?;
        [lifetime.previous.as_ref().map(|previous| previous.until), self.age_deadline(spread)].into_iter().flatten().min()
    }

    fn age_deadline(&self, spread: u64) -> Option<i64> {
        let (lifetime, every) = (self.lifetime.as_ref()?, self.every?);
        let early = i64::try_from(spread % 1024).unwrap_or_default() * (every / 10) / 1024;
        (!self.due).then_some(lifetime.since + every - early)
    }

    /// Advances the time. Returns whether the previous password has just expired.
    pub fn advance(&mut self, now: i64, spread: u64) -> bool {
        self.due |= self.age_deadline(spread).is_some_and(|deadline| deadline <= now);
        self.expire(now)
    }

    /// Removes the previous password if it has expired. Returns whether it did.
    pub fn expire(&mut self, now: i64) -> bool {
        let Some(lifetime) = &mut self.lifetime else { return false };
        lifetime.previous.take_if(|previous| previous.until <= now).is_some()
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn device(rotation: &serde_json::Value, token: Option<&str>) -> Device {
        serde_json::from_value(json!({
            "apiVersion": "fleetwright.io/v1alpha1", "kind": "Device",
            "metadata": {"name": "d", "annotations": token.map(|token| json!({ROTATE_PASSWORD_ANNOTATION: token}))},
            "spec": {"gatewayRef": {"name": "g"}, "authentication": {"password": {"rotation": rotation}}}
        }))
        .unwrap()
    }

    #[test]
    fn a_rotation_request_is_completed_once() {
        let mut rotation = Rotation::default();
        rotation.ask(&device(&json!(null), Some("1")));
        assert!(!rotation.is_due(), "nothing is known of the Secret yet");
        rotation.observe(Lifetime::default());
        assert!(rotation.is_due());
        rotation.observe(Lifetime { completed: Some("1".into()), ..Lifetime::default() });
        assert!(!rotation.is_due());
        rotation.ask(&device(&json!(null), None));
        assert!(!rotation.is_due(), "to take the request away asks for nothing");
        rotation.ask(&device(&json!(null), Some("2")));
        assert!(rotation.is_due());
    }

    #[test]
    fn a_password_is_replaced_in_the_last_tenth_of_its_period() {
        for spread in [0, 511, 1023, u64::MAX] {
            let mut rotation = Rotation::default();
            rotation.ask(&device(&json!({"every": "10d", "overlap": "5m"}), None));
            rotation.observe(Lifetime { since: 1000, ..Lifetime::default() });
            let deadline = rotation.deadline(spread).unwrap();
            assert!((1000 + 9 * 86_400..=1000 + 10 * 86_400).contains(&deadline), "{deadline}");
            rotation.advance(deadline - 1, spread);
            assert!(!rotation.is_due());
            rotation.advance(deadline, spread);
            assert!(rotation.is_due());
            assert_eq!(rotation.deadline(spread), None, "what is due is not due again");
            assert_eq!(rotation.overlap(), 300);
        }
    }

    #[test]
    fn the_previous_password_is_accepted_until_it_expires() {
        let mut rotation = Rotation::default();
        rotation.ask(&device(&json!(null), None));
        let previous = Some(Box::new(Previous { hash: "hash".into(), until: 50 }));
        rotation.observe(Lifetime { previous, ..Lifetime::default() });
        assert_eq!(rotation.deadline(7), Some(50));
        assert!(!rotation.advance(49, 7));
        assert_eq!(rotation.previous(), Some("hash"));
        assert!(rotation.advance(50, 7));
        assert_eq!((rotation.previous(), rotation.deadline(7)), (None, None));
    }
}
