//! A Device's certificate: what it asks for, what was issued to it, and when another is due. Pure.

use std::sync::Arc;

use jiff::{SignedDuration, Timestamp};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;

use crate::api::Device;
use crate::api::client_authority::IssuerReference;
use crate::api::condition::Cause;
use crate::api::device::DeviceCertificate;
use crate::broker::credential::KeyDigest;
use crate::certificate::client::ClientAuthority;
use crate::certificate::request::{self, RequestError, SigningRequest};
use crate::certificate::trust::TrustedAuthorities;

/// Who signs the certificates of a Gateway's devices, as the reconciler of Gateways says it.
#[derive(Clone, Debug, Default)]
pub enum Authority {
    /// It has not said anything yet.
    #[default]
    Unknown,
    /// The Gateway names none.
    Undeclared,
    /// The one that it names cannot sign.
    Unusable,
    /// This one.
    Usable(Arc<Signer>),
}

impl Authority {
    /// Whether the two differ in anything that matters to a Device.
    #[must_use]
    pub fn differs(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Unknown, Self::Unknown) | (Self::Undeclared, Self::Undeclared) | (Self::Unusable, Self::Unusable) => false,
            (Self::Usable(one), Self::Usable(other)) => one.differs(other),
            _ => true,
        }
    }
}

/// A certificate of an issuer is renewed no sooner than after this long.
const MIN_RENEWAL_DELAY: SignedDuration = SignedDuration::from_mins(1);

/// An issuer that has not answered is asked again after this long, though nothing was heard of it.
pub const REQUEUE_AFTER: SignedDuration = SignedDuration::from_mins(5);

/// Who signs.
#[derive(Debug)]
pub enum Source {
    /// The operator, with this key.
    Own(ClientAuthority),
    /// An issuer of cert-manager, that is asked.
    Issuer(Issuer),
}

/// An issuer of cert-manager.
#[derive(Debug)]
pub struct Issuer {
    /// Which one.
    pub reference: IssuerReference,
    /// Whom brokers trust.
    pub trusted: TrustedAuthorities,
    /// Name of the Secret that says so.
    pub secret: String,
}

/// An authority that can sign, and for how long what it signs is valid.
#[derive(Debug)]
pub struct Signer {
    /// Who signs.
    pub source: Source,
    /// For how long.
    pub validity: SignedDuration,
    /// Tells one authority from another.
    fingerprint: u64,
    /// Nothing that it issues lasts longer.
    not_after: Timestamp,
}

impl Signer {
    /// One that signs for so long.
    #[must_use]
    pub fn new(source: Source, validity: SignedDuration) -> Self {
        // Each Device that asks for a certificate is compared with both at each of its steps.
        let (fingerprint, not_after) = match &source {
            Source::Own(authority) => (authority.fingerprint(), authority.not_after()),
            Source::Issuer(Issuer { reference, trusted, .. }) => {
                let text = format!("{}/{}/{} {:016x}", reference.group, reference.kind, reference.name, trusted.fingerprint());
                (request::digest(&text), trusted.roots_until())
            }
        };
        Self { source, validity, fingerprint, not_after }
    }

    /// The issuer that is to be asked, if it is not the operator that signs.
    #[must_use]
    pub fn issuer(&self) -> Option<&Issuer> {
        match &self.source {
            Source::Own(_) => None,
            Source::Issuer(issuer) => Some(issuer),
        }
    }

    fn differs(&self, other: &Self) -> bool {
        fn identity(signer: &Signer) -> (u64, Timestamp, SignedDuration, Option<&str>) {
            (signer.fingerprint, signer.not_after, signer.validity, signer.issuer().map(|issuer| issuer.trusted.trusted()))
        }
        identity(self) != identity(other)
    }

    /// What was issued for the request with this digest, as the status tells of it. It is renewed when two thirds of its life are over,
    /// or up to a tenth of it before that: `spread` lets those that were issued together be renewed one by one.
    #[must_use]
    pub fn certificate(&self, issued: (String, String, Timestamp), digest: u64, spread: u64, now: Timestamp) -> DeviceCertificate {
        let (pem, serial_number, not_after) = issued;
        let life = not_after.duration_since(now);
        let early = life / 10 / 1024 * i32::try_from(spread % 1024).unwrap_or_default();
        let mut renewal = Timestamp::from_second((not_after - life / 3 - early).as_second()).unwrap_or(not_after);
        if self.issuer().is_some() {
            // Near its own end an issuer gives ever shorter ones.
            renewal = renewal.max(now + MIN_RENEWAL_DELAY).min(not_after);
        }
        DeviceCertificate {
            pem,
            serial_number,
            not_after: Some(Time(not_after)),
            renewal_time: Some(Time(renewal)),
            issued_for: issued_for(digest, self.fingerprint),
            revision: None,
        }
    }
}

/// What came of asking an issuer that did not issue a certificate at once.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct IssuerResponse {
    /// Why there is no certificate, as far as that is known.
    pub refusal: Option<IssuanceRefusal>,
    /// When to look again without being told, in seconds since 1970; `None` is now.
    pub until: Option<i64>,
}

/// Why an issuer gives no certificate.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct IssuanceRefusal {
    /// Why.
    pub cause: Cause,
    /// Whether the Device has to change; else it may be given in time.
    pub is_final: bool,
}

/// What tells whether a certificate is still the wanted one.
fn issued_for(request: u64, authority: u64) -> String {
    format!("{request:016x}-{authority:016x}")
}

/// The two parts of that; of a text that somebody else wrote, none.
fn parse_issued_for(text: &str) -> Option<(u64, u64)> {
    let (request, authority) = text.split_once('-')?;
    Some((u64::from_str_radix(request, 16).ok()?, u64::from_str_radix(authority, 16).ok()?))
}

/// A Device's certificate.
#[derive(Clone, Debug)]
pub struct Certificate {
    /// Digest of the request, and the key in it.
    digest: u64,
    key: Result<KeyDigest, RequestError>,
    issued: Option<Issued>,
    /// What is issued and does not stand in the status yet.
    pending: Option<Box<DeviceCertificate>>,
    /// Old enough to be renewed.
    due: bool,
    /// Too old to be accepted.
    expired: bool,
    /// What came of asking an issuer. Boxed, for there are many Devices and few that wait.
    asked: Option<Box<IssuerResponse>>,
}

/// A certificate as the status tells of it. Times are seconds since 1970.
#[derive(Clone, Debug, Eq, PartialEq)]
struct Issued {
    serial: Box<str>,
    not_after: i64,
    renewal: i64,
    request: u64,
    authority: u64,
}

impl Issued {
    /// What somebody made unreadable counts as not issued.
    fn of(certificate: &DeviceCertificate) -> Option<Self> {
        let (request, authority) = parse_issued_for(&certificate.issued_for)?;
        Some(Self {
            serial: certificate.serial_number.as_str().into(),
            not_after: certificate.not_after.as_ref()?.0.as_second(),
            renewal: certificate.renewal_time.as_ref()?.0.as_second(),
            request,
            authority,
        })
    }
}

impl Certificate {
    /// What a Device asks for, if it does. `before` is what was known of it.
    #[must_use]
    pub fn ask(before: Option<Box<Self>>, device: &Device) -> Option<Box<Self>> {
        let x509 = device.spec.authentication.x509.as_ref()?;
        let text = x509.certificate_signing_request.as_str();
        let digest = request::digest(text);
        if let Some(known) = before.as_ref().filter(|known| known.digest == digest) {
            return Some(Box::clone(known));
        }
        let written = device.status.as_ref().and_then(|status| status.certificate.as_ref()).and_then(Issued::of);
        // Its signature was checked before something was issued for it: after a restart that saves seconds for a large fleet.
        let known = written.as_ref().is_some_and(|issued| issued.request == digest);
        let parsed = if known { SigningRequest::parse_known(text) } else { SigningRequest::parse(text) };
        let key = parsed.map(|request| KeyDigest::of(&request.public_key()));
        let issued = before.and_then(|before| before.issued);
        Some(Box::new(Self { digest, key, issued, pending: None, due: false, expired: false, asked: None }))
    }

    /// Takes over what the status says.
    pub fn observe(&mut self, certificate: Option<&DeviceCertificate>) {
        let issued = certificate.and_then(Issued::of);
        match &self.pending {
            // It is on its way.
            Some(pending) if issued.as_ref().is_none_or(|issued| *issued.serial != *pending.serial_number) => return,
            Some(_) => self.pending = None,
            None => {}
        }
        if self.issued != issued {
            self.issued = issued;
            (self.due, self.expired) = (false, false);
        }
    }

    /// Takes over what was issued for a request with this digest, to be written.
    pub fn take(&mut self, digest: u64, certificate: DeviceCertificate) {
        if self.digest == digest {
            self.issued = Issued::of(&certificate);
            self.pending = Some(Box::new(certificate));
            (self.due, self.expired) = (false, false);
            self.asked = None;
        }
    }

    /// An issuer is about to be asked: what is heard from here on is worth another look.
    pub fn ask_issuer(&mut self, until: i64) {
        self.asked.get_or_insert_default().until = Some(until);
    }

    /// Takes over what came of asking an issuer for a certificate for a request with this digest. Returns whether its refusal is news
    /// while there is a certificate still.
    pub fn take_answer(&mut self, digest: u64, mut answer: IssuerResponse) -> bool {
        if self.digest != digest {
            return false;
        }
        let news = !self.is_missing() && answer.refusal.is_some() && self.refusal() != answer.refusal.as_ref();
        if self.asked.as_ref().is_some_and(|asked| asked.until.is_none()) {
            answer.until = None;
        }
        self.asked = Some(Box::new(answer));
        news
    }

    /// The issuer is worth another look.
    pub fn requeue(&mut self) {
        if let Some(asked) = &mut self.asked {
            asked.until = None;
        }
    }

    /// Whether an issuer is being asked.
    #[must_use]
    pub fn is_asked_for(&self) -> bool {
        self.asked.is_some()
    }

    /// Why the issuer gives none.
    #[must_use]
    pub fn refusal(&self) -> Option<&IssuanceRefusal> {
        self.asked.as_ref()?.refusal.as_ref()
    }

    /// The key whose certificates the broker is to accept, or what is wrong with the request.
    ///
    /// # Errors
    /// When no certificate may be issued for the request.
    pub fn key(&self) -> Result<KeyDigest, &RequestError> {
        self.key.as_ref().copied()
    }

    /// Whether there is a certificate for this request.
    #[must_use]
    pub fn is_issued(&self) -> bool {
        self.issued.as_ref().is_some_and(|issued| issued.request == self.digest)
    }

    /// Whether its time is over.
    #[must_use]
    pub fn is_expired(&self) -> bool {
        self.expired
    }

    /// Whether the device has none that it could connect with.
    #[must_use]
    pub fn is_missing(&self) -> bool {
        self.expired || !self.is_issued()
    }

    /// Whether this authority is to issue another. Near its own end it has none to give that would last longer.
    #[must_use]
    pub fn wants(&self, signer: &Signer) -> bool {
        self.key.is_ok()
            && self.asked.as_ref().is_none_or(|asked| asked.until.is_none())
            && self.issued.as_ref().is_none_or(|issued| {
                issued.request != self.digest
                    || issued.authority != signer.fingerprint
                    || (self.due && issued.not_after < signer.not_after.as_second())
            })
    }

    /// When something follows from the time alone.
    #[must_use]
    pub fn deadline(&self) -> Option<i64> {
        let issued = self
            .issued
            .as_ref()
            .and_then(|issued| if self.due { (!self.expired).then_some(issued.not_after) } else { Some(issued.renewal) });
        [issued, self.asked.as_ref().and_then(|asked| asked.until)].into_iter().flatten().min()
    }

    /// Lets time pass. Returns whether something follows.
    pub fn advance(&mut self, now: i64) -> bool {
        let state = |own: &Self| (own.due, own.expired, own.asked.as_ref().and_then(|asked| asked.until));
        let before = state(self);
        if let Some(issued) = &self.issued {
            self.due |= issued.renewal <= now;
            self.expired |= issued.not_after <= now;
        }
        if let Some(asked) = self.asked.as_mut().filter(|asked| asked.until.is_some_and(|until| until <= now)) {
            asked.until = None;
        }
        state(self) != before
    }

    /// For the status; without the certificate itself where that stands there already. `revision` is what the broker has proven.
    #[must_use]
    pub fn status(&self, revision: Option<&str>) -> Option<DeviceCertificate> {
        let revision = revision.map(str::to_owned);
        if let Some(pending) = &self.pending {
            return Some(DeviceCertificate { revision, ..DeviceCertificate::clone(pending) });
        }
        let issued = self.issued.as_ref()?;
        let time = |second| Timestamp::from_second(second).ok().map(Time);
        Some(DeviceCertificate {
            pem: String::new(),
            serial_number: issued.serial.to_string(),
            not_after: time(issued.not_after),
            renewal_time: time(issued.renewal),
            issued_for: issued_for(issued.request, issued.authority),
            revision,
        })
    }
}

#[cfg(test)]
#[path = "certificate_tests.rs"]
mod tests;
