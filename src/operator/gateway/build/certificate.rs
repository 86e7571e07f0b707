//! The Secrets of the authorities and certificates that the operator issues.

use k8s_openapi::api::core::v1::Secret;

use super::{Valid, metadata};
use crate::api::name;
use crate::certificate::authority::Data;
use crate::operator::gateway::tls::Issued;

/// The Secrets of the authorities and of their certificates. Each authority comes first: a certificate is useless if its authority was not
/// stored.
pub(super) fn issued(valid: &Valid) -> Vec<Secret> {
    let gateway = &valid.name;
    let internal = (&valid.internal.issued, name::internal_authority(gateway), name::internal_certificate(gateway));
    let listeners = (&valid.tls.issued, name::server_authority(gateway), name::server_certificate(gateway));
    let secrets = |(issued, authority, certificate): (&Option<Issued>, String, String)| {
        let issued = issued.as_ref()?;
        let authority = secret(valid, authority, name::ROLE_SERVER_AUTHORITY, issued.authority.clone());
        Some([authority, secret(valid, certificate, name::ROLE_SERVER_CERTIFICATE, issued.certificate.clone())])
    };
    [internal, listeners].into_iter().filter_map(secrets).flatten().collect()
}

/// A Secret of the watched type, so that the operator sees its deletion at once.
fn secret(valid: &Valid, name: String, role: &str, data: Data) -> Secret {
    let mut metadata = metadata(valid, name);
    metadata.labels.get_or_insert_default().insert(name::ROLE_LABEL.to_owned(), role.to_owned());
    Secret { metadata, type_: Some("kubernetes.io/tls".to_owned()), data: Some(data), ..Secret::default() }
}
