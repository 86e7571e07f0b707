//! References to other objects in the namespace of the object that contains them.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// A Gateway of the same namespace.
#[derive(Clone, Debug, Deserialize, Eq, JsonSchema, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct GatewayReference {
    /// Name of the Gateway.
    #[schemars(length(min = 1, max = 40))]
    pub name: String,
}

/// A key of a Secret of the same namespace that holds a password.
#[derive(Clone, Debug, Deserialize, Eq, JsonSchema, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct PasswordSecretReference {
    /// Name of the Secret.
    #[schemars(length(min = 1, max = 253))]
    pub name: String,

    /// Key of the Secret that holds the password.
    #[serde(default = "password_key")]
    #[schemars(length(min = 1, max = 253))]
    pub key: String,
}

fn password_key() -> String {
    "password".to_owned()
}

/// A key of a Secret of the same namespace that holds a connection URI.
#[derive(Clone, Debug, Deserialize, Eq, JsonSchema, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct ConnectionSecretReference {
    /// Name of the Secret.
    #[schemars(length(min = 1, max = 253))]
    pub name: String,

    /// Key of the Secret that holds the URI, for instance `postgresql://user:password@host:5432/database?sslmode=require`.
    #[serde(default = "uri_key")]
    #[schemars(length(min = 1, max = 253))]
    pub key: String,
}

fn uri_key() -> String {
    "uri".to_owned()
}

/// A key of a ConfigMap of the same namespace that holds a Protocol Buffers FileDescriptorSet.
#[derive(Clone, Debug, Deserialize, Eq, JsonSchema, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct DescriptorReference {
    /// Name of the ConfigMap.
    #[schemars(length(min = 1, max = 253))]
    pub name: String,

    /// Key of the ConfigMap (in `binaryData`) that holds the FileDescriptorSet, of at most 512 KiB.
    #[serde(default = "descriptor_key")]
    #[schemars(length(min = 1, max = 253))]
    pub key: String,
}

fn descriptor_key() -> String {
    "descriptor.pb".to_owned()
}
