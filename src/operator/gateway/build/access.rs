//! Who the pod is, and what its agent may read and write: by name, so that it sees no other Gateway's credentials.

use k8s_openapi::api::core::v1::ServiceAccount;
use k8s_openapi::api::rbac::v1::{PolicyRule, Role, RoleBinding, RoleRef, Subject};

use super::{Valid, metadata};
use crate::api::name::{self, MAX_SHARDS};

pub(super) fn service_account(valid: &Valid) -> ServiceAccount {
    ServiceAccount { metadata: metadata(valid, name::broker(&valid.name)), ..ServiceAccount::default() }
}

pub(super) fn role(valid: &Valid) -> Role {
    // All shards that there may ever be, so that growing their number changes no permission.
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
