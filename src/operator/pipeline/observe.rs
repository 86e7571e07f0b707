//! All reads of a reconciliation: from the API server and the database.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use k8s_openapi::api::core::v1::{ConfigMap, Secret};
use kube::{Client, ResourceExt};
use tokio::time::timeout;

use super::database::Databases;
use crate::api::condition::Cause;
use crate::api::credentials_secret::refusal;
use crate::api::descriptor;
use crate::api::external::ExternalBroker;
use crate::api::reason::Reason;
use crate::api::{Gateway, Pipeline, name};
use crate::broker::credential::password::Password;
use crate::database::uri::{AUTHORITIES_KEY, ConnectionUri, ConnectionUriError};
use crate::operator::device::secret::PASSWORD_KEY;
use crate::operator::kubernetes::apply::{WriteError, read, read_all};
use crate::operator::kubernetes::secret::{required, required_value, value as value_of};
use crate::runtime::error::chain;
use crate::runtime::tls::TlsError;
use crate::sink::timescale::execute::{ExecuteError, observe_schema};
use crate::sink::timescale::observe;
use crate::state::dead_letter::{self, DeadLetters};
use crate::state::owner::Owner;
use crate::state::system;

/// Timeout of the query for the numbers of dead letters, which takes milliseconds.
const DEAD_LETTERS_TIMEOUT: Duration = Duration::from_secs(5);

/// The observed state of a Pipeline.
#[derive(Debug)]
pub struct Observed {
    /// Identity of the cluster.
    pub cluster: String,
    /// Gateways of the namespace with their labels, without those in deletion.
    pub gateways: BTreeMap<String, BTreeMap<String, String>>,
    /// The Gateways with an external broker.
    pub externals: BTreeMap<String, ExternalBroker>,
    /// Those of them whose Secret with the login exists and allows its use. Workers get no other.
    pub usable_logins: BTreeSet<String>,
    /// The connection URI, or why it is not available.
    pub uri: Result<ConnectionUri, Cause>,
    /// The database.
    pub database: DatabaseView,
    /// The numbers of dead letters, if the database returned them.
    pub dead_letters: Option<DeadLetters>,
    /// The FileDescriptorSet, if the Pipeline names one; or why it is not available.
    pub descriptor: Result<Option<Vec<u8>>, Cause>,
    /// Password of the workers, if a usable one exists.
    pub password: Option<Password>,
}

/// The observed state of the database.
#[derive(Debug)]
pub enum DatabaseView {
    /// The database could not be read for a temporary cause.
    Unseen(Cause),
    /// The database refused the read.
    Refused(Cause),
    /// The observed tables.
    Seen(observe::ObservedSchema),
}

/// The Pipeline's identity in the database.
#[must_use]
pub fn owner(cluster: &str, pipeline: &Pipeline) -> Owner {
    Owner { cluster: cluster.to_owned(), namespace: pipeline.namespace().unwrap_or_default(), pipeline: pipeline.name_any() }
}

/// Reads everything. An unavailable database is a result, not an error.
///
/// # Errors
/// If a call to the API server fails.
pub async fn observe(client: &Client, databases: &Databases, pipeline: &Pipeline) -> Result<Observed, WriteError> {
    let namespace = pipeline.namespace().unwrap_or_default();
    let gateways = read_all::<Gateway>(client, &namespace, "").await?;
    let gateways: Vec<Gateway> = gateways.into_iter().filter(|gateway| gateway.metadata.deletion_timestamp.is_none()).collect();
    let external = |gateway: &Gateway| Some((gateway.name_any(), gateway.spec.external.clone()?));
    let externals: BTreeMap<String, ExternalBroker> = gateways.iter().filter_map(external).collect();
    let usable_logins = usable_logins(client, &namespace, &externals).await?;
    let credentials = read::<Secret>(client, &namespace, &name::ingest(&pipeline.name_any())).await?;
    let uri = read_uri(client, pipeline).await?;
    let descriptor = read_descriptor(client, pipeline).await?;
    let (database, dead_letters) = match &uri {
        Ok(uri) => inspect(databases, pipeline, uri).await,
        Err(cause) => (DatabaseView::Unseen(cause.clone()), None),
    };
    Ok(Observed {
        cluster: databases.cluster().to_owned(),
        gateways: gateways.iter().map(|gateway| (gateway.name_any(), gateway.labels().clone())).collect(),
        externals,
        usable_logins,
        uri,
        descriptor,
        database,
        dead_letters,
        password: credentials.and_then(|secret| Password::given(&secret.data?.get(PASSWORD_KEY)?.0).ok()),
    })
}

/// The Gateways whose Secret with the login exists and allows its use.
async fn usable_logins(
    client: &Client,
    namespace: &str,
    externals: &BTreeMap<String, ExternalBroker>,
) -> Result<BTreeSet<String>, WriteError> {
    let mut usable = BTreeSet::new();
    for (gateway, broker) in externals {
        let secret = read::<Secret>(client, namespace, &broker.credentials_secret.name).await?;
        if secret.is_some_and(|secret| refusal(&secret).is_none()) {
            usable.insert(gateway.clone());
        }
    }
    Ok(usable)
}

/// The connection URI in the Secret that the Pipeline names.
///
/// # Errors
/// If a call to the API server fails.
pub async fn read_uri(client: &Client, pipeline: &Pipeline) -> Result<Result<ConnectionUri, Cause>, WriteError> {
    let reference = &pipeline.spec.sink.timescale.connection_secret;
    let secret = read::<Secret>(client, &pipeline.namespace().unwrap_or_default(), &reference.name).await?;
    Ok(connection_uri(secret.as_ref(), &reference.name, &reference.key))
}

/// The connection URI in a Secret, or the cause why it is invalid.
fn connection_uri(secret: Option<&Secret>, name: &str, key: &str) -> Result<ConnectionUri, Cause> {
    const WHAT: &str = "the connection URI";
    let secret = required(secret, name, key, WHAT)?;
    if let Some(cause) = refusal(secret) {
        return Err(cause);
    }
    let value = required_value(secret, name, key, WHAT)?;
    let invalid = |error: &str| Cause::new(Reason::InvalidConnectionUri, format!("Secret {name}, key {key}: {error}"));
    let text = std::str::from_utf8(value).map_err(|_| invalid("failed to read the URI: it is not UTF-8"))?;
    let uri: ConnectionUri = text.parse().map_err(|error: ConnectionUriError| invalid(&error.to_string()))?;
    let Some(authorities) = value_of(secret, AUTHORITIES_KEY) else { return Ok(uri) };
    let invalid =
        |error: &TlsError| Cause::new(Reason::InvalidAuthority, format!("Secret {name}, key {AUTHORITIES_KEY}: {}", chain(error)));
    uri.verified_by(authorities).map_err(|error| invalid(&error))
}

/// The FileDescriptorSet in the ConfigMap that the Pipeline names.
async fn read_descriptor(client: &Client, pipeline: &Pipeline) -> Result<Result<Option<Vec<u8>>, Cause>, WriteError> {
    let Some(protobuf) = &pipeline.spec.decode.protobuf else { return Ok(Ok(None)) };
    let reference = &protobuf.config_map_ref;
    let map = read::<ConfigMap>(client, &pipeline.namespace().unwrap_or_default(), &reference.name).await?;
    Ok(descriptor::read(map, reference).map(Some))
}

async fn inspect(databases: &Databases, pipeline: &Pipeline, uri: &ConnectionUri) -> (DatabaseView, Option<DeadLetters>) {
    let owner = databases.owner(pipeline);
    let database = databases.obtain(&owner, uri);
    let mut session = match database.session().await {
        Ok(session) => session,
        Err(cause) => return (DatabaseView::Unseen(cause), None),
    };
    let client = match session.client() {
        Ok(client) => client,
        Err(cause) => return (DatabaseView::Unseen(cause), None),
    };
    match observe_schema(client, &pipeline.spec.sink.timescale.table).await {
        Ok(observed) => {
            let mut dead_letters = None;
            let is_current = observed.system_version.is_some_and(|version| version >= system::VERSION);
            if is_current {
                let token = pipeline.spec.replay.as_ref().map(|replay| replay.token.as_str());
                dead_letters = timeout(DEAD_LETTERS_TIMEOUT, dead_letter::read(client, &owner, token)).await.ok().and_then(Result::ok);
            }
            if is_current {
                database.system_seen(&mut session, false);
            }
            (DatabaseView::Seen(observed), dead_letters)
        }
        Err(error) => {
            let cause = cause(&error);
            if matches!(error, ExecuteError::AwaitAnswer { .. }) {
                session.discard();
            }
            let unseen = cause.reason == Reason::DatabaseUnavailable;
            (if unseen { DatabaseView::Unseen(cause) } else { DatabaseView::Refused(cause) }, None)
        }
    }
}

/// An error of the database for a condition.
#[must_use]
pub fn cause(error: &ExecuteError) -> Cause {
    Cause::new(error.reason(), chain(error))
}

#[cfg(test)]
mod tests {
    use k8s_openapi::ByteString;

    use super::*;
    use crate::database::uri::TlsMode;

    #[test]
    fn each_invalid_connection_secret_has_its_reason() {
        let typed = |type_: &str| Secret { type_: Some(type_.to_owned()), ..Secret::default() };
        let secret = |key: &str, value: &[u8]| Secret {
            data: Some([(key.to_owned(), ByteString(value.to_vec()))].into()),
            ..typed("kubernetes.io/basic-auth")
        };
        let plain = |key: &str, value: &[u8]| Secret { type_: None, ..secret(key, value) };
        for (secret, reason) in [
            (None, "SecretNotFound"),
            (Some(typed("kubernetes.io/basic-auth")), "SecretKeyNotFound"),
            (Some(plain("uri", b"postgresql://u:secret@db/x")), "SecretNotAllowed"),
            (Some(plain("uri", b"secret")), "SecretNotAllowed"),
            (Some(secret("url", b"postgresql://u:p@db/x")), "SecretKeyNotFound"),
            (Some(secret("uri", b"\xff")), "InvalidConnectionUri"),
            (Some(secret("uri", b"postgresql://db/secret")), "InvalidConnectionUri"),
        ] {
            let cause = connection_uri(secret.as_ref(), "timescale", "uri").unwrap_err();
            assert_eq!(cause.reason.as_str(), reason);
            assert!(!cause.message.contains("secret@") && !cause.message.contains("/secret"), "{}", cause.message);
        }
        let good = secret("uri", b"postgresql://u:p@db/x\n");
        assert_eq!(connection_uri(Some(&good), "timescale", "uri").unwrap().tls(), TlsMode::Prefer);
        // The authority of a private database.
        let pem = rcgen::CertificateParams::default().self_signed(&rcgen::KeyPair::generate().unwrap()).unwrap().pem();
        let with = |pem: &str| {
            let mut secret = good.clone();
            secret.data.as_mut().unwrap().insert("ca.crt".to_owned(), ByteString(pem.as_bytes().to_vec()));
            connection_uri(Some(&secret), "timescale", "uri")
        };
        assert_eq!(with(&pem).unwrap().tls(), TlsMode::VerifyFull);
        assert_eq!(with("PEM").unwrap_err().reason.as_str(), "InvalidAuthority");
    }
}
