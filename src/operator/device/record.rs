//! The state of one Device in the index: a few hundred bytes, because there are many.

use std::collections::BTreeMap;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::Arc;

use kube::ResourceExt;

use super::certificate::Certificate;
use super::connection::CompactConnection;
use super::digest_key::DigestKey;
use super::last_written_status::LastWrittenStatus;
use super::rotation::{Lifetime, Rotation};
use super::twin::Twin;
use crate::api::condition::Cause;
use crate::api::device::{Acl, Authentication};
use crate::api::{Device, is_reconciliation_paused, name};
use crate::broker::credential::KeyDigest;
use crate::broker::credential::entry::{Entry, EntryError};
use crate::broker::credential::hash::{GENERATED_ITERATIONS, GIVEN_ITERATIONS};

/// Revision of a disabled Device, which the broker does not hold.
const DISABLED_REVISION: &str = "disabled";

/// The source of a Device's password.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum PasswordSource {
    /// The Secret that the operator generates.
    Generated,

    /// A Secret of the user.
    Given {
        /// Name of the Secret.
        secret: Box<str>,
        /// Key of the Secret.
        key: Box<str>,
    },

    /// No password: the device has only a certificate.
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

/// The state of a Device's password.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum PasswordState {
    /// Not read yet.
    Unknown,

    /// The Secret with a generated password could not be created, for this reason.
    Failing(Box<Cause>),

    /// The Secret changed and must be read again. Until then the known hash is used.
    Stale(Box<str>),

    /// The salted hash, in Mosquitto's format.
    Hashed(Box<str>),

    /// There is no password, for this reason. With the last known hash, which is still accepted.
    Missing(Box<Cause>, Option<Box<str>>),
}

impl PasswordState {
    /// The hash for the broker.
    #[must_use]
    pub fn hash(&self) -> Option<&str> {
        match self {
            Self::Hashed(hash) | Self::Stale(hash) | Self::Missing(_, Some(hash)) => Some(hash),
            Self::Unknown | Self::Failing(_) | Self::Missing(_, None) => None,
        }
    }
}

/// The state of one Device.
#[allow(clippy::struct_excessive_bools, reason = "independent facts in all combinations")]
#[derive(Clone, Debug)]
pub struct DeviceRecord {
    /// `metadata.uid`.
    pub uid: Box<str>,
    /// `metadata.generation`.
    pub generation: i64,
    /// Whether the device may connect.
    pub enabled: bool,
    /// Whether reconciliation is paused.
    pub paused: bool,
    /// The source of the password.
    pub source: PasswordSource,
    /// The rotation of a generated password.
    pub rotation: Rotation,
    /// Changed by [`DeviceRecord::set_password`].
    password: PasswordState,
    /// The certificate state, if there is a signing request.
    certificate: Option<Box<Certificate>>,
    /// The key of the revision.
    digest_key: Arc<DigestKey>,
    /// Keyed digest of the entry for the broker, or `None` if it is not known yet. Stored, because each proof compares it for all
    /// Devices of a Gateway.
    revision: Option<Box<str>>,
    /// Access beyond the device's own topics.
    pub acls: Box<[Acl]>,
    /// Attributes for the registry.
    pub attributes: BTreeMap<String, String>,
    /// The status at the API server.
    pub last_written: LastWrittenStatus,
    /// The connection state that the broker reported.
    pub seen: Option<CompactConnection>,
    /// Desired and reported state, if there is either.
    twin: Option<Box<Twin>>,
    /// Number of the first plan that contains the present state of the Device.
    pub planned: Option<u64>,
    /// Whether the last plan had no room for its credential.
    pub excluded: bool,
    /// Whether the Device was listed since [`super::index::DeviceIndex::listing_devices`]. A temporary set of names would take 25
    /// MB for 100,000 Devices.
    pub listed: bool,
    /// Whether the Secret with the generated password was listed since [`super::index::DeviceIndex::listing_secrets`].
    pub secret_listed: bool,
    /// Whether the Secret with a generated password exists, also if another source is used now.
    pub has_generated_secret: bool,
    /// Whether a CertificateRequest of the Device exists.
    pub has_certificate_request: bool,
}

impl DeviceRecord {
    /// From a new Device.
    #[must_use]
    pub fn new(device: &Device, digest_key: Arc<DigestKey>) -> Self {
        let mut record = Self {
            uid: device.uid().unwrap_or_default().into(),
            generation: 0,
            enabled: false,
            paused: false,
            source: PasswordSource::Generated,
            rotation: Rotation::default(),
            password: PasswordState::Unknown,
            certificate: None,
            digest_key,
            revision: None,
            acls: Box::default(),
            attributes: BTreeMap::new(),
            last_written: LastWrittenStatus::default(),
            seen: None,
            twin: None,
            planned: None,
            excluded: false,
            listed: false,
            secret_listed: false,
            has_generated_secret: false,
            has_certificate_request: false,
        };
        record.update(device);
        record
    }

    /// Updates the state from a changed Device. Returns whether the broker's entry changes.
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

    /// Updates the state from the status of the Device, unless that is older than the stored one.
    pub fn observe_status(&mut self, device: &Device) {
        let Some(status) = self.last_written.observe(device) else { return };
        if let Some(certificate) = &mut self.certificate {
            certificate.observe(status.certificate.as_ref());
        }
        if self.twin.is_some() || status.desired.is_some() || status.reported.is_some() {
            self.change_twin(|twin| twin.observe(&status));
        }
    }

    /// Desired and reported state, if there is either.
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

    /// The certificate state, if there is a signing request.
    #[must_use]
    pub fn certificate(&self) -> Option<&Certificate> {
        self.certificate.as_deref()
    }

    /// The same, mutable.
    pub fn certificate_mut(&mut self) -> Option<&mut Certificate> {
        self.certificate.as_deref_mut()
    }

    fn certificate_key(&self) -> Option<KeyDigest> {
        self.certificate.as_ref().and_then(|certificate| certificate.key().ok())
    }

    /// A number from the uid that distributes work of many Devices over time.
    #[must_use]
    pub fn spread(&self) -> u64 {
        let mut hasher = DefaultHasher::new();
        self.uid.hash(&mut hasher);
        hasher.finish()
    }

    /// The next time at which the state changes without an event, in seconds since 1970.
    #[must_use]
    pub fn deadline(&self) -> Option<i64> {
        let certificate = self.certificate.as_ref().and_then(|certificate| certificate.deadline());
        [self.rotation.deadline(self.spread()), certificate].into_iter().flatten().min()
    }

    /// The state of the password.
    #[must_use]
    pub fn password(&self) -> &PasswordState {
        &self.password
    }

    /// Stores the state of the password. Returns whether the broker's entry changes.
    pub fn set_password(&mut self, username: &str, state: PasswordState) -> bool {
        let changed = state.hash() != self.password.hash();
        self.password = state;
        if changed {
            self.planned = None;
            self.revise(username);
        }
        changed
    }

    /// Stores the metadata of the Secret with the password. Returns whether the broker's entry changes.
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

    /// Advances the time. Returns whether the broker's entry changes.
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
            Ok(Some(entry)) => Some(self.digest_key.digest(&entry.revision())),
            Ok(None) if !self.enabled => Some(DISABLED_REVISION.into()),
            Ok(None) | Err(_) => None,
        };
    }

    /// Iterations of the password hash. One is enough for 256 random bits.
    #[must_use]
    pub fn iterations(&self) -> u32 {
        match self.source {
            PasswordSource::Generated | PasswordSource::Absent => GENERATED_ITERATIONS,
            PasswordSource::Given { .. } => GIVEN_ITERATIONS,
        }
    }

    /// The broker's entry for the device, if there is one.
    ///
    /// # Errors
    /// If the spec contains text that the broker's files cannot represent.
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

    /// Revision of the broker's entry, or `None` if it is not known yet.
    #[must_use]
    pub fn revision(&self) -> Option<&str> {
        self.revision.as_deref()
    }

    /// Name of the Secret with the password, if there is one.
    #[must_use]
    pub fn secret_name(&self, device: &str) -> Option<String> {
        match &self.source {
            PasswordSource::Generated => Some(name::device_credentials(device)),
            PasswordSource::Given { secret, .. } => Some(secret.to_string()),
            PasswordSource::Absent => None,
        }
    }
}
