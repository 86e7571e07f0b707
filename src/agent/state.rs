//! What the agent knows, and what its broker should hold because of it: pure.

use std::collections::{BTreeMap, BTreeSet};

use jiff::Timestamp;
use thiserror::Error;

use crate::api::name::{INGEST_USERNAME_PREFIX, LINK_USERNAME};
use crate::broker::credential::entry::EntryError;
use crate::broker::credential::file::BrokerFiles;
use crate::broker::credential::shard::{self, Data, Incomplete, Shard, ShardError};
use crate::broker::credential::{Entry, Password, PresenceToken, hash};
use crate::certificate::server::{CertificateError, ServerCertificate};
use crate::configuration::agent::{TLS_CERTIFICATE, TLS_KEY};

/// News of a Secret. `data` is `None` where the API server says that there is no such Secret.
#[derive(Debug)]
pub struct Change {
    /// Which Secret.
    pub subject: Subject,
    /// Its data.
    pub data: Option<Data>,
    /// Who says so.
    pub origin: Origin,
}

/// A Secret that the agent reads.
#[derive(Clone, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub enum Subject {
    /// A shard of the Gateway's credentials, by number.
    Shard(usize),
    /// A certificate, by the name of its Secret.
    Tls(String),
}

/// Where news comes from.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Origin {
    /// The API server: this is how it is.
    ApiServer,
    /// The pod's volume: this is how it was a while ago.
    Volume,
}

/// News that cannot be used. What was there before stays.
#[derive(Debug, Error)]
pub enum ChangeError {
    /// A shard that the operator did not write.
    #[error("shard {number} is not used, and what it held before stays: its Secret was changed by someone else")]
    Shard {
        /// Which.
        number: usize,
        /// Why.
        #[source]
        source: ShardError,
    },

    /// A shard that was deleted.
    #[error("shard {number} was deleted, and what it held stays until the operator writes it again")]
    ShardDeleted {
        /// Which.
        number: usize,
    },

    /// A certificate that the broker cannot use.
    #[error("the certificate in Secret {secret} is not used; the broker keeps the one it has")]
    Certificate {
        /// Name of the Secret.
        secret: String,
        /// Why.
        #[source]
        source: CertificateError,
    },

    /// A Secret without certificate or key, or one that was deleted.
    #[error("Secret {secret} has no {TLS_CERTIFICATE} or no {TLS_KEY}; the broker keeps the certificate it has")]
    CertificateMissing {
        /// Name of the Secret.
        secret: String,
    },
}

/// What must become known before the broker can be given anything.
#[derive(Clone, Debug, Eq, Error, PartialEq)]
pub enum MissingSecret {
    /// A shard.
    #[error(transparent)]
    Shard(#[from] Incomplete),

    /// A certificate.
    #[error("Secret {secret} has no usable certificate yet")]
    Certificate {
        /// Name of the Secret.
        secret: String,
    },
}

/// What the agent knows.
#[derive(Debug, Default)]
pub struct AgentState {
    shards: BTreeMap<usize, Shard>,
    revisions: BTreeMap<usize, String>,
    /// Shards whose present content came from the API server.
    confirmed: BTreeSet<usize>,
    /// The API server says that there is no shard 0: the Gateway has no users yet.
    vacant: bool,
    certificates: BTreeMap<String, Option<ServerCertificate>>,
    /// Names that a certificate has to be for.
    host_names: Vec<String>,
    /// Secrets with a certificate whose time has not come, with that time.
    early: BTreeMap<String, (Data, Timestamp)>,
    /// Users of workers that may have a session, with a password of the agent's own for those that are gone.
    workers: BTreeMap<String, Password>,
}

/// What tells one content of the broker from another.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct BrokerContent {
    /// For each shard, by number, its revision.
    pub revisions: BTreeMap<usize, String>,

    /// Certificates by the name of their Secret.
    pub certificates: BTreeMap<String, ServerCertificate>,

    /// Users of workers that are gone, and whose sessions are still to be ended; with the password for that.
    pub departed: BTreeMap<String, Password>,
}

impl AgentState {
    /// Knows nothing but the names of the Secrets with certificates, and the users of workers that may have a session.
    pub fn new(tls_secrets: &[String], workers: impl IntoIterator<Item = String>) -> Self {
        Self {
            certificates: tls_secrets.iter().map(|secret| (secret.clone(), None)).collect(),
            workers: workers.into_iter().map(|worker| (worker, Password::generate())).collect(),
            ..Self::default()
        }
    }

    /// The same, with names that each certificate has to be for.
    #[must_use]
    pub fn with_host_names(mut self, host_names: &[String]) -> Self {
        self.host_names = host_names.to_vec();
        self
    }

    /// When a certificate becomes valid that came too early.
    #[must_use]
    pub fn next_due(&self) -> Option<Timestamp> {
        self.early.values().map(|(_, not_before)| *not_before).min()
    }

    /// What came too early and is due now, as news.
    pub fn take_due(&mut self, now: Timestamp) -> Vec<Change> {
        let due: Vec<String> = self.early.iter().filter(|(_, (_, not_before))| *not_before <= now).map(|(name, _)| name.clone()).collect();
        let change = |secret: String| {
            let (data, _) = self.early.remove(&secret)?;
            Some(Change { subject: Subject::Tls(secret), data: Some(data), origin: Origin::ApiServer })
        };
        due.into_iter().filter_map(change).collect()
    }

    /// Takes over news.
    ///
    /// # Errors
    /// When they cannot be used; what was there before stays.
    pub fn apply(&mut self, change: Change, now: Timestamp) -> Result<(), ChangeError> {
        match change.subject {
            Subject::Shard(number) => self.apply_shard(number, change.data.as_ref(), change.origin),
            Subject::Tls(secret) => self.apply_certificate(secret, change.data.as_ref(), now),
        }
    }

    fn apply_shard(&mut self, number: usize, data: Option<&Data>, origin: Origin) -> Result<(), ChangeError> {
        let Some(data) = data else {
            if self.shards.contains_key(&number) {
                return Err(ChangeError::ShardDeleted { number });
            }
            self.vacant |= number == 0 && origin == Origin::ApiServer;
            return Ok(());
        };
        let shard = Shard::parse(data).map_err(|source| ChangeError::Shard { number, source })?;
        if number == 0 {
            self.vacant = false;
            // What lies beyond would be stale if it ever came back.
            self.shards.retain(|number, _| *number < shard.count());
            self.revisions.retain(|number, _| *number < shard.count());
            self.confirmed.retain(|number| *number < shard.count());
        }
        self.shards.insert(number, shard);
        self.revisions.insert(number, shard::revision(data));
        if origin == Origin::ApiServer {
            self.confirmed.insert(number);
        }
        Ok(())
    }

    fn apply_certificate(&mut self, secret: String, data: Option<&Data>, now: Timestamp) -> Result<(), ChangeError> {
        // Only those that a listener names are followed.
        let Some(known) = self.certificates.get_mut(&secret) else { return Ok(()) };
        self.early.remove(&secret);
        let value = |key: &str| data.and_then(|data| data.get(key)).map(|value| value.0.as_slice());
        let (Some(chain), Some(key)) = (value(TLS_CERTIFICATE), value(TLS_KEY)) else {
            return Err(ChangeError::CertificateMissing { secret });
        };
        let certificate = match ServerCertificate::parse(chain, key) {
            Ok(certificate) => certificate,
            Err(source) => return Err(ChangeError::Certificate { secret, source }),
        };
        match certificate.check(now, &self.host_names) {
            Err(source) if known.is_some() => {
                if let (CertificateError::NotYetValid { not_before }, Some(data)) = (&source, data) {
                    self.early.insert(secret.clone(), (data.clone(), *not_before));
                }
                Err(ChangeError::Certificate { secret, source })
            }
            // Without any certificate the broker does not start at all, and its other listeners neither.
            Ok(()) | Err(_) => {
                *known = Some(certificate);
                Ok(())
            }
        }
    }

    /// What the broker should hold.
    ///
    /// # Errors
    /// When it is too early to tell.
    pub fn content(&mut self) -> Result<BrokerContent, MissingSecret> {
        let users: BTreeSet<String> = match shard::assemble(&self.shards) {
            Ok(users) => users.into_keys().map(str::to_owned).collect(),
            Err(_) if self.vacant => BTreeSet::new(),
            Err(incomplete) => return Err(incomplete.into()),
        };
        let missing = self.certificates.iter().find(|(_, certificate)| certificate.is_none());
        if let Some((secret, _)) = missing {
            return Err(MissingSecret::Certificate { secret: secret.clone() });
        }
        for worker in users.iter().filter(|user| user.starts_with(INGEST_USERNAME_PREFIX)) {
            self.workers.entry(worker.clone()).or_insert_with(Password::generate);
        }
        // From a volume a worker that is new may be missing, and one session ended too many is messages lost.
        let certain = !self.vacant && self.shards.keys().all(|number| self.confirmed.contains(number));
        let departed = |(worker, _): &(&String, &Password)| certain && !users.contains(*worker);
        Ok(BrokerContent {
            revisions: self.revisions.clone(),
            certificates: self.certificates.iter().filter_map(|(secret, known)| Some((secret.clone(), known.clone()?))).collect(),
            departed: self.workers.iter().filter(departed).map(|(worker, password)| (worker.clone(), password.clone())).collect(),
        })
    }

    /// The broker's files for the content that [`Self::content`] last gave.
    ///
    /// # Errors
    /// When a remembered worker has no valid name.
    pub fn files(&self, content: &BrokerContent, canary: &Password) -> Result<BrokerFiles, EntryError> {
        let departed = content.departed.iter().map(|(worker, password)| {
            // With no rule of its own it can do nothing but connect.
            Entry::new(worker, &hash::hash("", worker, password, hash::GENERATED_ITERATIONS), &[])
        });
        let departed = departed.collect::<Result<Vec<_>, _>>()?;
        let users = shard::assemble(&self.shards).unwrap_or_default();
        BrokerFiles::new(users.into_values().chain(&departed), canary)
    }

    /// Tokens with which the operator may read `/presence`; none before its user is known.
    #[must_use]
    pub fn presence_tokens(&self) -> Vec<PresenceToken> {
        let users = shard::assemble(&self.shards).unwrap_or_default();
        users.get(LINK_USERNAME).map(|operator| PresenceToken::of(operator).collect()).unwrap_or_default()
    }

    /// The session of a worker that is gone has been ended.
    pub fn session_ended(&mut self, worker: &str) {
        self.workers.remove(worker);
    }

    /// Users of workers that may have a session, to be remembered across restarts.
    #[must_use]
    pub fn workers(&self) -> BTreeSet<&str> {
        self.workers.keys().map(String::as_str).collect()
    }

    /// Whether anything usable is known of a Secret.
    #[must_use]
    pub fn knows(&self, subject: &Subject) -> bool {
        match subject {
            Subject::Shard(number) => self.shards.contains_key(number) || (*number == 0 && self.vacant),
            Subject::Tls(secret) => self.certificates.get(secret).is_some_and(Option::is_some),
        }
    }
}

#[cfg(test)]
#[path = "state_tests.rs"]
mod tests;
