//! The ServiceAccount of the pod, and the Role of its agent: by object name, so that it cannot read another Gateway's credentials.

use k8s_openapi::ByteString;
use k8s_openapi::api::core::v1::{Secret, ServiceAccount};
use k8s_openapi::api::rbac::v1::{PolicyRule, Role, RoleBinding, RoleRef, Subject};

use super::{Valid, metadata};
use crate::api::name::{self, MAX_SHARDS};
use crate::broker::credential::Password;
use crate::configuration::agent::TLS_AUTHORITIES;
use crate::operator::device::secret::PASSWORD_KEY;

pub(super) fn service_account(valid: &Valid) -> ServiceAccount {
    ServiceAccount { metadata: metadata(valid, name::broker(&valid.name)), ..ServiceAccount::default() }
}

pub(super) fn role(valid: &Valid) -> Role {
    // All possible shards, so that a larger number of shards changes no permission.
    let shards = (0..MAX_SHARDS).map(|shard| name::auth_shard(&valid.name, shard));
    let secrets = shards.chain(valid.tls_secrets.iter().cloned()).collect();
    Role {
        metadata: metadata(valid, name::broker(&valid.name)),
        rules: Some(vec![
            rule("secrets", secrets, &["get", "list", "watch"]),
            rule("configmaps", vec![name::agent_report(&valid.name)], &["get", "patch"]),
        ]),
    }
}

/// The operator's own credential for the broker, with the certificates that verify the internal ports.
#[must_use]
pub fn link_credentials(valid: &Valid, password: &Password) -> Secret {
    let mut metadata = metadata(valid, name::link_credentials(&valid.name));
    metadata.labels.get_or_insert_default().insert(name::ROLE_LABEL.to_owned(), name::ROLE_LINK_CREDENTIALS.to_owned());
    let authorities = valid.internal.authorities.clone().map(|pem| (TLS_AUTHORITIES, pem));
    let data = [(PASSWORD_KEY, password.expose().as_bytes().to_vec())].into_iter().chain(authorities);
    let data = data.map(|(key, value)| (key.to_owned(), ByteString(value))).collect();
    Secret { metadata, data: Some(data), ..Secret::default() }
}

fn rule(resource: &str, names: Vec<String>, verbs: &[&str]) -> PolicyRule {
    PolicyRule {
        api_groups: Some(vec![String::new()]),
        resources: Some(vec![resource.to_owned()]),
        resource_names: Some(names),
        verbs: verbs.iter().map(|verb| (*verb).to_owned()).collect(),
        ..PolicyRule::default()
    }
}

pub(super) fn role_binding(valid: &Valid) -> RoleBinding {
    let name = name::broker(&valid.name);
    RoleBinding {
        metadata: metadata(valid, name.clone()),
        role_ref: RoleRef { api_group: Some("rbac.authorization.k8s.io".to_owned()), kind: "Role".to_owned(), name: name.clone() },
        subjects: Some(vec![Subject {
            kind: "ServiceAccount".to_owned(),
            name,
            namespace: Some(valid.namespace.clone()),
            ..Subject::default()
        }]),
    }
}
