//! What the broker presents on its TLS listeners: a handshake with each, as a client would do it.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use futures::future::join_all;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use rustls_pki_types::ServerName;
use thiserror::Error;
use tokio::net::TcpStream;
use tokio::sync::watch;
use tokio::time::{Instant, timeout};
use tokio_rustls::TlsConnector;
use tracing::{debug, info, warn};

use crate::certificate::fingerprint;
use crate::certificate::server::{CertificateError, ServerCertificate, validity};
use crate::configuration::agent::{PresentedCertificate, TlsListener};
use crate::runtime::error::chain;
use crate::runtime::tls::{TlsError, Verification, client_configuration};

/// The longest a handshake may take.
const TIMEOUT: Duration = Duration::from_secs(5);

/// The pauses after a handshake that did not show what it should: each twice the one before.
const FIRST_PAUSE: Duration = Duration::from_millis(50);
const LONGEST_PAUSE: Duration = Duration::from_secs(30);

/// What is still not presented after this long shows in the log.
const WORTH_TELLING: Duration = Duration::from_secs(10);

/// By the name of the Secret that a certificate should have come from.
pub type Presented = BTreeMap<String, PresentedCertificate>;

/// Why nobody knows what a listener presents.
#[derive(Debug, Error)]
pub enum HandshakeError {
    /// No answer, or one that is not TLS.
    #[error("failed to shake hands with port {port} of the broker: does it have as many clients as limits.maxConnections allows?")]
    Connect {
        /// Of the listener.
        port: u16,
        /// Why.
        #[source]
        source: std::io::Error,
    },

    /// No whole answer.
    #[error("port {port} of the broker did not answer within {} s", TIMEOUT.as_secs())]
    Timeout {
        /// Of the listener.
        port: u16,
    },

    /// An answer without a certificate that can be read.
    #[error("port {port} of the broker presents no readable certificate")]
    Read {
        /// Of the listener.
        port: u16,
        /// Why.
        #[source]
        source: CertificateError,
    },

    /// Of our own side.
    #[error(transparent)]
    SetUp(#[from] TlsError),
}

/// Follows what the broker presents.
#[derive(Debug)]
pub struct Presentation {
    host: String,
    listeners: Vec<TlsListener>,
    presented: watch::Sender<Option<Presented>>,
    next: Option<Instant>,
    pause: Duration,
    since: Option<Instant>,
}

impl Presentation {
    /// Of these listeners on `host`, an IP address. Tells in `presented` what was seen; `None` before the first look.
    #[must_use]
    pub fn new(host: &str, listeners: &[TlsListener], presented: watch::Sender<Option<Presented>>) -> Self {
        Self { host: host.to_owned(), listeners: listeners.to_vec(), presented, next: None, pause: FIRST_PAUSE, since: None }
    }

    /// The broker says that it has read its files: time to look.
    pub fn expect(&mut self) {
        self.next = Some(Instant::now());
        self.pause = FIRST_PAUSE;
        self.since = self.next;
    }

    /// When to look.
    #[must_use]
    pub fn due(&self) -> Option<Instant> {
        self.next
    }

    /// Looks at all listeners, and again later where one does not present its certificate of these.
    pub async fn look(&mut self, certificates: &BTreeMap<String, ServerCertificate>) {
        let seen = join_all(self.listeners.iter().map(|listener| handshake(&self.host, listener.port))).await;
        let mut presented = self.presented.borrow().clone().unwrap_or_default();
        presented.retain(|secret, _| certificates.contains_key(secret));
        let mut outstanding = Vec::new();
        let mut settled: BTreeMap<&str, bool> = BTreeMap::new();
        for (TlsListener { port, secret }, seen) in self.listeners.iter().zip(seen) {
            match seen {
                Ok(seen) => {
                    let wanted = certificates.get(secret).is_some_and(|certificate| certificate.fingerprint == seen.fingerprint);
                    if !wanted {
                        outstanding.push(format!("port {port} presents another certificate than that of Secret {secret}"));
                    }
                    // One listener that lags behind is what there is to tell.
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
        self.tell(presented);
        self.next = self.later(&outstanding);
    }

    fn later(&mut self, outstanding: &[String]) -> Option<Instant> {
        if outstanding.is_empty() {
            return None;
        }
        if self.since.is_some_and(|since| since.elapsed() >= WORTH_TELLING) {
            warn!(outstanding = outstanding.join("; "), "the broker does not present what it should");
            self.since = None;
        }
        let next = Instant::now() + self.pause;
        self.pause = (self.pause * 2).min(LONGEST_PAUSE);
        Some(next)
    }

    fn tell(&self, presented: Presented) {
        self.presented.send_if_modified(|known| {
            let news = known.as_ref() != Some(&presented);
            if news {
                let secrets: Vec<&str> = presented.keys().map(String::as_str).collect();
                info!(secrets = secrets.join(", "), "the broker presents certificates that were not known to be presented");
                *known = Some(presented);
            }
            news
        });
    }
}

/// What a listener presents, and has the key of.
async fn handshake(host: &str, port: u16) -> Result<PresentedCertificate, HandshakeError> {
    let configuration = client_configuration(Verification::Unverified)?;
    let failed = |source| HandshakeError::Connect { port, source };
    let name = ServerName::try_from(host.to_owned()).map_err(|error| failed(std::io::Error::other(error)))?;
    let shake = async {
        let stream = TcpStream::connect((host, port)).await?;
        TlsConnector::from(Arc::new(configuration)).connect(name, stream).await
    };
    let stream = timeout(TIMEOUT, shake).await.map_err(|_| HandshakeError::Timeout { port })?.map_err(failed)?;
    let leaf = stream.get_ref().1.peer_certificates().and_then(<[_]>::first);
    let read = |source| HandshakeError::Read { port, source };
    let leaf = leaf.ok_or(CertificateError::NoCertificate).map_err(read)?;
    let (_, not_after) = validity(leaf).map_err(read)?;
    Ok(PresentedCertificate { fingerprint: fingerprint(leaf), not_after: Time(not_after) })
}
