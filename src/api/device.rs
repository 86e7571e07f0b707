//! `Device`: a client that may connect to a Gateway.

use std::collections::BTreeMap;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use kube::{CustomResource, KubeSchema};
use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::reference::{GatewayReference, PasswordSecretReference};
use super::unobserved;

/// The specification of a Device.
#[derive(Clone, CustomResource, Debug, Deserialize, KubeSchema, PartialEq, Serialize)]
#[kube(
    group = "fleetwright.io",
    version = "v1alpha1",
    kind = "Device",
    plural = "devices",
    shortname = "fwd",
    category = "fleet",
    namespaced,
    status = "DeviceStatus",
    derive = "PartialEq",
    selectable = ".spec.gatewayRef.name",
    validation = ("size(self.metadata.name) <= 200", "a Device's name has at most 200 characters, since the name of its Secret derives from it"),
    validation = ("!has(self.spec.authentication) || !has(self.spec.authentication.x509) || size(self.metadata.name) <= 64", "the name of a Device with authentication.x509 has at most 64 characters, since it becomes the common name of a certificate (RFC 5280)"),
    printcolumn(name = "Ready", type_ = "string", json_path = ".status.conditions[?(@.type==\"Ready\")].status"),
    printcolumn(name = "Gateway", type_ = "string", json_path = ".spec.gatewayRef.name"),
    printcolumn(name = "Connection", type_ = "string", json_path = ".status.connection.state"),
    printcolumn(name = "Enabled", type_ = "boolean", json_path = ".spec.enabled"),
    printcolumn(name = "Synced", type_ = "string", json_path = ".status.conditions[?(@.type==\"Synced\")].status"),
    printcolumn(name = "Reason", type_ = "string", json_path = ".status.conditions[?(@.type==\"Ready\")].reason"),
    printcolumn(name = "Certificate", type_ = "string", json_path = ".status.certificate.notAfter", priority = 1),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp"),
    doc = "A Device is a client that may connect to a Gateway. Its name is its MQTT user name and client identifier. It may only publish below devices/<name>/, unless its authorization permits more topics. The broker accepts its credential within seconds after this object is created."
)]
#[serde(rename_all = "camelCase")]
pub struct DeviceSpec {
    /// The Gateway that the device connects to. Cannot be changed: delete the Device and create it again to move it.
    #[x_kube(validation = ("self == oldSelf", "gatewayRef cannot be changed: delete the Device and create it again to move it to another Gateway"))]
    pub gateway_ref: GatewayReference,

    /// Whether the device may connect. If it is false, the broker ends the device's session, and its readings are refused.
    #[serde(default = "enabled")]
    pub enabled: bool,

    /// Authentication of the device: a password, a certificate, or both, as the Gateway's listeners require. Default: a generated
    /// password.
    #[serde(default)]
    pub authentication: Authentication,

    /// Permissions in addition to those on the device's own topics. Every device may publish to `devices/<name>/telemetry` and
    /// `devices/<name>/reported` (and all topics below them), and subscribe to `devices/<name>/#`.
    #[serde(default)]
    pub authorization: Authorization,

    /// Attributes of the device, for instance `{model: XJ-200, line: "3"}`. The device registry of the database contains them, so
    /// that queries can join them with readings.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    #[schemars(extend("maxProperties" = 64))]
    pub attributes: BTreeMap<String, String>,

    /// The desired state of the device, for instance `{samplingSeconds: 5}`: any object of up to 16 KiB of JSON. The operator
    /// publishes it as a retained message to `devices/<name>/desired` as `{"generation": 3, "desired": {"samplingSeconds": 5}}`; the
    /// generation increases with each change. The device publishes its state to `devices/<name>/reported`, retained or not, as
    /// `{"generation": 3, "reported": {"samplingSeconds": 5}}` of up to 4 KiB, or the object alone. The condition `Synced` compares
    /// the two. Do not put secrets here.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(schema_with = "any_object")]
    pub desired: Option<Map<String, Value>>,
}

/// An object with any members.
fn any_object(_: &mut SchemaGenerator) -> Schema {
    json_schema!({"type": "object", "x-kubernetes-preserve-unknown-fields": true})
}

const fn enabled() -> bool {
    true
}

/// Authentication of a device. Default: a generated password.
#[derive(Clone, Debug, Default, Deserialize, Eq, JsonSchema, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Authentication {
    /// User name (the Device's name) and password. A device with `x509` alone has no password; add `password: {}` if it needs both.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub password: Option<PasswordAuthentication>,

    /// A certificate, signed by the client authority of the Gateway (`spec.clientAuthority`).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub x509: Option<CertificateAuthentication>,
}

/// Authentication by certificate.
#[derive(Clone, Debug, Deserialize, Eq, JsonSchema, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct CertificateAuthentication {
    /// A certificate signing request (PKCS #10, PEM), for instance from `openssl req -new -newkey ec -pkeyopt
    /// ec_paramgen_curve:P-256 -nodes -keyout device.key -subj /CN=<name>`. Create it on the device, so that the private key never
    /// leaves it. The operator uses only the public key of the request (ECDSA P-256 or P-384, Ed25519, or RSA of 2048 to 8192 bits)
    /// and verifies its signature; the subject of the certificate is the Device's name. If the Gateway has a cert-manager issuer, the
    /// request must have the subject `/CN=<name of the Device>` and no other attributes or extensions. `status.certificate` contains
    /// the certificate; the operator renews it there for the same key. After a request with another key, the broker refuses all
    /// certificates of the previous key and ends their sessions.
    #[schemars(length(min = 1, max = 16384))]
    pub certificate_signing_request: String,
}

/// Authentication by password.
#[derive(Clone, Debug, Default, Deserialize, Eq, KubeSchema, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = ("!(has(self.secretRef) && has(self.rotation))", "rotation is for generated passwords: replace your own in its Secret, or leave secretRef out"))]
pub struct PasswordAuthentication {
    /// A user-provided Secret with the password: 1 to 1024 bytes of UTF-8 without control characters. The operator applies changes
    /// of the Secret. The Secret must have the type `kubernetes.io/basic-auth` or the label `fleetwright.io/credentials: "true"`. Default: the operator generates a password of 256 random bits and writes the Secret `<name>-credentials`. That
    /// Secret contains everything that a device needs to connect: `username`, `password`, `gateway` (the host), `port`, `uri`
    /// (`mqtts://host:port` or `mqtt://host:port`), and `ca.crt` if the Secret of the listener's certificate has one of at most
    /// 16 KiB. The host is the first of the Gateway's `service.hostNames`, or `<gateway>.<namespace>.svc`. The listener is the first
    /// one with TLS, or the first one. When the Gateway changes, the operator updates these keys and keeps the password.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub secret_ref: Option<PasswordSecretReference>,

    /// Rotation of a generated password. The operator does not rotate a user-provided password (`secretRef`). Independent of this
    /// field, a change of the Device's annotation `fleetwright.io/rotate-password` (any text, such as a time) rotates it at once.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rotation: Option<PasswordRotation>,
}

/// Rotation of a generated password.
#[derive(Clone, Debug, Deserialize, Eq, JsonSchema, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct PasswordRotation {
    /// Maximum age of the password, such as `90d` or `12h`. The rotations of Devices of the same age are spread over the last tenth
    /// of this interval. Default: the password is rotated on request only.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 2, max = 32), regex(pattern = super::duration::PATTERN))]
    pub every: Option<String>,

    /// How long the broker accepts the previous password as well as the new one, such as `1h`. The device must fetch the new password
    /// in this time. Afterwards the broker ends a session that was authenticated with the previous password.
    #[serde(default = "default_overlap")]
    #[schemars(length(min = 2, max = 32), regex(pattern = super::duration::PATTERN))]
    pub overlap: String,
}

fn default_overlap() -> String {
    "1h".to_owned()
}

/// Seconds for which the previous password is accepted unless a Device sets `overlap`.
pub const DEFAULT_OVERLAP_SECONDS: i64 = 3600;

/// Permissions of a device in addition to those on its own topics.
#[derive(Clone, Debug, Default, Deserialize, Eq, KubeSchema, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Authorization {
    /// Topics that the device may use. The topics of all rules together have at most 8,192 bytes.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 64))]
    #[x_kube(validation = ("self.map(acl, size(acl.topic)).sum() <= 8192", "the topics of all rules together have at most 8,192 bytes: use wildcards, or shorter topics"))]
    pub acls: Vec<Acl>,
}

/// Access to a topic filter.
#[derive(Clone, Debug, Deserialize, Eq, KubeSchema, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Acl {
    /// An MQTT topic filter (MQTT 5.0 section 4.7): `+` matches one level, a final `#` matches all further levels.
    #[schemars(length(min = 1, max = 256), regex(pattern = r"^(([^+#/\x00-\x1f\x7f]*|\+)/)*([^+#/\x00-\x1f\x7f]*|\+|#)$"))]
    #[x_kube(validation = ("!self.startsWith('$')", "topics that start with $ belong to the broker: name a topic of your own"))]
    #[x_kube(validation = ("self.trim() == self", "a topic neither starts nor ends with white space"))]
    pub topic: String,

    /// Permitted access to the topics.
    pub access: Access,
}

/// Access of a device to a topic.
#[derive(Clone, Copy, Debug, Deserialize, Eq, JsonSchema, PartialEq, Serialize)]
pub enum Access {
    /// Subscribe and receive.
    Read,
    /// Publish.
    Write,
    /// Both.
    ReadWrite,
}

/// The observed state of a Device.
#[derive(Clone, Debug, Deserialize, JsonSchema, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct DeviceStatus {
    /// The generation of the spec that this status describes; -1 before the first reconciliation.
    #[serde(default = "unobserved")]
    pub observed_generation: i64,

    /// User name and client identifier of the device. Absent if the Gateway's broker is external.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub username: Option<String>,

    /// The Secret with the device's password. Absent if the device has no password or the Gateway's broker is external.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub credentials_secret: Option<CredentialsSecret>,

    /// The certificate that was issued to the device.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub certificate: Option<DeviceCertificate>,

    /// Whether the device is connected, from the broker's log of connects and disconnects; if the Gateway's broker is external, from
    /// the messages that the device publishes (see the Gateway's `spec.external`). Absent until the device has connected for the
    /// first time. The first change is written at once. If a device connects and disconnects repeatedly, a change is written after
    /// the device has been stable for 5 seconds at first and 10 minutes at most. If many devices disconnect together, as in a restart
    /// of the broker, it is written after 30 seconds. A shorter interruption is not written, and `since` keeps its value. The chart's
    /// `presence.writesPerSecond` limits the writes of all Devices together; a change that has reverted before its write is skipped.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub connection: Option<DeviceConnection>,

    /// The desired state that the broker retains for the device.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub desired: Option<DesiredStatus>,

    /// The last reported state of the device. Written every few seconds at most, however often the device sends.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reported: Option<ReportedStatus>,

    /// `Accepted`: the spec is valid. `CredentialsLive`: the operator has verified that the broker has the credential and the ACL of
    /// this generation; Unknown (`ManagedElsewhere`) if the Gateway's broker is external, because that broker manages both, and
    /// `Ready` then means that the operator has reached it. `Ready`: both are True; for a disabled device, the broker refuses its login
    /// (reason `Disabled`). `Reconciling` or `Stalled`: why the Device is not ready. `Synced`, if `spec.desired` is set: the device
    /// has reported the generation of the desired state or, without a generation, each of its members. `Ready` does not
    /// depend on it, so that a device that is switched off for a month does not block a rollout.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["type"]))]
    pub conditions: Vec<Condition>,
}

impl Default for DeviceStatus {
    fn default() -> Self {
        Self {
            observed_generation: unobserved(),
            username: None,
            credentials_secret: None,
            certificate: None,
            connection: None,
            desired: None,
            reported: None,
            conditions: Vec::new(),
        }
    }
}

/// Whether a device is connected.
#[derive(Clone, Debug, Deserialize, Eq, JsonSchema, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct DeviceConnection {
    /// `Online`: connected. `Offline`: not connected; also while its broker is down. `Unknown`: the operator has not reached the
    /// Gateway's agent (or the external broker) for five minutes, the Gateway does not exist, or an external broker has no retained
    /// message of the device.
    pub state: ConnectionState,

    /// Time of the last change of `state`.
    pub since: Time,
}

/// Whether a device is connected.
#[derive(Clone, Copy, Debug, Deserialize, Eq, JsonSchema, PartialEq, Serialize)]
pub enum ConnectionState {
    /// Connected.
    Online,
    /// Not connected.
    Offline,
    /// The operator has no current information.
    Unknown,
}

/// The Secret that holds a device's password.
#[derive(Clone, Debug, Deserialize, Eq, JsonSchema, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct CredentialsSecret {
    /// Name of the Secret.
    pub name: String,

    /// Keyed digest (HMAC-SHA-256) of the salted password hash and the ACL that were last verified at the broker. It changes when the
    /// broker has a new password or ACL. The key is in a Secret of the operator, so that nobody can guess the password from the digest.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub revision: Option<String>,
}

/// A certificate that was issued to a device. Nothing in it is secret.
#[derive(Clone, Debug, Default, Deserialize, Eq, JsonSchema, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct DeviceCertificate {
    /// The certificate (PEM), which the device presents with the private key that it holds.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub pem: String,

    /// Its serial number, in hexadecimal digits.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub serial_number: String,

    /// It expires at this time.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub not_after: Option<Time>,

    /// At this time the operator replaces the certificate here with a new one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub renewal_time: Option<Time>,

    /// Digest of the signing request and the authority of this certificate.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub issued_for: String,

    /// Digest of the credential and the ACL that were last verified at the broker, as in `credentialsSecret.revision`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub revision: Option<String>,
}

/// The desired state that a broker keeps for a device.
#[derive(Clone, Debug, Deserialize, Eq, JsonSchema, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct DesiredStatus {
    /// `metadata.generation` of the Device at the last change of `spec.desired`. The message to the device contains it.
    pub generation: i64,

    /// Digest of the desired state.
    pub revision: String,
}

/// The state that a device reported.
#[derive(Clone, Debug, Deserialize, JsonSchema, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct ReportedStatus {
    /// The generation of the desired state that the device reports as applied. Absent if its report has no generation.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub generation: Option<i64>,

    /// The reported state without members that are null.
    #[serde(default)]
    #[schemars(schema_with = "any_object")]
    pub state: Map<String, Value>,
}
