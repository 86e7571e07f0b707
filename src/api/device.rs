//! `Device`: one thing that may connect to a Gateway.

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
    doc = "A Device is one thing that may connect to a Gateway. Its name is its MQTT user name and client identifier. It publishes under devices/<name>/ and nobody else's, and the broker accepts its credential within seconds of this object."
)]
#[serde(rename_all = "camelCase")]
pub struct DeviceSpec {
    /// The Gateway that the device connects to. Cannot be changed: delete the Device and create it again to move it.
    #[x_kube(validation = ("self == oldSelf", "gatewayRef cannot be changed: delete the Device and create it again to move it to another Gateway"))]
    pub gateway_ref: GatewayReference,

    /// Whether the device may connect. When this becomes false its live session ends at once, and its readings are refused.
    #[serde(default = "enabled")]
    pub enabled: bool,

    /// How the device proves who it is: by password, by certificate, or by either or both, as the Gateway's listeners ask. Left
    /// out: a generated password.
    #[serde(default)]
    pub authentication: Authentication,

    /// What the device may do beyond its own topics. Of these it may publish to `devices/<name>/telemetry` and
    /// `devices/<name>/reported` (and all below them), and subscribe to `devices/<name>/#`.
    #[serde(default)]
    pub authorization: Authorization,

    /// What else is known of the device, for instance `{model: XJ-200, line: "3"}`. Stands in the device registry of the
    /// database, to be joined with its readings.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    #[schemars(extend("maxProperties" = 64))]
    pub attributes: BTreeMap<String, String>,

    /// The state that the device is to take on, for instance `{samplingSeconds: 5}`: any object of up to 16 KiB of JSON.
    /// The broker keeps it for the device, retained, at `devices/<name>/desired` as
    /// `{"generation": 3, "desired": {"samplingSeconds": 5}}`; the generation grows with each change of it. The device
    /// answers at `devices/<name>/reported`, retained or not, with `{"generation": 3, "reported": {"samplingSeconds": 5}}`
    /// in up to 4 KiB, or with the bare object. The condition `Synced` compares the two. Do not put secrets here.
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

/// How a device proves who it is. Nothing declared: by a generated password.
#[derive(Clone, Debug, Default, Deserialize, Eq, JsonSchema, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Authentication {
    /// User name (the Device's name) and password. With `x509` and without this, the device has no password; declare both
    /// (`password: {}`) where it needs both.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub password: Option<PasswordAuthentication>,

    /// A certificate, signed by the authority that the Gateway names (`spec.clientAuthority`).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub x509: Option<CertificateAuthentication>,
}

/// Authentication by certificate.
#[derive(Clone, Debug, Deserialize, Eq, JsonSchema, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct CertificateAuthentication {
    /// A certificate signing request (PKCS #10, PEM), for instance from `openssl req -new -newkey ec -pkeyopt
    /// ec_paramgen_curve:P-256 -nodes -keyout device.key -subj /CN=<name>`: made on the device, whose private key never leaves
    /// it. Of the request only the public key counts (ECDSA P-256 or P-384, Ed25519, or RSA of 2048 to 8192 bits), and that its
    /// signature is by that key; the subject is always the Device's name. Where the Gateway names an issuer of cert-manager, the
    /// request has to ask for that subject itself, `/CN=<name of the Device>`, and for nothing else. The certificate comes back in
    /// `status.certificate`, and is renewed there in time for the same key. With a request for another key, all certificates of the
    /// former key are refused, and their sessions end.
    #[schemars(length(min = 1, max = 16384))]
    pub certificate_signing_request: String,
}

/// Authentication by password.
#[derive(Clone, Debug, Default, Deserialize, Eq, KubeSchema, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = ("!(has(self.secretRef) && has(self.rotation))", "rotation is for generated passwords: replace your own in its Secret, or leave secretRef out"))]
pub struct PasswordAuthentication {
    /// A Secret of yours that holds the password: 1 to 1024 bytes of UTF-8 without control characters. Changes of it are followed. It has
    /// to be of the type `kubernetes.io/basic-auth` or to have the label `fleetwright.io/credentials: "true"`.
    /// Left out: the operator generates a password of 256 random bits and keeps it in the Secret `<name>-credentials`, which is
    /// all that a device has to be given: `username`, `password`, and where to connect to: `gateway` (the host), `port`, `uri`
    /// (`mqtts://host:port` or `mqtt://host:port`), and `ca.crt` where the Secret of the listener's certificate has one of at most
    /// 16 KiB. The host is the first of the Gateway's `service.hostNames`, else `<gateway>.<namespace>.svc`; the listener is the
    /// first with TLS, else the first. These follow the Gateway, and the password stays.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub secret_ref: Option<PasswordSecretReference>,

    /// When a generated password is replaced by another; one of your own (`secretRef`) is yours to replace. Whatever stands here,
    /// a change of the Device's annotation `fleetwright.io/rotate-password` (any text, such as a time) replaces it at once.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rotation: Option<PasswordRotation>,
}

/// When a generated password is replaced by another.
#[derive(Clone, Debug, Deserialize, Eq, JsonSchema, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct PasswordRotation {
    /// Age at which the password is replaced, such as `90d` or `12h`. Devices of one age get
    /// theirs one after the other in the last tenth of it. Left out: only on request.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 2, max = 32), regex(pattern = super::duration::PATTERN))]
    pub every: Option<String>,

    /// For how long the broker accepts the replaced password beside the new one, such as `1h`: the time that the device has to
    /// fetch the new one. Then a session that was opened with the old one ends.
    #[serde(default = "default_overlap")]
    #[schemars(length(min = 2, max = 32), regex(pattern = super::duration::PATTERN))]
    pub overlap: String,
}

fn default_overlap() -> String {
    "1h".to_owned()
}

/// Seconds for which a replaced password is accepted where a Device says nothing else.
pub const DEFAULT_OVERLAP_SECONDS: i64 = 3600;

/// What a device may do beyond its own topics.
#[derive(Clone, Debug, Default, Deserialize, Eq, JsonSchema, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Authorization {
    /// Topics that the device may use.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 64))]
    pub acls: Vec<Acl>,
}

/// Access to a topic filter.
#[derive(Clone, Debug, Deserialize, Eq, KubeSchema, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Acl {
    /// An MQTT topic filter (MQTT 5.0 section 4.7): `+` stands for one level, a final `#` for all that follow.
    #[schemars(length(min = 1, max = 256), regex(pattern = r"^(([^+#/\x00-\x1f\x7f]*|\+)/)*([^+#/\x00-\x1f\x7f]*|\+|#)$"))]
    #[x_kube(validation = ("!self.startsWith('$')", "topics that start with $ belong to the broker: name a topic of your own"))]
    #[x_kube(validation = ("self.trim() == self", "a topic neither starts nor ends with white space"))]
    pub topic: String,

    /// What the device may do with it.
    pub access: Access,
}

/// What a device may do with a topic.
#[derive(Clone, Copy, Debug, Deserialize, Eq, JsonSchema, PartialEq, Serialize)]
pub enum Access {
    /// Subscribe and receive.
    Read,
    /// Publish.
    Write,
    /// Both.
    ReadWrite,
}

/// What the operator has seen of a Device.
#[derive(Clone, Debug, Deserialize, JsonSchema, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct DeviceStatus {
    /// The generation of the spec that this status describes; -1 before the first reconciliation.
    #[serde(default = "unobserved")]
    pub observed_generation: i64,

    /// User name and client identifier with which the device connects. Left out where the Gateway's broker is external.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub username: Option<String>,

    /// The Secret that holds the device's password, where it has one. Left out where the Gateway's broker is external.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub credentials_secret: Option<CredentialsSecret>,

    /// The certificate that was issued to the device.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub certificate: Option<DeviceCertificate>,

    /// Whether the device is connected, from the broker's own record of connects and disconnects; where the Gateway's broker is
    /// external, from what the device publishes (see the Gateway's `spec.external`). Absent until the device has connected for the
    /// first time. The first change is written at once. If a device connects and disconnects repeatedly, a change is written after
    /// the device has been stable for 5 seconds at first and 10 minutes at most. If many devices disconnect together, as in a restart
    /// of the broker, it is written after 30 seconds. A shorter interruption is not written, and `since` keeps its value. The chart's
    /// `presence.writesPerSecond` limits the writes of all Devices together; a change that has reverted before its write is skipped.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub connection: Option<DeviceConnection>,

    /// Which desired state the broker keeps for the device.
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
    /// Gateway's agent (or the external broker) for five minutes, the Gateway is gone, or an external broker keeps nothing of it.
    pub state: ConnectionState,

    /// Since when.
    pub since: Time,
}

/// Whether a device is connected.
#[derive(Clone, Copy, Debug, Deserialize, Eq, JsonSchema, PartialEq, Serialize)]
pub enum ConnectionState {
    /// Connected.
    Online,
    /// Not connected.
    Offline,
    /// Nobody knows.
    Unknown,
}

/// The Secret that holds a device's password.
#[derive(Clone, Debug, Deserialize, Eq, JsonSchema, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct CredentialsSecret {
    /// Name of the Secret.
    pub name: String,

    /// Keyed digest (HMAC-SHA-256) of what the broker last proved to hold for this device: its salted password hash and its ACL. Tells
    /// whether a later change has reached the broker. The key is in a Secret of the operator, so that nobody can guess the password from it.
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

    /// From this time on there is a new one here.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub renewal_time: Option<Time>,

    /// Digest of the request and the authority that it was issued for.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub issued_for: String,

    /// Digest of what the broker last proved to hold for this device, as in `credentialsSecret.revision`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub revision: Option<String>,
}

/// The desired state that a broker keeps for a device.
#[derive(Clone, Debug, Deserialize, Eq, JsonSchema, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct DesiredStatus {
    /// `metadata.generation` of the Device at which `spec.desired` last changed; goes to the device with it.
    pub generation: i64,

    /// Digest of the desired state.
    pub revision: String,
}

/// What a device said of itself.
#[derive(Clone, Debug, Deserialize, JsonSchema, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct ReportedStatus {
    /// The generation of the desired state that the device says it has taken on, where it gives one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub generation: Option<i64>,

    /// The state, as the device reported it; members that are null are left out.
    #[serde(default)]
    #[schemars(schema_with = "any_object")]
    pub state: Map<String, Value>,
}
