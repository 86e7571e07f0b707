//! Carries out that a Device gets its certificate: signed here, or by an issuer of cert-manager that is asked.

use k8s_controller::events::{Event, EventRecorder, EventType};
use k8s_openapi::jiff::{SignedDuration, Timestamp};
use kube::ResourceExt;
use tracing::warn;

use super::certificate::{Asked, Issuer, LOOK_AGAIN, Refusal, Signer, Source};
use super::certificate_request::{Answer, CertificateRequest, answer, asks_for, wanted};
use super::fleet::SharedFleet;
use super::key::DeviceKey;
use crate::api::condition::Cause;
use crate::api::reason::Reason;
use crate::api::{Device, name};
use crate::certificate::client::ClientAuthority;
use crate::certificate::request::{self, SigningRequest};
use crate::operator::kubernetes::apply::{WriteError, Writer, read};
use crate::runtime::error::chain;

/// What may be mended at any time without a word to us (a webhook that is away, a right that is missing) is looked at after this long.
const LOOK_AGAIN_SOON: SignedDuration = SignedDuration::from_secs(30);

/// One that was refused is made anew after this long: as cert-manager does for its own Certificates.
const TRY_AGAIN: SignedDuration = SignedDuration::from_hours(1);

/// The longest message of an issuer that is passed on, in characters.
const MOST_CHARACTERS: usize = 500;

/// A Device that asks for a certificate, as it is now.
struct Asking<'a> {
    writer: &'a Writer,
    recorder: &'a EventRecorder,
    fleet: &'a SharedFleet,
    key: &'a DeviceKey,
    uid: &'a str,
    signer: &'a Signer,
    spread: u64,
    device: Device,
    text: String,
    request: SigningRequest,
}

/// Gets a certificate for what the Device asks for by now. It is written with the next status; should that not come to be, another is
/// issued, and nothing is lost with this one: what counts at the broker is the key.
///
/// # Errors
/// When the API server refuses or is away.
pub async fn issue(
    writer: &Writer,
    recorder: &EventRecorder,
    fleet: &SharedFleet,
    (key, uid): (&DeviceKey, &str),
    signer: &Signer,
    spread: u64,
) -> Result<(), WriteError> {
    let device = read::<Device>(writer.client(), &key.gateway.namespace, &key.name).await?;
    let Some(device) = device.filter(|device| device.metadata.uid.as_deref() == Some(uid)) else { return Ok(()) };
    let Some(x509) = &device.spec.authentication.x509 else { return Ok(()) };
    let text = x509.certificate_signing_request.clone();
    // Of another request the watch tells in a moment.
    let Ok(request) = SigningRequest::parse(&text) else { return Ok(()) };
    let asking = Asking { writer, recorder, fleet, key, uid, signer, spread, device, text, request };
    match &signer.source {
        Source::Own(authority) => asking.sign(authority).await,
        Source::Issuer(issuer) => match asking.ask(issuer).await {
            Err(error) if !error.is_namespace_terminating() => {
                // Told, and tried again in time: nothing else of the Device is to wait for it.
                asking.refused(error.reason(), shortened(&chain(&error)), LOOK_AGAIN_SOON).await;
            }
            outcome => return outcome,
        },
    }
    Ok(())
}

impl Asking<'_> {
    async fn sign(&self, authority: &ClientAuthority) {
        let now = Timestamp::now();
        match authority.issue(&self.key.name, &self.request, self.signer.validity, now) {
            Ok(issued) => self.issued((issued.pem, issued.serial.to_string(), issued.not_after), now),
            Err(error) => {
                let message = format!("the key of the Gateway's client authority does not sign: {}", chain(&error));
                self.refused(Reason::SigningFailed, message, LOOK_AGAIN_SOON).await;
            }
        }
    }

    fn issued(&self, issued: (String, String, Timestamp), now: Timestamp) {
        let digest = request::digest(&self.text);
        let certificate = self.signer.certificate(issued, digest, self.spread, now);
        self.fleet.lock().certificate_issued(self.key, self.uid, digest, certificate);
    }

    /// Keeps what came of asking. A refusal that is news is an event as well: the status tells of it only where there is no certificate.
    async fn answered(&self, refusal: Option<Refusal>, look_again: SignedDuration) {
        let until = Some((Timestamp::now() + look_again).as_second());
        let digest = request::digest(&self.text);
        let answer = Asked { refusal: refusal.clone(), until };
        let is_news = self.fleet.lock().certificate_asked(self.key, self.uid, digest, answer);
        let Some(refusal) = refusal.filter(|_| is_news) else { return };
        let event = Event {
            type_: EventType::Warning,
            reason: refusal.cause.reason.to_string(),
            action: "Issue".to_owned(),
            note: Some(refusal.cause.message),
            related: None,
        };
        if let Err(error) = self.recorder.publish(&self.device, &event).await {
            warn!(device = %self.key.name, error = chain(&error), "failed to publish an event");
        }
    }

    async fn refused(&self, reason: Reason, message: String, look_again: SignedDuration) {
        self.answered(Some(Refusal { cause: Cause::new(reason, message), is_final: false }), look_again).await;
    }

    async fn ask(&self, issuer: &Issuer) -> Result<(), WriteError> {
        let name = name::certificate_request(&self.key.name);
        if self.request.sole_name() != Some(&*self.key.name) {
            let message = format!(
                "certificateSigningRequest has to ask for the subject CN={} and for nothing else, neither other names nor extensions, where an \
                 issuer signs: for it gives what is asked for, and the broker takes the common name for the user. Make the request again with \
                 `openssl req -new -key device.key -subj /CN={}`",
                self.key.name, self.key.name
            );
            let cause = Cause::new(Reason::CommonNameMismatch, message);
            self.answered(Some(Refusal { cause, is_final: true }), TRY_AGAIN).await;
            return Ok(());
        }
        let wanted = wanted(self.key, self.uid, &self.request.pem(), &issuer.reference, self.signer);
        let namespace = &self.key.gateway.namespace;
        match read::<CertificateRequest>(self.writer.client(), namespace, &name).await? {
            None => self.create(&wanted).await,
            Some(found) if !found.owner_references().iter().any(|owner| owner.uid == *self.uid) => {
                let message = format!("a CertificateRequest {name} exists and does not belong to this Device: delete it");
                self.refused(Reason::NameConflict, message, LOOK_AGAIN_SOON).await;
                Ok(())
            }
            Some(found) if !asks_for(&found, &wanted) => self.replace(&wanted).await,
            Some(found) => self.follow(&found, &wanted, issuer).await,
        }
    }

    async fn create(&self, wanted: &CertificateRequest) -> Result<(), WriteError> {
        match self.writer.create(wanted).await {
            Ok(_) => {
                self.answered(None, LOOK_AGAIN).await;
                Ok(())
            }
            // Neither the object nor its kind. Should that come, the watch tells.
            Err(error) if error.is_not_found() => {
                let message = "the Gateway's clientAuthority names an issuer of cert-manager, and cert-manager is not installed in this cluster: \
                               install it, or leave issuerRef out";
                self.refused(Reason::CertManagerNotFound, message.to_owned(), TRY_AGAIN).await;
                Ok(())
            }
            Err(error) => Err(error),
        }
    }

    async fn replace(&self, wanted: &CertificateRequest) -> Result<(), WriteError> {
        self.writer.delete::<CertificateRequest>(&self.key.gateway.namespace, &wanted.name_any()).await?;
        self.create(wanted).await
    }

    async fn follow(&self, found: &CertificateRequest, wanted: &CertificateRequest, issuer: &Issuer) -> Result<(), WriteError> {
        let name = wanted.name_any();
        let now = Timestamp::now();
        let (reason, message) = match answer(found) {
            Answer::Pending(None) => {
                self.answered(None, LOOK_AGAIN).await;
                return Ok(());
            }
            Answer::Pending(Some(message)) => {
                let message = format!("CertificateRequest {name} waits for its issuer: {}", shortened(message));
                self.refused(Reason::AwaitingIssuer, message, LOOK_AGAIN).await;
                return Ok(());
            }
            Answer::Issued(chain) => match self.check(chain, issuer, now) {
                // What was taken over before, and could not be deleted.
                Ok((_, serial, _)) if self.has(&serial) => return self.replace(wanted).await,
                Ok(usable) => {
                    self.issued(usable, now);
                    return self.writer.delete::<CertificateRequest>(&self.key.gateway.namespace, &name).await;
                }
                Err(message) => (Reason::CertificateUnusable, message),
            },
            Answer::Refused(reason, message) => (reason, format!("the issuer gives no certificate: {}", shortened(message))),
        };
        let since = found.creation_timestamp().map_or(now, |time| time.0);
        let until = since + TRY_AGAIN;
        if until <= now {
            return self.replace(wanted).await;
        }
        let message = format!("CertificateRequest {name}: {message}. It is made again at {until}, or when you delete it");
        self.refused(reason, message, until.duration_since(now)).await;
        Ok(())
    }

    /// Whether the status tells of the certificate with this serial number.
    fn has(&self, serial: &str) -> bool {
        let known = self.device.status.as_ref().and_then(|status| status.certificate.as_ref());
        known.is_some_and(|known| known.serial_number == serial)
    }

    fn check(&self, pem: &[u8], issuer: &Issuer, now: Timestamp) -> Result<(String, String, Timestamp), String> {
        let checked = issuer.trusted.check(pem, &self.key.name, &self.request.public_key(), &issuer.secret, now);
        let usable = checked.map_err(|error| chain(&error))?;
        Ok((String::from_utf8_lossy(pem).into_owned(), usable.serial_number, usable.not_after))
    }
}

fn shortened(message: &str) -> String {
    message.chars().take(MOST_CHARACTERS).collect()
}
