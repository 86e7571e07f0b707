//! Checks the certificates of the broker's TLS listeners by handshakes, as a client makes them.
//!
//! The agent makes one handshake for each kind of key: Mosquitto (2.1.2) loads a certificate into the existing TLS context, and OpenSSL
//! keeps one certificate of each kind there. If a renewal changes the kind, the old certificate stays beside the new one until the
//! broker restarts, and some or even most clients still get the old one.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use futures::future::join_all;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use rustls::AlertDescription;
use rustls_pki_types::ServerName;
use thiserror::Error;
use tokio::net::TcpStream;
use tokio::sync::watch;
use tokio::time::{Instant, timeout};
use tokio_rustls::TlsConnector;
use tracing::{debug, info, warn};

use super::presence::Presence;
use crate::certificate::fingerprint;
use crate::certificate::server::{CertificateError, ServerCertificate, validity};
use crate::configuration::agent::{PresentedCertificate, TlsListener};
use crate::runtime::backoff::Backoff;
use crate::runtime::error::chain;
use crate::runtime::tls::{KeyKind, TlsError, Verification, client_configuration};

/// Timeout of a handshake.
const TIMEOUT: Duration = Duration::from_secs(5);

/// Delays after a handshake that did not present the expected certificate.
const INITIAL_DELAY: Duration = Duration::from_millis(50);
const MAX_DELAY: Duration = Duration::from_secs(30);

/// The agent logs a certificate that is still not presented after this long.
const REPORT_AFTER: Duration = Duration::from_secs(10);

/// Values by the name of the Secret that should contain the certificate.
pub type Presented = BTreeMap<String, PresentedCertificate>;

/// Why the agent cannot read a listener's certificate.
#[derive(Debug, Error)]
pub enum HandshakeError {
    /// No answer, or an answer that is not TLS.
    #[error("the TLS handshake with port {port} of the broker failed: check whether limits.maxConnections is reached")]
    Connect {
        /// Port of the listener.
        port: u16,
        /// The cause.
        #[source]
        source: std::io::Error,
    },

    /// No complete answer in time.
    #[error("port {port} of the broker did not answer within {} s", TIMEOUT.as_secs())]
    Timeout {
        /// Port of the listener.
        port: u16,
    },

    /// An answer without a readable certificate.
    #[error("port {port} of the broker presents no readable certificate")]
    Read {
        /// Port of the listener.
        port: u16,
        /// The cause.
        #[source]
        source: CertificateError,
    },

    /// An error of the agent's own TLS configuration.
    #[error(transparent)]
    SetUp(#[from] TlsError),
}

impl HandshakeError {
    /// Whether the broker answered that no parameters match: here, that it has no key of the requested kind.
    fn is_refusal(&self) -> bool {
        let Self::Connect { source, .. } = self else { return false };
        let error = source.get_ref().and_then(|inner| inner.downcast_ref::<rustls::Error>());
        matches!(error, Some(rustls::Error::AlertReceived(AlertDescription::HandshakeFailure)))
    }
}

/// Observes the certificates that the broker presents.
#[derive(Debug)]
pub struct Presentation {
    host: String,
    listeners: Vec<TlsListener>,
    presented: watch::Sender<Option<Presented>>,
    /// The counter of refusals. It excludes these handshakes.
    presence: Presence,
    /// Fingerprints by Secret, once every listener has presented these and no others.
    settled: Option<BTreeMap<String, String>>,
    next: Option<Instant>,
    backoff: Backoff,
    since: Option<Instant>,
}

impl Presentation {
    /// An observer of these listeners on `host`, an IP address. Publishes the result in `presented`; `None` before the first observation.
    #[must_use]
    pub fn new(host: &str, listeners: Vec<TlsListener>, presented: watch::Sender<Option<Presented>>) -> Self {
        let (host, presence) = (host.to_owned(), Presence::new());
        Self {
            host,
            listeners,
            presented,
            presence,
            settled: None,
            next: None,
            backoff: Backoff::new(INITIAL_DELAY, MAX_DELAY),
            since: None,
        }
    }

    /// The same observer, which marks its own refused handshakes there.
    #[must_use]
    pub fn with_presence(mut self, presence: Presence) -> Self {
        self.presence = presence;
        self
    }

    /// Discards the observations: the broker has ended, and its successor may present other certificates.
    pub fn forget(&mut self) {
        self.settled = None;
    }

    /// The broker has read its files: observe now, unless these certificates were observed before.
    pub fn expect(&mut self, certificates: &BTreeMap<String, ServerCertificate>) {
        if self.settled.as_ref() == Some(&fingerprints(certificates)) {
            return;
        }
        self.settled = None;
        self.next = Some(Instant::now());
        self.backoff.reset();
        self.since = self.next;
    }

    /// Waits for the next observation.
    #[must_use]
    pub fn due(&self) -> Option<Instant> {
        self.next
    }

    /// Observes all listeners, and schedules a retry if a listener does not present its certificate of these.
    pub async fn observe(&mut self, certificates: &BTreeMap<String, ServerCertificate>) {
        let seen = join_all(self.listeners.iter().map(|listener| presented_by(&self.host, listener.port, &self.presence))).await;
        let mut presented = self.presented.borrow().clone().unwrap_or_default();
        presented.retain(|secret, _| certificates.contains_key(secret));
        let mut outstanding = Vec::new();
        let mut settled: BTreeMap<&str, bool> = BTreeMap::new();
        for (TlsListener { port, secret, .. }, seen) in self.listeners.iter().zip(seen) {
            match seen {
                Ok(seen) => {
                    let wanted = certificates.get(secret).map(|certificate| certificate.fingerprint.as_str());
                    let Some((seen, wanted)) = classify(seen, wanted) else { continue };
                    if !wanted {
                        outstanding.push(format!("port {port} presents another certificate than that of Secret {secret}"));
                    }
                    // A listener that is not up to date decides the published value.
                    if *settled.get(secret.as_str()).unwrap_or(&true) {
                        presented.insert(secret.clone(), seen);
                    }
                    settled.insert(secret, wanted);
                }
                Err(error) => {
                    debug!("{}", chain(&error));
                    outstanding.push(chain(&error));
                }
            }
        }
        self.publish(presented);
        self.settled = outstanding.is_empty().then(|| fingerprints(certificates));
        self.next = self.schedule_retry(&outstanding);
    }

    fn schedule_retry(&mut self, outstanding: &[String]) -> Option<Instant> {
        if outstanding.is_empty() {
            return None;
        }
        if self.since.is_some_and(|since| since.elapsed() >= REPORT_AFTER) {
            warn!(outstanding = outstanding.join("; "), "the broker does not present the expected certificates");
            self.since = None;
        }
        Some(Instant::now() + self.backoff.next_delay())
    }

    fn publish(&self, presented: Presented) {
        self.presented.send_if_modified(|known| {
            let has_changed = known.as_ref() != Some(&presented);
            if has_changed {
                let secrets: Vec<&str> = presented.keys().map(String::as_str).collect();
                info!(secrets = secrets.join(", "), "the presented certificates have changed");
                *known = Some(presented);
            }
            has_changed
        });
    }
}

fn fingerprints(certificates: &BTreeMap<String, ServerCertificate>) -> BTreeMap<String, String> {
    certificates.iter().map(|(secret, certificate)| (secret.clone(), certificate.fingerprint.clone())).collect()
}

/// The published certificate of a listener that presented these, and whether it presents exactly the wanted certificate.
fn classify(mut seen: Vec<PresentedCertificate>, wanted: Option<&str>) -> Option<(PresentedCertificate, bool)> {
    let Some(position) = seen.iter().position(|one| Some(one.fingerprint.as_str()) == wanted) else {
        return seen.pop().map(|other| (other, false));
    };
    let mut found = seen.swap_remove(position);
    found.former_not_after = seen.pop().map(|former| former.not_after);
    let alone = found.former_not_after.is_none();
    Some((found, alone))
}

/// The certificates that a listener presents and has the keys of: at least one.
async fn presented_by(host: &str, port: u16, presence: &Presence) -> Result<Vec<PresentedCertificate>, HandshakeError> {
    let mut presented_by = Vec::new();
    let mut refusal = None;
    // Sequential handshakes: each occupies one of the listener's connections.
    for kind in KeyKind::ALL {
        match handshake(host, port, kind, presence).await {
            Ok(certificate) => presented_by.push(certificate),
            Err(error) if error.is_refusal() => refusal = Some(error),
            Err(error) => return Err(error),
        }
    }
    match refusal {
        Some(refusal) if presented_by.is_empty() => Err(refusal),
        _ => Ok(presented_by),
    }
}

/// The certificate that a listener presents to a client that accepts only this kind of key.
async fn handshake(host: &str, port: u16, kind: KeyKind, presence: &Presence) -> Result<PresentedCertificate, HandshakeError> {
    let configuration = client_configuration(Verification::UnverifiedOf(kind))?;
    let failed = |source| HandshakeError::Connect { port, source };
    let name = ServerName::try_from(host.to_owned()).map_err(|error| failed(std::io::Error::other(error)))?;
    let shake = async {
        let stream = TcpStream::connect((host, port)).await?;
        // The listener refuses if it has no key of this kind, or if it requires a client certificate.
        presence.expect_own(stream.local_addr()?);
        TlsConnector::from(Arc::new(configuration)).connect(name, stream).await
    };
    let stream = timeout(TIMEOUT, shake).await.map_err(|_| HandshakeError::Timeout { port })?.map_err(failed)?;
    let leaf = stream.get_ref().1.peer_certificates().and_then(<[_]>::first);
    let read = |source| HandshakeError::Read { port, source };
    let leaf = leaf.ok_or(CertificateError::NoCertificate).map_err(read)?;
    let (_, not_after) = validity(leaf).map_err(read)?;
    Ok(PresentedCertificate { fingerprint: fingerprint(leaf), not_after: Time(not_after), former_not_after: None })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_wanted_certificate_is_published_if_a_listener_presents_it() {
        let presented_by = |fingerprint: &str, year: u8| PresentedCertificate {
            fingerprint: fingerprint.to_owned(),
            not_after: Time(format!("20{year}-01-01T00:00:00Z").parse().unwrap()),
            former_not_after: None,
        };
        let beside = PresentedCertificate { former_not_after: Some(presented_by("old", 30).not_after), ..presented_by("new", 40) };
        for (seen, published) in [
            (vec![], None),
            (vec![presented_by("new", 40)], Some((presented_by("new", 40), true))),
            (vec![presented_by("old", 30)], Some((presented_by("old", 30), false))),
            (vec![presented_by("old", 30), presented_by("new", 40)], Some((beside.clone(), false))),
            (vec![presented_by("new", 40), presented_by("old", 30)], Some((beside, false))),
        ] {
            assert_eq!(classify(seen, Some("new")), published);
        }
        assert_eq!(classify(vec![presented_by("new", 40)], None), Some((presented_by("new", 40), false)), "nothing is wanted");
    }
}
