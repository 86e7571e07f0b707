//! The permission that a Secret has to give before its values are used as credentials: pure.
//!
//! A user who may create a Gateway, a Device or a Pipeline names a Secret in it, and the operator or a worker sends the values to an address
//! that the same object names. Without this permission the user could read every Secret of the namespace in that way.

use k8s_openapi::api::core::v1::Secret;

use crate::condition::Cause;
use crate::name::CREDENTIALS_LABEL;
use crate::reason::Reason;

/// The type of a Secret with a user name and a password
/// (<https://kubernetes.io/docs/concepts/configuration/secret/#basic-authentication-secret>). CloudNativePG gives it to the Secrets
/// with its connection URIs.
const BASIC_AUTH: &str = "kubernetes.io/basic-auth";

/// Why a Secret must not be used as a credential; `None` if it may be.
#[must_use]
pub fn refusal(secret: &Secret) -> Option<Cause> {
    let labels = secret.metadata.labels.as_ref();
    let is_labelled = labels.and_then(|labels| labels.get(CREDENTIALS_LABEL)).is_some_and(|value| value == "true");
    if is_labelled || secret.type_.as_deref() == Some(BASIC_AUTH) {
        return None;
    }
    let (name, namespace) = (secret.metadata.name.as_deref().unwrap_or_default(), secret.metadata.namespace.as_deref().unwrap_or_default());
    let message = format!(
        "Secret {name} does not allow its use as a credential: expected the type {BASIC_AUTH} or the label {CREDENTIALS_LABEL}=true; if its \
         values may be sent to the address in this object, run: kubectl label secret {name} --namespace {namespace} {CREDENTIALS_LABEL}=true"
    );
    Some(Cause::new(Reason::SecretNotAllowed, message))
}

/// The position of the first control character or line break, which no user name and no password may have: programs cut the text there,
/// or take the rest for another line of a file. Bytes that are not UTF-8 count as characters.
#[must_use]
pub fn control_character(text: &[u8]) -> Option<usize> {
    match std::str::from_utf8(text) {
        Ok(text) => text.find(|character: char| character.is_control() || matches!(character, '\u{2028}' | '\u{2029}')),
        Err(_) => text.iter().position(u8::is_ascii_control),
    }
}

#[cfg(test)]
mod tests {
    use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;

    use super::*;

    #[test]
    fn a_label_or_the_type_allows_the_use() {
        for (type_, label, allowed) in [
            (None, None, false),
            (Some("Opaque"), None, false),
            (Some("kubernetes.io/tls"), None, false),
            (Some("kubernetes.io/service-account-token"), Some("false"), false),
            (Some("Opaque"), Some(""), false),
            (Some("Opaque"), Some("true"), true),
            (Some("kubernetes.io/basic-auth"), None, true),
        ] {
            let labels = label.map(|value| [(CREDENTIALS_LABEL.to_owned(), value.to_owned())].into());
            let metadata =
                ObjectMeta { name: Some("login".to_owned()), namespace: Some("fleet".to_owned()), labels, ..ObjectMeta::default() };
            let secret = Secret { metadata, type_: type_.map(str::to_owned), ..Secret::default() };
            let refusal = refusal(&secret);
            assert_eq!(refusal.is_none(), allowed, "{type_:?} {label:?}");
            if let Some(cause) = refusal {
                let command = "kubectl label secret login --namespace fleet fleetwright.io/credentials=true";
                assert!(cause.message.contains(command), "{}", cause.message);
            }
        }
    }

    #[test]
    fn control_characters_are_found() {
        for (text, position) in [
            (&b"fleet"[..], None),
            ("with space, \u{fc}ml\u{e4}ut".as_bytes(), None),
            (b"a\nb", Some(1)),
            (b"a\r", Some(1)),
            (b"\0", Some(0)),
            (b"a\x7f", Some(1)),
            ("a\u{85}".as_bytes(), Some(1)),
            ("a\u{2028}b".as_bytes(), Some(1)),
            (b"\xff\xfe", None),
            (b"\xff\n", Some(1)),
        ] {
            assert_eq!(control_character(text), position, "{text:?}");
        }
    }
}
