//! The Secrets of the authority and certificate that the operator issues.

use k8s_openapi::api::core::v1::Secret;

use super::{Valid, metadata};
use crate::api::name;
use crate::certificate::authority::Data;

/// The Secrets of the authority and of the certificate.
pub(super) fn issued(valid: &Valid) -> Option<(Secret, Secret)> {
    let issued = valid.tls.issued.as_ref()?;
    let authority = secret(valid, name::server_authority(&valid.name), name::ROLE_SERVER_AUTHORITY, issued.authority.clone());
    let certificate = secret(valid, name::server_certificate(&valid.name), name::ROLE_SERVER_CERTIFICATE, issued.certificate.clone());
    Some((authority, certificate))
}

/// A Secret of the watched type, so that the operator sees its deletion at once.
fn secret(valid: &Valid, name: String, role: &str, data: Data) -> Secret {
    let mut metadata = metadata(valid, name);
    metadata.labels.get_or_insert_default().insert(name::ROLE_LABEL.to_owned(), role.to_owned());
    Secret { metadata, type_: Some("kubernetes.io/tls".to_owned()), data: Some(data), ..Secret::default() }
}
