//! The keys of Secrets.

use k8s_openapi::api::core::v1::Secret;

use crate::api::condition::Cause;
use crate::api::reason::Reason;

/// The value of a key.
#[must_use]
pub fn value<'a>(secret: &'a Secret, key: &str) -> Option<&'a [u8]> {
    secret.data.as_ref()?.get(key).map(|value| value.0.as_slice())
}

/// A Secret that a user must create, with `what` under the key `key`.
///
/// # Errors
/// If it does not exist.
pub fn required<'a>(secret: Option<&'a Secret>, name: &str, key: &str, what: &str) -> Result<&'a Secret, Cause> {
    secret.ok_or_else(|| {
        let message = format!("there is no Secret {name} in this namespace: create it with {what} under the key {key}");
        Cause::new(Reason::SecretNotFound, message)
    })
}

/// The value of a key that must exist. `what` describes the value.
///
/// # Errors
/// If the Secret does not have the key.
pub fn required_value<'a>(secret: &'a Secret, name: &str, key: &str, what: &str) -> Result<&'a [u8], Cause> {
    value(secret, key)
        .ok_or_else(|| Cause::new(Reason::SecretKeyNotFound, format!("Secret {name} has no key {key}: add it, with {what} as its value")))
}
