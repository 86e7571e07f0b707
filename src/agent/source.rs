//! The sources of Secrets: the API server, and the pod's volume while the API server is unavailable.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use futures::StreamExt;
use k8s_openapi::ByteString;
use k8s_openapi::api::core::v1::Secret;
use kube::runtime::WatchStreamExt;
use kube::runtime::watcher::{Config, Event, watcher};
use kube::{Api, Client};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use tokio::time::sleep;
use tracing::{info, warn};

use super::state::{Change, Origin, Subject};
use crate::api::name::{MAX_SHARDS, auth_shard};
use crate::broker::credential::shard::{self, ACLS_KEY, CERTIFICATE_KEYS_KEY, COUNT_KEY, Data, PASSWORDS_KEY};
use crate::configuration::agent::{AgentConfiguration, TLS_CERTIFICATE, TLS_KEY, shard_folder, tls_folder};
use crate::runtime::error::chain;

/// Timeout for the first answers of the API server. After it the agent reads the volume, which can be a minute old.
const API_SERVER_TIMEOUT: Duration = Duration::from_secs(3);

/// Sends changes of the Gateway's Secrets until the receiver is dropped. Sends the content of the volume once, if the API server has
/// not returned all Secrets in time.
pub async fn run(client: Option<Client>, configuration: AgentConfiguration, secrets: PathBuf, changes: mpsc::Sender<Change>) {
    let received = watch::Sender::new(std::collections::BTreeSet::new());
    let fallback = fall_back(&configuration, &secrets, received.subscribe(), &changes);
    let Some(client) = client else { return fallback.await };
    let api = Api::<Secret>::namespaced(client, &configuration.namespace);
    let watcher_task = SecretWatcher { api, gateway: configuration.gateway.clone(), changes: changes.clone(), received };
    let secrets: Vec<String> = configuration.tls_secrets().into_keys().collect();
    tokio::join!(fallback, watcher_task.run(&secrets));
}

/// Sends the volume's content of every Secret that the API server has not returned.
async fn fall_back(
    configuration: &AgentConfiguration,
    secrets: &Path,
    received: watch::Receiver<std::collections::BTreeSet<Subject>>,
    changes: &mpsc::Sender<Change>,
) {
    sleep(API_SERVER_TIMEOUT).await;
    let tls_secrets: Vec<String> = configuration.tls_secrets().into_keys().collect();
    let mounted = mounted(secrets, &tls_secrets);
    let missing: Vec<Change> = mounted.into_iter().filter(|change| !received.borrow().contains(&change.subject)).collect();
    if !missing.is_empty() {
        info!(secrets = missing.len(), "the API server has not returned these Secrets yet: reading them from the pod's volume");
    }
    for change in missing {
        // The receiver is dropped: the agent stops.
        let _ = changes.send(change).await;
    }
}

/// Reads a Secret from the volume.
#[must_use]
pub fn mounted(folder: &Path, tls_secrets: &[String]) -> Vec<Change> {
    let read = |subject: Subject, part: &str, keys: &[&str], optional: &[&str]| {
        let value = |key: &&str| Some(((*key).to_owned(), ByteString(std::fs::read(folder.join(part).join(key)).ok()?)));
        // All keys or none: the kubelet swaps the folder as a whole.
        let data: Option<Data> = keys.iter().map(value).collect();
        let data = data?.into_iter().chain(optional.iter().filter_map(value)).collect();
        Some(Change { subject, data: Some(data), origin: Origin::Volume })
    };
    let shard =
        |number| read(Subject::Shard(number), &shard_folder(number), &[PASSWORDS_KEY, ACLS_KEY, COUNT_KEY], &[CERTIFICATE_KEYS_KEY]);
    let tls = |secret: &String| read(Subject::Tls(secret.clone()), &tls_folder(secret), &[TLS_CERTIFICATE, TLS_KEY], &[]);
    (0..MAX_SHARDS).filter_map(shard).chain(tls_secrets.iter().filter_map(tls)).collect()
}

/// Watches each Secret by its name, so that the Role needs to allow only these names.
struct SecretWatcher {
    api: Api<Secret>,
    gateway: String,
    changes: mpsc::Sender<Change>,
    received: watch::Sender<std::collections::BTreeSet<Subject>>,
}

impl SecretWatcher {
    async fn run(self, tls_secrets: &[String]) {
        let (count, mut counts) = watch::channel(1_usize);
        let mut fixed = JoinSet::new();
        for secret in tls_secrets {
            fixed.spawn(self.watch_secret(Subject::Tls(secret.clone()), secret.clone(), None));
        }
        fixed.spawn(self.watch_secret(Subject::Shard(0), auth_shard(&self.gateway, 0), Some(count)));
        let mut others: BTreeMap<usize, tokio::task::AbortHandle> = BTreeMap::new();
        let mut tasks = JoinSet::new();
        while counts.changed().await.is_ok() {
            let count = *counts.borrow_and_update();
            for number in (1..count).filter(|number| !others.contains_key(number)).collect::<Vec<_>>() {
                let following = self.watch_secret(Subject::Shard(number), auth_shard(&self.gateway, number), None);
                others.insert(number, tasks.spawn(following));
            }
            for (_, surplus) in others.split_off(&count.max(1)) {
                surplus.abort();
            }
        }
    }

    /// Sends changes of one Secret until the receiver is dropped. Shard 0 also contains the number of shards.
    fn watch_secret(&self, subject: Subject, name: String, count: Option<watch::Sender<usize>>) -> impl Future<Output = ()> + use<> {
        let (changes, received) = (self.changes.clone(), self.received.clone());
        let config = Config::default().fields(&format!("metadata.name={name}"));
        let events = watcher(self.api.clone(), config).default_backoff();
        async move {
            let mut events = std::pin::pin!(events);
            let mut listed = false;
            while let Some(event) = events.next().await {
                let data = match event {
                    Ok(Event::Init) => {
                        listed = false;
                        continue;
                    }
                    Ok(Event::InitApply(secret) | Event::Apply(secret)) => {
                        listed = true;
                        Some(secret.data.unwrap_or_default())
                    }
                    Ok(Event::InitDone) if listed => continue,
                    Ok(Event::InitDone | Event::Delete(_)) => None,
                    Err(error) => {
                        warn!(secret = name, error = chain(&error), "failed to watch a Secret: retrying");
                        continue;
                    }
                };
                if let (Some(count), Some(number)) = (&count, data.as_ref().and_then(shard::declared_count)) {
                    count.send_if_modified(|known| std::mem::replace(known, number) != number);
                }
                received.send_if_modified(|received| received.insert(subject.clone()));
                if changes.send(Change { subject: subject.clone(), data, origin: Origin::ApiServer }).await.is_err() {
                    return;
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_complete_secrets_are_read_from_the_volume() {
        let folder = tempfile::tempdir().unwrap();
        let write = |part: &str, key: &str| {
            std::fs::create_dir_all(folder.path().join(part)).unwrap();
            std::fs::write(folder.path().join(part).join(key), key).unwrap();
        };
        for key in [PASSWORDS_KEY, ACLS_KEY, COUNT_KEY] {
            write("shards/3", key);
        }
        write("shards/3", CERTIFICATE_KEYS_KEY);
        write("shards/4", PASSWORDS_KEY);
        write("tls/a.b", TLS_CERTIFICATE);
        write("tls/a.b", TLS_KEY);
        write("tls/other", TLS_CERTIFICATE);
        let mounted = mounted(folder.path(), &["a.b".to_owned(), "other".to_owned()]);
        assert!(mounted[0].data.as_ref().unwrap().contains_key(CERTIFICATE_KEYS_KEY));
        let subjects: Vec<Subject> = mounted.into_iter().map(|change| change.subject).collect();
        assert_eq!(subjects, [Subject::Shard(3), Subject::Tls("a.b".to_owned())]);
    }
}
