//! The Secrets that concern Devices: content of generated Secrets, and reading of all. Pure.

use std::collections::BTreeMap;

use k8s_openapi::ByteString;
use k8s_openapi::api::core::v1::Secret;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, OwnerReference};
use k8s_openapi::jiff::Timestamp;
use kube::{Resource, ResourceExt};
use serde_json::{Value, json};

use super::endpoint::Endpoint;
use super::key::{DeviceKey, GatewayKey};
use super::record::PasswordState;
use crate::api::Device;
use crate::api::condition::Cause;
use crate::api::credentials_secret::refusal;
use crate::api::device::{Access, Acl};
use crate::api::name::{
    self, GATEWAY_LABEL, INGEST_COMMANDS_ANNOTATION, INGEST_FILTER_ANNOTATION, INGEST_GATEWAYS_ANNOTATION, LINK_USERNAME, ROLE_AUTH_SHARD,
    ROLE_DEVICE_CREDENTIALS, ROLE_INGEST_CREDENTIALS, ROLE_LABEL, ROLE_LINK_CREDENTIALS,
};
use crate::api::name::{PASSWORD_SINCE_ANNOTATION, PREVIOUS_PASSWORD_ANNOTATION, ROTATE_PASSWORD_ANNOTATION};
use crate::api::reason::Reason;
use crate::broker::credential::entry::Entry;
use crate::broker::credential::hash::{self, GENERATED_ITERATIONS, GIVEN_ITERATIONS};
use crate::broker::credential::password::Password;
use crate::operator::kubernetes::apply::standard_labels;
use crate::operator::kubernetes::secret::{required, required_value, value};

/// Key of a Device's Secret and of a Pipeline's ingest Secret.
pub const PASSWORD_KEY: &str = "password";

/// The role of a Secret.
#[derive(Debug, Eq, PartialEq)]
pub enum Role {
    /// The generated password of a Device with this uid.
    Generated(DeviceKey, Box<str>),
    /// A shard of a Gateway.
    Shard(GatewayKey, usize),
    /// The credentials of a Pipeline's workers.
    Workers,
    /// The operator's own credentials for a Gateway.
    Link(GatewayKey),
    /// Any other Secret. A Device may reference it.
    Other,
}

/// Returns the role of a Secret.
#[must_use]
pub fn role(secret: &Secret) -> Role {
    let labels = secret.labels();
    let gateway = labels.get(GATEWAY_LABEL).map(|gateway| GatewayKey::new(&secret.namespace().unwrap_or_default(), gateway));
    match (labels.get(ROLE_LABEL).map(String::as_str), gateway) {
        (Some(ROLE_DEVICE_CREDENTIALS), Some(gateway)) => {
            let owner = secret.owner_references().iter().find(|owner| owner.kind == Device::kind(&()));
            match owner.filter(|owner| name::device_credentials(&owner.name) == secret.name_any()) {
                Some(owner) => Role::Generated(DeviceKey { gateway, name: owner.name.as_str().into() }, owner.uid.as_str().into()),
                None => Role::Other,
            }
        }
        (Some(ROLE_AUTH_SHARD), Some(gateway)) => {
            let number = secret.name_any().rsplit_once('-').and_then(|(_, number)| number.parse().ok());
            match number.filter(|number| name::auth_shard(&gateway.name, *number) == secret.name_any()) {
                Some(number) => Role::Shard(gateway, number),
                None => Role::Other,
            }
        }
        (Some(ROLE_INGEST_CREDENTIALS), _) => Role::Workers,
        (Some(ROLE_LINK_CREDENTIALS), Some(gateway)) if secret.name_any() == name::link_credentials(&gateway.name) => Role::Link(gateway),
        _ => Role::Other,
    }
}

/// The Secret with a generated password and all that a device needs to connect.
#[must_use]
pub fn generated(key: &DeviceKey, uid: &str, endpoint: &Endpoint, password: &Password, token: Option<&str>) -> Secret {
    let namespace = &key.gateway.namespace;
    let gateway = &key.gateway.name;
    let mut labels = standard_labels("device", gateway);
    labels.insert(GATEWAY_LABEL.to_owned(), gateway.to_string());
    labels.insert(ROLE_LABEL.to_owned(), ROLE_DEVICE_CREDENTIALS.to_owned());
    let mut data = endpoint.data();
    data.insert("username".to_owned(), ByteString(key.name.as_bytes().to_vec()));
    data.insert(PASSWORD_KEY.to_owned(), ByteString(password.expose().as_bytes().to_vec()));
    Secret {
        metadata: ObjectMeta {
            name: Some(name::device_credentials(&key.name)),
            namespace: Some(namespace.to_string()),
            labels: Some(labels),
            // A new password completes earlier rotation requests.
            annotations: token.map(|token| BTreeMap::from([(ROTATE_PASSWORD_ANNOTATION.to_owned(), token.to_owned())])),
            owner_references: Some(vec![owner(key, uid)]),
            ..ObjectMeta::default()
        },
        data: Some(data),
        ..Secret::default()
    }
}

/// The merge patch that replaces the password. The present password (with this hash) is accepted until the overlap ends.
#[must_use]
pub fn rotated(secret: &Secret, present: &str, password: &Password, token: Option<&str>, now: Timestamp, overlap: i64) -> Value {
    let until = Timestamp::from_second(now.as_second().saturating_add(overlap)).unwrap_or(Timestamp::MAX);
    let since = Timestamp::from_second(now.as_second()).unwrap_or(now);
    let mut annotations = json!({
        PASSWORD_SINCE_ANNOTATION: since.to_string(),
        PREVIOUS_PASSWORD_ANNOTATION: format!("{until} {present}"),
    });
    if let Some(token) = token {
        annotations[ROTATE_PASSWORD_ANNOTATION] = json!(token);
    }
    json!({
        // The API server refuses the patch if the Secret changed meanwhile. Then the next action is determined again.
        "metadata": {"resourceVersion": secret.metadata.resource_version, "annotations": annotations},
        "data": {PASSWORD_KEY: ByteString(password.expose().as_bytes().to_vec())},
    })
}

/// The owner reference of a Device with this uid.
pub(super) fn owner(key: &DeviceKey, uid: &str) -> OwnerReference {
    OwnerReference {
        api_version: Device::api_version(&()).into_owned(),
        kind: Device::kind(&()).into_owned(),
        name: key.name.to_string(),
        uid: uid.to_owned(),
        controller: Some(true),
        block_owner_deletion: None,
    }
}

/// The value, in the messages of causes.
const PASSWORD: &str = "the password";

/// Reads and hashes the password of a generated Secret. An empty or unusable password is a cause.
#[must_use]
pub fn read_generated(key: &DeviceKey, uid: &str, secret: &Secret) -> PasswordState {
    read(key, uid, secret, PASSWORD_KEY, GENERATED_ITERATIONS, None)
}

/// Reads and hashes the password of a user-provided Secret. `known` is the previous hash.
#[must_use]
pub fn read_given(key: &DeviceKey, uid: &str, secret: Option<&Secret>, named: (&str, &str), known: Option<&str>) -> PasswordState {
    let allowed = required(secret, named.0, named.1, PASSWORD).and_then(|secret| refusal(secret).map_or(Ok(secret), Err));
    match allowed {
        Ok(secret) => read(key, uid, secret, named.1, GIVEN_ITERATIONS, known),
        Err(cause) => PasswordState::Missing(Box::new(cause), known.map(Into::into)),
    }
}

fn read(key: &DeviceKey, uid: &str, secret: &Secret, data_key: &str, iterations: u32, known: Option<&str>) -> PasswordState {
    let name = secret.name_any();
    let password = required_value(secret, &name, data_key, PASSWORD).and_then(|bytes| {
        let invalid = |error| Cause::new(Reason::InvalidPassword, format!("Secret {name}, key {data_key}: {error}"));
        Password::given(bytes).map_err(invalid)
    });
    match password {
        Ok(password) => PasswordState::Hashed(hash::hash(uid, &key.name, &password, iterations).into()),
        Err(cause) => PasswordState::Missing(Box::new(cause), known.map(Into::into)),
    }
}

/// The operator's own user: it may publish desired states and read reported ones.
///
/// # Errors
/// A description of a malformed Secret.
pub fn read_link(secret: &Secret) -> Result<Entry, String> {
    let owner = secret.owner_references().first().ok_or("no owner")?;
    let bytes = value(secret, PASSWORD_KEY).ok_or("no key password")?;
    let password = Password::given(bytes).map_err(|error| error.to_string())?;
    let hash = hash::hash(&owner.uid, LINK_USERNAME, &password, GENERATED_ITERATIONS);
    // The operator clears the retained report of a deleted device.
    let topics = [name::desired_topic("+"), name::reported_topic("+")];
    let acls = topics.map(|topic| Acl { topic, access: Access::ReadWrite });
    Entry::new(LINK_USERNAME, &hash, &acls).map_err(|error| error.to_string())
}

/// The users of a Pipeline's workers, by Gateway. Empty without the annotation.
///
/// # Errors
/// A description of a malformed Secret.
pub fn read_workers(secret: &Secret) -> Result<BTreeMap<String, Vec<Entry>>, String> {
    let annotation = |key: &str| secret.annotations().get(key).map(String::as_str).unwrap_or_default();
    let owner = secret.owner_references().first().ok_or("no owner")?;
    let bytes = value(secret, PASSWORD_KEY).ok_or("no key password")?;
    let password = Password::given(bytes).map_err(|error| error.to_string())?;
    let mut acls = vec![Acl { topic: annotation(INGEST_FILTER_ANNOTATION).to_owned(), access: Access::Read }];
    let commands = secret.annotations().get(INGEST_COMMANDS_ANNOTATION);
    acls.extend(commands.map(|topic| Acl { topic: topic.clone(), access: Access::Write }));
    let username = name::ingest_username(&owner.name);
    let hash = hash::hash(&owner.uid, &username, &password, GENERATED_ITERATIONS);
    let entry = Entry::new(&username, &hash, &acls).map_err(|error| error.to_string())?;
    let gateways = annotation(INGEST_GATEWAYS_ANNOTATION).split(',').filter(|gateway| !gateway.is_empty());
    Ok(gateways.map(|gateway| (gateway.to_owned(), vec![entry.clone()])).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::name::CREDENTIALS_LABEL;

    #[test]
    fn a_given_password_needs_the_permission_of_its_secret() {
        let key = DeviceKey { gateway: GatewayKey::new("fleet", "plant-1"), name: "press-1".into() };
        let secret = |labels: &[(&str, &str)], password: &[u8]| Secret {
            metadata: ObjectMeta {
                name: Some("own".to_owned()),
                labels: Some(labels.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect()),
                ..ObjectMeta::default()
            },
            data: Some([("password".to_owned(), ByteString(password.to_vec()))].into()),
            ..Secret::default()
        };
        let labelled = [(CREDENTIALS_LABEL, "true")];
        for (secret, reason) in [
            (None, Some(Reason::SecretNotFound)),
            (Some(secret(&[], b"sesame")), Some(Reason::SecretNotAllowed)),
            (Some(secret(&labelled, b"sesame\n")), Some(Reason::InvalidPassword)),
            (Some(secret(&labelled, b"se\nsame")), Some(Reason::InvalidPassword)),
            (Some(secret(&labelled, b"sesame")), None),
        ] {
            match read_given(&key, "uid", secret.as_ref(), ("own", "password"), Some("hash before")) {
                PasswordState::Missing(cause, known) => {
                    assert_eq!((Some(cause.reason), known.as_deref()), (reason, Some("hash before")), "{}", cause.message);
                    assert!(!cause.message.contains("same"), "{}", cause.message);
                }
                PasswordState::Hashed(_) => assert_eq!(reason, None),
                other => panic!("{other:?}"),
            }
        }
    }
}
