//! The certificate of a Device: its signing request, what was issued for it, and when it is renewed. Pure.

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

/// The authority that signs the certificates of a Gateway's devices, as the reconciler of Gateways reports it.
#[derive(Clone, Debug, Default)]
pub enum Authority {
    /// Not reported yet.
    #[default]
    Unknown,
    /// The Gateway declares no authority.
    Undeclared,
    /// The declared authority cannot sign.
    Unusable,
    /// The declared authority can sign.
    Usable(Arc<Signer>),
}

impl Authority {
    /// Whether the two differ in a property that matters to a Device.
    #[must_use]
    pub fn differs(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Unknown, Self::Unknown) | (Self::Undeclared, Self::Undeclared) | (Self::Unusable, Self::Unusable) => false,
            (Self::Usable(one), Self::Usable(other)) => one.differs(other),
            _ => true,
        }
    }
}

/// Lower limit of the time until a certificate from an issuer is renewed.
const MIN_RENEWAL_DELAY: SignedDuration = SignedDuration::from_mins(1);

/// An issuer that has not responded is queried again after this long, even without an event.
pub const REQUEUE_AFTER: SignedDuration = SignedDuration::from_mins(5);

/// The source of signatures.
#[derive(Debug)]
pub enum Source {
    /// The operator signs with this key.
    Own(ClientAuthority),
    /// An issuer of cert-manager signs.
    Issuer(Issuer),
}

/// An issuer of cert-manager.
#[derive(Debug)]
pub struct Issuer {
    /// Reference to the Issuer or ClusterIssuer.
    pub reference: IssuerReference,
    /// Authorities that the brokers trust.
    pub trusted: TrustedAuthorities,
    /// Name of the Secret with these authorities.
    pub secret: String,
}

/// An authority that can sign, and how long its certificates are valid.
#[derive(Debug)]
pub struct Signer {
    /// The source of the signature.
    pub source: Source,
    /// Validity of a certificate.
    pub validity: SignedDuration,
    /// Distinguishes this authority from others.
    fingerprint: u64,
    /// End of validity of the authority. No certificate outlives it.
    not_after: Timestamp,
}

impl Signer {
    /// A signer whose certificates are valid for `validity`.
    #[must_use]
    pub fn new(source: Source, validity: SignedDuration) -> Self {
        // Computed once: each Device with a signing request compares them whenever its next action is determined.
        let (fingerprint, not_after) = match &source {
            Source::Own(authority) => (authority.fingerprint(), authority.not_after()),
            Source::Issuer(Issuer { reference, trusted, .. }) => {
                let text = format!("{}/{}/{} {:016x}", reference.group, reference.kind, reference.name, trusted.fingerprint());
                (request::digest(&text), trusted.roots_until())
            }
        };
        Self { source, validity, fingerprint, not_after }
    }

    /// The issuer of cert-manager, unless the operator signs.
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

    /// The status entry of a certificate that was issued for the request with this digest. It is renewed after two thirds of its
    /// life, or up to a tenth of its life earlier: `spread` distributes the renewals of certificates that were issued together.
    #[must_use]
    pub fn certificate(&self, issued: (String, String, Timestamp), digest: u64, spread: u64, now: Timestamp) -> DeviceCertificate {
        let (pem, serial_number, not_after) = issued;
        let life = not_after.duration_since(now);
        let early = life / 10 / 1024 * i32::try_from(spread % 1024).unwrap_or_default();
        let mut renewal = Timestamp::from_second((not_after - life / 3 - early).as_second()).unwrap_or(not_after);
        if self.issuer().is_some() {
            // Near the end of its own validity, an issuer returns certificates with ever shorter lives.
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

/// The response of an issuer that has not issued a certificate yet.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct IssuerResponse {
    /// Why there is no certificate, if the issuer reports it.
    pub refusal: Option<IssuanceRefusal>,
    /// When to query the issuer again without an event, in seconds since 1970. `None` means now.
    pub until: Option<i64>,
}

/// Why an issuer refuses a certificate.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct IssuanceRefusal {
    /// Reason and message.
    pub cause: Cause,
    /// Whether only a change of the Device helps. Otherwise the operator retries.
    pub is_final: bool,
}

/// Identifies the request and the authority that a certificate was issued for.
fn issued_for(request: u64, authority: u64) -> String {
    format!("{request:016x}-{authority:016x}")
}

/// The two digests in that text. `None` if it is malformed, for example after an edit by a user.
fn parse_issued_for(text: &str) -> Option<(u64, u64)> {
    let (request, authority) = text.split_once('-')?;
    Some((u64::from_str_radix(request, 16).ok()?, u64::from_str_radix(authority, 16).ok()?))
}

/// The state of a Device's certificate.
#[derive(Clone, Debug)]
pub struct Certificate {
    /// Digest of the signing request, and the key in it.
    digest: u64,
    key: Result<KeyDigest, RequestError>,
    issued: Option<Issued>,
    /// Issued, and not written to the status yet.
    pending: Option<Box<DeviceCertificate>>,
    /// Whether the time of renewal has come.
    due: bool,
    /// Whether the certificate has expired.
    expired: bool,
    /// The response of an issuer. Boxed, because few of many Devices wait for one.
    asked: Option<Box<IssuerResponse>>,
}

/// A certificate as the status describes it. Times are seconds since 1970.
#[derive(Clone, Debug, Eq, PartialEq)]
struct Issued {
    serial: Box<str>,
    not_after: i64,
    renewal: i64,
    request: u64,
    authority: u64,
}

impl Issued {
    /// `None` for a malformed entry: it counts as not issued.
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
    /// The certificate state of a Device with a signing request. `before` is the previous state.
    #[must_use]
    pub fn ask(before: Option<Box<Self>>, device: &Device) -> Option<Box<Self>> {
        let x509 = device.spec.authentication.x509.as_ref()?;
        let text = x509.certificate_signing_request.as_str();
        let digest = request::digest(text);
        if let Some(known) = before.as_ref().filter(|known| known.digest == digest) {
            return Some(Box::clone(known));
        }
        let written = device.status.as_ref().and_then(|status| status.certificate.as_ref()).and_then(Issued::of);
        // The signature of a request that has a certificate was checked before. This saves seconds at the start with a large fleet.
        let known = written.as_ref().is_some_and(|issued| issued.request == digest);
        let parsed = if known { SigningRequest::parse_known(text) } else { SigningRequest::parse(text) };
        let key = parsed.map(|request| KeyDigest::of(&request.public_key()));
        let issued = before.and_then(|before| before.issued);
        Some(Box::new(Self { digest, key, issued, pending: None, due: false, expired: false, asked: None }))
    }

    /// Updates the state from the status of the Device.
    pub fn observe(&mut self, certificate: Option<&DeviceCertificate>) {
        let issued = certificate.and_then(Issued::of);
        match &self.pending {
            // The status with the pending certificate has not been written yet.
            Some(pending) if issued.as_ref().is_none_or(|issued| *issued.serial != *pending.serial_number) => return,
            Some(_) => self.pending = None,
            None => {}
        }
        if self.issued != issued {
            self.issued = issued;
            (self.due, self.expired) = (false, false);
        }
    }

    /// Stores a certificate that was issued for the request with this digest. It is written with the next status.
    pub fn take(&mut self, digest: u64, certificate: DeviceCertificate) {
        if self.digest == digest {
            self.issued = Issued::of(&certificate);
            self.pending = Some(Box::new(certificate));
            (self.due, self.expired) = (false, false);
            self.asked = None;
        }
    }

    /// The issuer is about to be queried: an event from now on causes another query.
    pub fn ask_issuer(&mut self, until: i64) {
        self.asked.get_or_insert_default().until = Some(until);
    }

    /// Stores the response of an issuer for the request with this digest. Returns whether it is a new refusal while a certificate
    /// is still valid.
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

    /// Queries the issuer again at the next action.
    pub fn requeue(&mut self) {
        if let Some(asked) = &mut self.asked {
            asked.until = None;
        }
    }

    /// Whether an issuer was queried and has not issued yet.
    #[must_use]
    pub fn is_asked_for(&self) -> bool {
        self.asked.is_some()
    }

    /// Why the issuer refuses.
    #[must_use]
    pub fn refusal(&self) -> Option<&IssuanceRefusal> {
        self.asked.as_ref()?.refusal.as_ref()
    }

    /// The public key whose certificates the broker accepts.
    ///
    /// # Errors
    /// When the signing request is not acceptable.
    pub fn key(&self) -> Result<KeyDigest, &RequestError> {
        self.key.as_ref().copied()
    }

    /// Whether there is a certificate for this request.
    #[must_use]
    pub fn is_issued(&self) -> bool {
        self.issued.as_ref().is_some_and(|issued| issued.request == self.digest)
    }

    /// Whether the certificate has expired.
    #[must_use]
    pub fn is_expired(&self) -> bool {
        self.expired
    }

    /// Whether the device has no certificate that the broker accepts.
    #[must_use]
    pub fn is_missing(&self) -> bool {
        self.expired || !self.is_issued()
    }

    /// Whether this authority has to issue a certificate. An authority near its own end cannot issue one that lasts longer than the
    /// present one.
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

    /// The next time at which the state changes without an event, in seconds since 1970.
    #[must_use]
    pub fn deadline(&self) -> Option<i64> {
        let issued = self
            .issued
            .as_ref()
            .and_then(|issued| if self.due { (!self.expired).then_some(issued.not_after) } else { Some(issued.renewal) });
        [issued, self.asked.as_ref().and_then(|asked| asked.until)].into_iter().flatten().min()
    }

    /// Advances the time. Returns whether the state changed.
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

    /// The entry for the status. It omits the PEM text if the status has it already. `revision` is what the broker has proven.
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
