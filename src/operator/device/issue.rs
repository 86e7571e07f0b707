//! Issues the certificate of a Device: signed by the operator, or by an issuer of cert-manager.

use k8s_controller::events::{Event, EventRecorder, EventType};
use k8s_openapi::jiff::{SignedDuration, Timestamp};
use kube::ResourceExt;
use tracing::warn;

use super::certificate::{IssuanceRefusal, Issuer, IssuerResponse, REQUEUE_AFTER, Signer, Source};
use super::certificate_request::{CertificateRequest, RequestState, desired, matches, request_state};
use super::index::SharedDeviceIndex;
use super::key::DeviceKey;
use crate::api::condition::Cause;
use crate::api::reason::Reason;
use crate::api::{Device, name};
use crate::certificate::client::ClientAuthority;
use crate::certificate::request::{self, SigningRequest};
use crate::operator::kubernetes::apply::{WriteError, Writer, read};
use crate::runtime::error::chain;

/// Errors that others can fix at any time without an event (a failing webhook, missing RBAC) are retried after this long.
const REQUEUE_AFTER_ERROR: SignedDuration = SignedDuration::from_secs(30);

/// A refused CertificateRequest is replaced after this long, as cert-manager does for Certificates.
const RETRY_REFUSED_AFTER: SignedDuration = SignedDuration::from_hours(1);

/// Upper limit of the length of an issuer's message in the status, in characters.
const MAX_MESSAGE_CHARACTERS: usize = 500;

/// A Device with its signing request, as read from the API server.
struct IssuanceRequest<'a> {
    writer: &'a Writer,
    recorder: &'a EventRecorder,
    index: &'a SharedDeviceIndex,
    key: &'a DeviceKey,
    uid: &'a str,
    signer: &'a Signer,
    spread: u64,
    device: Device,
    text: String,
    request: SigningRequest,
}

/// Gets a certificate for the present signing request of the Device. It is written with the next status. If that fails, another is
/// issued: the broker accepts the key, not one certificate.
///
/// # Errors
/// When a call of the API server fails.
pub async fn issue(
    writer: &Writer,
    recorder: &EventRecorder,
    index: &SharedDeviceIndex,
    (key, uid): (&DeviceKey, &str),
    signer: &Signer,
    spread: u64,
) -> Result<(), WriteError> {
    let device = read::<Device>(writer.client(), &key.gateway.namespace, &key.name).await?;
    let Some(device) = device.filter(|device| device.metadata.uid.as_deref() == Some(uid)) else { return Ok(()) };
    let Some(x509) = &device.spec.authentication.x509 else { return Ok(()) };
    let text = x509.certificate_signing_request.clone();
    // The request changed. The watch reports the change.
    let Ok(request) = SigningRequest::parse(&text) else { return Ok(()) };
    let asking = IssuanceRequest { writer, recorder, index, key, uid, signer, spread, device, text, request };
    match &signer.source {
        Source::Own(authority) => asking.sign(authority).await,
        Source::Issuer(issuer) => match asking.ask(issuer).await {
            Err(error) if !error.is_namespace_terminating() => {
                // Reported and retried later: no other action of the Device waits for it.
                asking.refused(error.reason(), shortened(&chain(&error)), REQUEUE_AFTER_ERROR).await;
            }
            outcome => return outcome,
        },
    }
    Ok(())
}

impl IssuanceRequest<'_> {
    async fn sign(&self, authority: &ClientAuthority) {
        let now = Timestamp::now();
        match authority.issue(&self.key.name, &self.request, self.signer.validity, now) {
            Ok(issued) => self.issued((issued.pem, issued.serial.to_string(), issued.not_after), now),
            Err(error) => {
                let message = format!("signing with the key of the Gateway's client authority failed: {}", chain(&error));
                self.refused(Reason::SigningFailed, message, REQUEUE_AFTER_ERROR).await;
            }
        }
    }

    fn issued(&self, issued: (String, String, Timestamp), now: Timestamp) {
        let digest = request::digest(&self.text);
        let certificate = self.signer.certificate(issued, digest, self.spread, now);
        self.index.lock().certificate_issued(self.key, self.uid, digest, certificate);
    }

    /// Stores the issuer's response. A new refusal is also an Event, because the status reports it only without a valid
    /// certificate.
    async fn answered(&self, refusal: Option<IssuanceRefusal>, requeue: SignedDuration) {
        let until = Some((Timestamp::now() + requeue).as_second());
        let digest = request::digest(&self.text);
        let answer = IssuerResponse { refusal: refusal.clone(), until };
        let is_news = self.index.lock().certificate_asked(self.key, self.uid, digest, answer);
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

    async fn refused(&self, reason: Reason, message: String, requeue: SignedDuration) {
        self.answered(Some(IssuanceRefusal { cause: Cause::new(reason, message), is_final: false }), requeue).await;
    }

    async fn ask(&self, issuer: &Issuer) -> Result<(), WriteError> {
        let name = name::certificate_request(&self.key.name);
        if self.request.sole_name() != Some(&*self.key.name) {
            let message = format!(
                "certificateSigningRequest must request only the subject CN={}, without other names or extensions, because an issuer signs what is requested \
                 and the broker uses the common name as user name. Create the request again with \
                 `openssl req -new -key device.key -subj /CN={}`",
                self.key.name, self.key.name
            );
            let cause = Cause::new(Reason::CommonNameMismatch, message);
            self.answered(Some(IssuanceRefusal { cause, is_final: true }), RETRY_REFUSED_AFTER).await;
            return Ok(());
        }
        let wanted = desired(self.key, self.uid, &self.request.pem(), &issuer.reference, self.signer);
        let namespace = &self.key.gateway.namespace;
        match read::<CertificateRequest>(self.writer.client(), namespace, &name).await? {
            None => self.create(&wanted).await,
            Some(found) if !found.owner_references().iter().any(|owner| owner.uid == *self.uid) => {
                let message = format!("a CertificateRequest {name} exists and does not belong to this Device: delete it");
                self.refused(Reason::NameConflict, message, REQUEUE_AFTER_ERROR).await;
                Ok(())
            }
            Some(found) if !matches(&found, &wanted) => self.replace(&wanted).await,
            Some(found) => self.follow(&found, &wanted, issuer).await,
        }
    }

    async fn create(&self, wanted: &CertificateRequest) -> Result<(), WriteError> {
        match self.writer.create(wanted).await {
            Ok(_) => {
                self.answered(None, REQUEUE_AFTER).await;
                Ok(())
            }
            // The resource type is not installed. When it is, the watch reports the object.
            Err(error) if error.is_not_found() => {
                let message = "the Gateway's clientAuthority names an issuer of cert-manager, and cert-manager is not installed in this cluster: \
                               install it, or leave issuerRef out";
                self.refused(Reason::CertManagerNotFound, message.to_owned(), RETRY_REFUSED_AFTER).await;
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
        let (reason, message) = match request_state(found) {
            RequestState::Pending(None) => {
                self.answered(None, REQUEUE_AFTER).await;
                return Ok(());
            }
            RequestState::Pending(Some(message)) => {
                let message = format!("CertificateRequest {name} waits for its issuer: {}", shortened(message));
                self.refused(Reason::AwaitingIssuer, message, REQUEUE_AFTER).await;
                return Ok(());
            }
            RequestState::Issued(chain) => match self.check(chain, issuer, now) {
                // The certificate was stored before, and the request could not be deleted.
                Ok((_, serial, _)) if self.has(&serial) => return self.replace(wanted).await,
                Ok(usable) => {
                    self.issued(usable, now);
                    return self.writer.delete::<CertificateRequest>(&self.key.gateway.namespace, &name).await;
                }
                Err(message) => (Reason::CertificateUnusable, message),
            },
            RequestState::Refused(reason, message) => (reason, format!("the issuer refuses the certificate: {}", shortened(message))),
        };
        let since = found.creation_timestamp().map_or(now, |time| time.0);
        let until = since + RETRY_REFUSED_AFTER;
        if until <= now {
            return self.replace(wanted).await;
        }
        let message = format!("CertificateRequest {name}: {message}. It is created again at {until}, or when you delete it");
        self.refused(reason, message, until.duration_since(now)).await;
        Ok(())
    }

    /// Whether the status contains the certificate with this serial number.
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
    message.chars().take(MAX_MESSAGE_CHARACTERS).collect()
}
