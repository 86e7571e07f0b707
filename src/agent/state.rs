//! The agent's state, and the broker's content that derives from it. Pure.

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

/// A change of a Secret. `data` is `None` if the API server has no such Secret.
#[derive(Debug)]
pub struct Change {
    /// The Secret.
    pub subject: Subject,
    /// Its data.
    pub data: Option<Data>,
    /// The source of the change.
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

/// The source of a change.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Origin {
    /// The API server: the current state.
    ApiServer,
    /// The pod's volume: an earlier state.
    Volume,
}

/// An unusable change. The previous content stays.
#[derive(Debug, Error)]
pub enum ChangeError {
    /// A shard that the operator did not write.
    #[error("shard {number} is not used, and its previous content stays: another client changed its Secret")]
    Shard {
        /// Number of the shard.
        number: usize,
        /// The cause.
        #[source]
        source: ShardError,
    },

    /// A shard that was deleted.
    #[error("shard {number} was deleted, and its previous content stays until the operator writes it again")]
    ShardDeleted {
        /// Number of the shard.
        number: usize,
    },

    /// A certificate that the broker cannot use.
    #[error("the certificate in Secret {secret} is not used; the broker keeps its current certificate")]
    Certificate {
        /// Name of the Secret.
        secret: String,
        /// The cause.
        #[source]
        source: CertificateError,
    },

    /// A Secret without certificate or key, or a deleted Secret.
    #[error("Secret {secret} has no {TLS_CERTIFICATE} or no {TLS_KEY}; the broker keeps its current certificate")]
    CertificateMissing {
        /// Name of the Secret.
        secret: String,
    },
}

/// Input that the agent needs before it can write the broker's files.
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

/// The agent's state.
#[derive(Debug, Default)]
pub struct AgentState {
    shards: BTreeMap<usize, Shard>,
    revisions: BTreeMap<usize, String>,
    /// Shards whose current content came from the API server.
    confirmed: BTreeSet<usize>,
    /// The API server has no shard 0: the Gateway has no users yet.
    vacant: bool,
    certificates: BTreeMap<String, Option<ServerCertificate>>,
    /// Names that each certificate must contain, by the name of its Secret.
    host_names: BTreeMap<String, Vec<String>>,
    /// Secrets whose certificate is not valid yet, with the start of its validity.
    early: BTreeMap<String, (Data, Timestamp)>,
    /// Users of workers that may have a session. A removed worker has a password that the agent generated.
    workers: BTreeMap<String, Password>,
}

/// The identity of the broker's content.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct BrokerContent {
    /// Revision of each shard, by number.
    pub revisions: BTreeMap<usize, String>,

    /// Certificates by the name of their Secret.
    pub certificates: BTreeMap<String, ServerCertificate>,

    /// Users of removed workers whose sessions still have to end, with the password for that login.
    pub departed: BTreeMap<String, Password>,
}

impl AgentState {
    /// A state with only the names of the Secrets with certificates, each with the host names that it must contain, and the users of
    /// workers that may have a session.
    pub fn new(tls_secrets: BTreeMap<String, Vec<String>>, workers: impl IntoIterator<Item = String>) -> Self {
        Self {
            certificates: tls_secrets.keys().map(|secret| (secret.clone(), None)).collect(),
            host_names: tls_secrets,
            workers: workers.into_iter().map(|worker| (worker, Password::generate())).collect(),
            ..Self::default()
        }
    }

    /// The next time at which an early certificate becomes valid.
    #[must_use]
    pub fn next_due(&self) -> Option<Timestamp> {
        self.early.values().map(|(_, not_before)| *not_before).min()
    }

    /// Early certificates that are valid now, as changes.
    pub fn take_due(&mut self, now: Timestamp) -> Vec<Change> {
        let due: Vec<String> = self.early.iter().filter(|(_, (_, not_before))| *not_before <= now).map(|(name, _)| name.clone()).collect();
        let change = |secret: String| {
            let (data, _) = self.early.remove(&secret)?;
            Some(Change { subject: Subject::Tls(secret), data: Some(data), origin: Origin::ApiServer })
        };
        due.into_iter().filter_map(change).collect()
    }

    /// Applies a change.
    ///
    /// # Errors
    /// If the change is unusable. The previous content stays.
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
            // Shards beyond the count would be stale if the count grew again.
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
        // The agent watches only the Secrets that a listener names.
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
        match certificate.check(now, self.host_names.get(&secret).map_or(&[], Vec::as_slice)) {
            Err(source) if known.is_some() => {
                if let (CertificateError::NotYetValid { not_before }, Some(data)) = (&source, data) {
                    self.early.insert(secret.clone(), (data.clone(), *not_before));
                }
                Err(ChangeError::Certificate { secret, source })
            }
            // Without any certificate the broker does not start, and its other listeners do not work either.
            Ok(()) | Err(_) => {
                *known = Some(certificate);
                Ok(())
            }
        }
    }

    /// The wanted content of the broker.
    ///
    /// # Errors
    /// If required input is still missing.
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
        // A volume may lack a new worker. If the agent ended that worker's session, messages would be lost.
        let certain = !self.vacant && self.shards.keys().all(|number| self.confirmed.contains(number));
        let departed = |(worker, _): &(&String, &Password)| certain && !users.contains(*worker);
        Ok(BrokerContent {
            revisions: self.revisions.clone(),
            certificates: self.certificates.iter().filter_map(|(secret, known)| Some((secret.clone(), known.clone()?))).collect(),
            departed: self.workers.iter().filter(departed).map(|(worker, password)| (worker.clone(), password.clone())).collect(),
        })
    }

    /// The broker's files for the content that [`Self::content`] last returned.
    ///
    /// # Errors
    /// If a remembered worker has no valid name.
    pub fn files(&self, content: &BrokerContent, canary: &Password) -> Result<BrokerFiles, EntryError> {
        let departed = content.departed.iter().map(|(worker, password)| {
            // Without an access rule the user can only connect.
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

    /// Records that the session of a removed worker has ended.
    pub fn session_ended(&mut self, worker: &str) {
        self.workers.remove(worker);
    }

    /// Users of workers that may have a session, for the file that survives restarts.
    #[must_use]
    pub fn workers(&self) -> BTreeSet<&str> {
        self.workers.keys().map(String::as_str).collect()
    }

    /// Whether the state has usable content of a Secret.
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
