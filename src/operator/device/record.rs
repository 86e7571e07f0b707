//! What the operator keeps of one Device: a few hundred bytes, for there are many.

use std::collections::BTreeMap;
use std::hash::{DefaultHasher, Hash, Hasher};

use kube::ResourceExt;

use super::certificate::Certificate;
use super::connection::CompactConnection;
use super::last_written_status::LastWrittenStatus;
use super::rotation::{Lifetime, Rotation};
use super::twin::Twin;
use crate::api::condition::Cause;
use crate::api::device::{Acl, Authentication};
use crate::api::{Device, is_reconciliation_paused, name};
use crate::broker::credential::KeyDigest;
use crate::broker::credential::entry::{Entry, EntryError};
use crate::broker::credential::hash::{GENERATED_ITERATIONS, GIVEN_ITERATIONS};

/// Revision of what the broker holds for a disabled Device: nothing.
const DISABLED_REVISION: &str = "disabled";

/// Where the password of a Device comes from.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum PasswordSource {
    /// From the Secret that the operator generated.
    Generated,

    /// From a Secret of the user.
    Given {
        /// Name of the Secret.
        secret: Box<str>,
        /// Key of the Secret.
        key: Box<str>,
    },

    /// It has none: certificates alone say who it is.
    Absent,
}

impl PasswordSource {
    fn of(authentication: &Authentication) -> Self {
        let secret = authentication.password.as_ref().and_then(|password| password.secret_ref.as_ref());
        match secret {
            Some(reference) => Self::Given { secret: reference.name.as_str().into(), key: reference.key.as_str().into() },
            None if authentication.password.is_none() && authentication.x509.is_some() => Self::Absent,
            None => Self::Generated,
        }
    }
}

/// What is known of the password of a Device.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum PasswordState {
    /// Nobody has looked yet.
    Unknown,

    /// The Secret with a generated password could not be created so far, for this reason.
    Failing(Box<Cause>),

    /// The Secret has changed and has to be read again; until then the hash that was known goes on.
    Stale(Box<str>),

    /// Its salted hash, as Mosquitto writes it.
    Hashed(Box<str>),

    /// There is none to be had, for this reason; with the hash that was last known, which goes on being accepted.
    Missing(Box<Cause>, Option<Box<str>>),
}

impl PasswordState {
    /// The hash to hand to the broker.
    #[must_use]
    pub fn hash(&self) -> Option<&str> {
        match self {
            Self::Hashed(hash) | Self::Stale(hash) | Self::Missing(_, Some(hash)) => Some(hash),
            Self::Unknown | Self::Failing(_) | Self::Missing(_, None) => None,
        }
    }
}

/// What the operator keeps of one Device.
#[allow(clippy::struct_excessive_bools, reason = "each is a fact of its own, and all combinations occur")]
#[derive(Clone, Debug)]
pub struct DeviceRecord {
    /// `metadata.uid`.
    pub uid: Box<str>,
    /// `metadata.generation`.
    pub generation: i64,
    /// Whether the device may connect.
    pub enabled: bool,
    /// Whether the operator is told to leave the Device alone.
    pub paused: bool,
    /// Where the password comes from.
    pub source: PasswordSource,
    /// When a generated password is replaced.
    pub rotation: Rotation,
    /// What is known of the password. Changes by [`DeviceRecord::set_password`].
    password: PasswordState,
    /// Its certificate, where it asks for one.
    certificate: Option<Box<Certificate>>,
    /// Revision of what the broker is to hold, or `None` where that is not known yet. Kept, for it is compared for all
    /// devices of a Gateway at each proof.
    revision: Option<Box<str>>,
    /// Access beyond the device's own topics.
    pub acls: Box<[Acl]>,
    /// For the registry.
    pub attributes: BTreeMap<String, String>,
    /// The status as it stands at the API server.
    pub last_written: LastWrittenStatus,
    /// Where the device stands as its broker says, as far as it has said so.
    pub seen: Option<CompactConnection>,
    /// Desired and reported state, where there is either.
    twin: Option<Box<Twin>>,
    /// Number of the first plan of shards that holds the Device as it is now.
    pub planned: Option<u64>,
    /// Whether the Device was seen since [`super::index::DeviceIndex::listing_devices`]. A set of names would be some 25 MB for 100,000
    /// Devices, if only for a moment.
    pub listed: bool,
    /// Whether the Secret with its generated password was seen since [`super::index::DeviceIndex::listing_secrets`].
    pub secret_listed: bool,
    /// Whether the Secret with a generated password exists, also if another source is used now.
    pub has_generated_secret: bool,
    /// Whether a CertificateRequest of the Device exists.
    pub has_certificate_request: bool,
}

impl DeviceRecord {
    /// A Device as it is seen for the first time.
    #[must_use]
    pub fn new(device: &Device) -> Self {
        let mut record = Self {
            uid: device.uid().unwrap_or_default().into(),
            generation: 0,
            enabled: false,
            paused: false,
            source: PasswordSource::Generated,
            rotation: Rotation::default(),
            password: PasswordState::Unknown,
            certificate: None,
            revision: None,
            acls: Box::default(),
            attributes: BTreeMap::new(),
            last_written: LastWrittenStatus::default(),
            seen: None,
            twin: None,
            planned: None,
            listed: false,
            secret_listed: false,
            has_generated_secret: false,
            has_certificate_request: false,
        };
        record.update(device);
        record
    }

    /// Takes over a later state of the same Device. Returns whether what the broker holds must change.
    pub fn update(&mut self, device: &Device) -> bool {
        let spec = &device.spec;
        let source = PasswordSource::of(&spec.authentication);
        let other_source = source != self.source;
        if other_source {
            self.password = PasswordState::Unknown;
            self.rotation = Rotation::default();
        }
        let key = self.certificate_key();
        self.certificate = Certificate::ask(self.certificate.take(), device);
        self.listed = true;
        let first = self.generation == 0;
        let changed = first
            || other_source
            || key != self.certificate_key()
            || self.enabled != spec.enabled
            || *self.acls != *spec.authorization.acls;
        if changed {
            self.planned = None;
        }
        self.generation = device.metadata.generation.unwrap_or_default();
        self.enabled = spec.enabled;
        self.paused = is_reconciliation_paused(device);
        self.source = source;
        self.rotation.ask(device);
        self.acls = spec.authorization.acls.clone().into();
        self.attributes.clone_from(&spec.attributes);
        self.observe_status(device);
        if changed {
            self.revise(&device.name_any());
        }
        changed
    }

    /// Takes over the status of the Device, unless it is older than what is known.
    pub fn observe_status(&mut self, device: &Device) {
        let Some(status) = self.last_written.observe(device) else { return };
        if let Some(certificate) = &mut self.certificate {
            certificate.observe(status.certificate.as_ref());
        }
        if self.twin.is_some() || status.desired.is_some() || status.reported.is_some() {
            self.change_twin(|twin| twin.observe(&status));
        }
    }

    /// Desired and reported state, where there is either.
    #[must_use]
    pub fn twin(&self) -> Option<&Twin> {
        self.twin.as_deref()
    }

    /// Changes desired and reported state.
    pub fn change_twin<T>(&mut self, change: impl FnOnce(&mut Twin) -> T) -> T {
        let mut twin = self.twin.take().unwrap_or_default();
        let result = change(&mut twin);
        self.twin = (!twin.is_empty()).then_some(twin);
        result
    }

    /// Its certificate, where it asks for one.
    #[must_use]
    pub fn certificate(&self) -> Option<&Certificate> {
        self.certificate.as_deref()
    }

    /// Its certificate, to be changed.
    pub fn certificate_mut(&mut self) -> Option<&mut Certificate> {
        self.certificate.as_deref_mut()
    }

    fn certificate_key(&self) -> Option<KeyDigest> {
        self.certificate.as_ref().and_then(|certificate| certificate.key().ok())
    }

    /// From the uid, so that what many Devices do at one age comes one by one.
    #[must_use]
    pub fn spread(&self) -> u64 {
        let mut hasher = DefaultHasher::new();
        self.uid.hash(&mut hasher);
        hasher.finish()
    }

    /// When something follows from the time alone, in seconds since 1970.
    #[must_use]
    pub fn deadline(&self) -> Option<i64> {
        let certificate = self.certificate.as_ref().and_then(|certificate| certificate.deadline());
        [self.rotation.deadline(self.spread()), certificate].into_iter().flatten().min()
    }

    /// What is known of the password.
    #[must_use]
    pub fn password(&self) -> &PasswordState {
        &self.password
    }

    /// Takes over what is known of the password. Returns whether what the broker holds must change.
    pub fn set_password(&mut self, username: &str, state: PasswordState) -> bool {
        let changed = state.hash() != self.password.hash();
        self.password = state;
        if changed {
            self.planned = None;
            self.revise(username);
        }
        changed
    }

    /// Takes over what the Secret says beside the password. Returns whether what the broker holds must change.
    pub fn observe_lifetime(&mut self, username: &str, lifetime: Lifetime, now: i64) -> bool {
        let before: Option<Box<str>> = self.rotation.previous().map(Into::into);
        self.rotation.observe(lifetime);
        self.rotation.expire(now);
        let changed = before.as_deref() != self.rotation.previous();
        if changed {
            self.planned = None;
            self.revise(username);
        }
        changed
    }

    /// Lets time pass. Returns whether what the broker holds must change.
    pub fn advance(&mut self, username: &str, now: i64) -> bool {
        let changed = self.rotation.advance(now, self.spread());
        if changed {
            self.planned = None;
            self.revise(username);
        }
        changed
    }

    fn revise(&mut self, username: &str) {
        self.revision = match self.entry(username) {
            Ok(Some(entry)) => Some(entry.revision().into()),
            Ok(None) if !self.enabled => Some(DISABLED_REVISION.into()),
            Ok(None) | Err(_) => None,
        };
    }

    /// Iterations of the password's hash: one suffices for 256 random bits.
    #[must_use]
    pub fn iterations(&self) -> u32 {
        match self.source {
            PasswordSource::Generated | PasswordSource::Absent => GENERATED_ITERATIONS,
            PasswordSource::Given { .. } => GIVEN_ITERATIONS,
        }
    }

    /// What the broker is to hold for the device, if anything.
    ///
    /// # Errors
    /// When the spec asks for what cannot stand in the broker's files.
    pub fn entry(&self, username: &str) -> Result<Option<Entry>, EntryError> {
        if !self.enabled {
            return Ok(None);
        }
        let key = self.certificate_key();
        if self.source == PasswordSource::Absent {
            return key.map(|key| Entry::by_certificate(username, key, &self.acls)).transpose();
        }
        let Some(hash) = self.password.hash() else { return Ok(None) };
        let mut entry = Entry::new(username, hash, &self.acls)?;
        if let Some(key) = key {
            entry = entry.with_certificate_key(key);
        }
        match self.rotation.previous() {
            Some(previous) => entry.with_previous(previous).map(Some),
            None => Ok(Some(entry)),
        }
    }

    /// Revision of what the broker is to hold for the device, or `None` where that is not known yet.
    #[must_use]
    pub fn revision(&self) -> Option<&str> {
        self.revision.as_deref()
    }

    /// Name of the Secret with the password, where there is one.
    #[must_use]
    pub fn secret_name(&self, device: &str) -> Option<String> {
        match &self.source {
            PasswordSource::Generated => Some(name::device_credentials(device)),
            PasswordSource::Given { secret, .. } => Some(secret.to_string()),
            PasswordSource::Absent => None,
        }
    }
}
