//! `Gateway`: one MQTT broker for a site or a region.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use kube::{CustomResource, KubeSchema};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

pub use super::client_authority::ClientAuthority;
use super::client_limits::ClientLimits;
use super::external::ExternalBroker;
pub use super::listener::{Listener, ListenerAuthentication, ListenerTls, Protocol};
use super::resources::{ComputeResources, ResourceQuantity};
use super::unobserved;

/// A Gateway is one MQTT broker for a site or a region: the operator runs Mosquitto for it, with its storage,
/// Services, credentials and limits; or `external` has the address of an existing broker. Devices name the Gateway they connect to;
/// Pipelines select the Gateways they read.
#[derive(Clone, CustomResource, Debug, Deserialize, KubeSchema, PartialEq, Serialize)]
#[kube(
    group = "fleetwright.io",
    version = "v1alpha1",
    kind = "Gateway",
    plural = "gateways",
    shortname = "fwg",
    category = "fleet",
    namespaced,
    status = "GatewayStatus",
    derive = "PartialEq",
    validation = ("size(self.metadata.name) <= 40", "a Gateway's name has at most 40 characters, since the names of its pods and Services derive from it"),
    validation = ("has(self.spec.external) == has(oldSelf.spec.external)", "a Gateway is either a broker that the operator runs or an external one: create another Gateway"),
    validation = ("has(self.spec.clientAuthority) || !self.spec.listeners.exists(l, has(l.tls) && l.tls.authentication != 'Password')", "a listener whose tls.authentication asks for certificates needs spec.clientAuthority, which says who signs them"),
    validation = ("!self.metadata.name.contains('.')", "a Gateway's name has no dots, since its Service carries the same name"),
    printcolumn(name = "Ready", type_ = "string", json_path = ".status.conditions[?(@.type==\"Ready\")].status"),
    printcolumn(name = "Address", type_ = "string", json_path = ".status.address"),
    printcolumn(name = "Devices", type_ = "integer", json_path = ".status.devices.declared"),
    printcolumn(name = "Live", type_ = "integer", json_path = ".status.devices.live"),
    printcolumn(name = "Connected", type_ = "integer", json_path = ".status.devices.connected"),
    printcolumn(name = "Certificate", type_ = "string", json_path = ".status.certificate.notAfter", priority = 1),
    printcolumn(name = "Reason", type_ = "string", json_path = ".status.conditions[?(@.type==\"Ready\")].reason"),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp"),
    doc = "A Gateway is one MQTT broker for a site or a region: the operator runs Mosquitto for it, with its storage, Services, credentials and limits; or `external` has the address of an existing broker. Devices name the Gateway they connect to; Pipelines select the Gateways they read."
)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = ("!has(self.external) || (self.listeners.size() == 1 && self.listeners.all(l, l.name == 'mqtt' && l.port == 1883 && !has(l.tls)))", "an external broker has its own listeners: leave out listeners"))]
#[x_kube(validation = ("!has(self.external) || (self.storage.size == '1Gi' && !has(self.storage.storageClassName))", "an external broker has its own storage: leave out storage"))]
#[x_kube(validation = ("!has(self.external) || !has(self.clientAuthority)", "an external broker has its own authority of clients: leave out clientAuthority"))]
#[x_kube(validation = ("!has(self.external) || self.durability == 'Process'", "an external broker has its own durability: leave out durability"))]
#[x_kube(validation = ("!has(self.external) || (self.limits.maxConnections == 20000 && self.limits.queuedBytesPerClient == '256Mi' && self.limits.maxMessageBytes == 1048576 && self.limits.whenFull == 'Refuse')", "an external broker has its own limits: leave out limits"))]
#[x_kube(validation = ("!has(self.external) || (self.resources.limits.size() == 1 && self.resources.requests.size() == 2 && self.resources.limits['memory'] == '512Mi' && self.resources.requests['memory'] == '64Mi' && self.resources.requests['cpu'] == '50m')", "an external broker has its own resources: leave out resources"))]
#[x_kube(validation = ("!has(self.external) || (self.service.type == 'ClusterIP' && !has(self.service.annotations) && !has(self.service.hostNames))", "an external broker has no Service: leave out service"))]
pub struct GatewaySpec {
    /// An existing broker that the operator does not run. Then leave out `listeners`, `storage`, `durability`, `limits`, `resources`
    /// and `service`; their defaults have no effect. This field cannot be added or removed later.
    ///
    /// Desired and reported state and Pipelines work as with any Gateway. That broker manages
    /// the credentials and access rights of devices: the operator creates no Secret for them, and their condition `CredentialsLive` is
    /// Unknown with the reason `ManagedElsewhere`. A Device with `authentication.x509` is not accepted, because there is no authority
    /// to sign its certificate. Devices report whether they are connected: each publishes the retained message `online` to
    /// `devices/<name>/connection` after it has connected, with `offline` as its retained last will. The connection of a device that
    /// does not do this is unknown.
    ///
    /// Operator and workers log in with client identifiers of their own, `fwo` and `fwi` with 16 hexadecimal digits; the broker
    /// has to let them differ from the user name. Their sessions outlive a connection: the operator's for ten minutes, a
    /// worker's for seven days. Those of a Pipeline that is deleted, or that reads this Gateway no longer, are ended at once.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub external: Option<ExternalBroker>,

    /// Where the broker listens for devices. At least one; each name and each port once.
    #[serde(default = "default_listeners")]
    #[schemars(length(min = 1, max = 8))]
    #[x_kube(validation = ("self.all(a, self.exists_one(b, a.port == b.port))", "each port may be used by one listener only"))]
    #[x_kube(merge_strategy = ListMerge::Map(vec!["name".into()]))]
    pub listeners: Vec<Listener>,

    /// Who signs the certificates by which devices prove who they are: those Devices that give a certificate signing request
    /// (`authentication.x509`), on those listeners whose `tls.authentication` asks for certificates.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub client_authority: Option<ClientAuthority>,

    /// The volume on which the broker keeps retained messages and the queues of sessions that are away.
    /// Cannot be changed later: a volume claim of a StatefulSet is immutable in Kubernetes.
    #[serde(default)]
    #[x_kube(validation = ("self == oldSelf", "storage cannot be changed: create a Gateway with another name, and move the devices to it"))]
    pub storage: Storage,

    /// What an acknowledged message survives: `Disk` a crash of the machine, `Process` a crash of the broker, `Snapshot` only
    /// an orderly stop (all since the last snapshot is lost in a crash). The order is also the order of speed: measured on two
    /// cores, 74,000, 80,000 and 117,000 messages a second. With `Disk` and `Process` the broker commits what came together, and
    /// acknowledges none of it before. The broker keeps `Snapshot` and the others in different files: after a change between them
    /// it starts without the sessions, queues and retained messages that it had.
    #[serde(default)]
    pub durability: Durability,

    /// Bounds that protect the broker. Whatever is dropped because of them is counted, and shows as a condition.
    #[serde(default)]
    pub limits: Limits,

    /// Compute resources of the broker's container. Of `limits.memory` three quarters are for sessions and messages; where three
    /// quarters of these are used, `spec.limits.whenFull` says what happens to publishers. The rest is for delivering what is queued.
    #[serde(default = "default_resources")]
    pub resources: ComputeResources,

    /// The Service through which devices reach the broker.
    #[serde(default)]
    pub service: Service,
}

fn default_listeners() -> Vec<Listener> {
    vec![Listener { name: "mqtt".to_owned(), port: 1883, protocol: Protocol::Mqtt, tls: None }]
}

fn default_resources() -> ComputeResources {
    ComputeResources {
        limits: [("memory".to_owned(), "512Mi".into())].into(),
        requests: [("cpu".to_owned(), "50m".into()), ("memory".to_owned(), "64Mi".into())].into(),
    }
}

/// The broker's volume.
#[derive(Clone, Debug, Deserialize, Eq, JsonSchema, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Storage {
    /// Size of the volume; at least 128Mi.
    #[serde(default = "default_storage_size")]
    pub size: ResourceQuantity,

    /// StorageClass of the volume. Left out: the cluster's default.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 253))]
    pub storage_class_name: Option<String>,
}

impl Default for Storage {
    fn default() -> Self {
        Self { size: default_storage_size(), storage_class_name: None }
    }
}

fn default_storage_size() -> ResourceQuantity {
    "1Gi".into()
}

/// What an acknowledged message survives.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, JsonSchema, PartialEq, Serialize)]
pub enum Durability {
    /// A crash of the machine: synchronised to the disk before it is acknowledged.
    Disk,
    /// A crash of the broker: handed to the operating system before it is acknowledged.
    #[default]
    Process,
    /// An orderly stop. All that came since the last snapshot is lost when the broker crashes.
    Snapshot,
}

/// Bounds of a broker.
#[derive(Clone, Debug, Deserialize, Eq, JsonSchema, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Limits {
    /// The most clients that may be connected to each listener at once; a further one is refused.
    #[serde(default = "default_max_connections")]
    #[schemars(range(min = 1, max = 1_000_000))]
    pub max_connections: i32,

    /// The most bytes (of payloads) that wait for one Pipeline; at most 1638Mi. Beyond it `whenFull` says what happens to publishers of
    /// messages that this Pipeline reads. What waits for devices is limited by `clients.queuedBytes` and never refuses publishers:
    /// otherwise a device that is offline could stop a plant. With `durability: Snapshot` the broker does not report its queues; there
    /// memory (`spec.resources.limits.memory`) bounds all of them together.
    #[serde(default = "default_queued_bytes")]
    pub queued_bytes_per_client: ResourceQuantity,

    /// What happens to publishers when the broker is full. It is full when the queue of a Pipeline has reached
    /// `queuedBytesPerClient` (then it concerns those messages alone that this Pipeline reads), when memory is used up, or when the
    /// volume is but for the reserve that the broker needs to go on (an eighth of it, 64Mi at least and 1Gi at most).
    ///
    /// `Refuse`: a client of MQTT 5 is told with each message that it was not taken (reason code 0x97, "Quota exceeded", of the
    /// acknowledgement), stays connected, and decides itself: it may keep the message, thin out, or give up. One of MQTT 3.1.1
    /// cannot be told: it fares as with `Slow`. `Slow`: the connection of whoever sends what cannot be taken is ended without an
    /// acknowledgement. Its library connects again after its usual pause and sends the message again, until there is room: publishers
    /// are slowed down to what is taken away. For devices that would throw away what is refused. Meanwhile they are away now and then,
    /// as their last wills tell, and commands reach them late.
    ///
    /// Whatever the broker acknowledges it keeps: the condition `BrokerFull` and its Event tell what is full and what to do, and the
    /// metric `fleetwright_broker_messages_refused` counts. With both, messages of QoS 0, which know no acknowledgement, are lost where
    /// memory is full, and otherwise delivered to whom is connected. Operator and workers are never refused. Deleting a retained message
    /// is always possible.
    #[serde(default)]
    pub when_full: WhenFull,

    /// The largest message that a client may publish, in bytes, with its topic and properties; the client of a larger one is
    /// disconnected.
    #[serde(default = "default_message_bytes")]
    #[schemars(range(min = 1024, max = 268_435_455))]
    pub max_message_bytes: i32,

    /// Limits of each device, so that a single one cannot fill the broker for all others.
    #[serde(default)]
    pub clients: ClientLimits,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            max_connections: default_max_connections(),
            queued_bytes_per_client: default_queued_bytes(),
            max_message_bytes: default_message_bytes(),
            when_full: WhenFull::default(),
            clients: ClientLimits::default(),
        }
    }
}

/// What happens to publishers when the broker is full.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, JsonSchema, PartialEq, Serialize)]
pub enum WhenFull {
    /// Clients of MQTT 5 are told with each message; those of MQTT 3.1.1 are disconnected.
    #[default]
    Refuse,
    /// All are disconnected without an acknowledgement, and send again.
    Slow,
}

const fn default_max_connections() -> i32 {
    20_000
}

fn default_queued_bytes() -> ResourceQuantity {
    "256Mi".into()
}

const fn default_message_bytes() -> i32 {
    1_048_576
}

/// The Service through which devices reach the broker.
#[derive(Clone, Debug, Default, Deserialize, Eq, JsonSchema, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Service {
    /// Type of the Service.
    #[serde(default, rename = "type")]
    pub type_: ServiceType,

    /// Annotations of the Service, for instance for a cloud's load balancer or an external DNS.
    #[serde(default, skip_serializing_if = "std::collections::BTreeMap::is_empty")]
    pub annotations: std::collections::BTreeMap<String, String>,

    /// Host names and IP addresses under which clients outside the cluster reach the Service, such as `mqtt.example.org`. The
    /// certificates of TLS listeners have to be for each of them. A change restarts the broker.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 16), inner(length(min = 1, max = 253)), extend("x-kubernetes-list-type" = "set"))]
    pub host_names: Vec<String>,
}

/// Type of a Service.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, JsonSchema, PartialEq, Serialize)]
pub enum ServiceType {
    /// Reachable inside the cluster only.
    #[default]
    ClusterIP,
    /// A port on every node.
    NodePort,
    /// An address from the cluster's load balancer.
    LoadBalancer,
}

/// The observed state of a Gateway.
#[derive(Clone, Debug, Deserialize, JsonSchema, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct GatewayStatus {
    /// The generation of the spec that this status describes; -1 before the first reconciliation.
    #[serde(default = "unobserved")]
    pub observed_generation: i64,

    /// Host name of the broker for clients inside the cluster; the ports are those of the listeners. For an external broker: its
    /// address.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub address: Option<String>,

    /// The devices of this Gateway.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub devices: Option<GatewayDevices>,

    /// The clients that the broker refused. Written at most every 30 seconds, and at most every 10 minutes while the same
    /// clients keep trying.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub clients: Option<GatewayClients>,

    /// The certificate that the broker presents on its TLS listeners; if there are several, the first to expire.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub certificate: Option<GatewayCertificate>,

    /// `Accepted`: the spec is valid. `BrokerAvailable`: the broker runs and has accepted a login; for an external broker, the
    /// operator's login with the credentials of the Secret. It stays True until an attempt fails, with the reason
    /// `BrokerUnreachable`, `TlsFailed`, `LoginRefused` or `SubscriptionRefused`.
    /// `BrokerFull` (present after the first time): the broker accepts no messages because a queue, its memory or its volume is full
    /// (`QueueFull`, `MemoryFull`, `DiskFull`); False (`AcceptingMessages`) half a minute after the broker accepts messages again.
    /// False with `ClientsLimited` while devices exceed limits of their own (`spec.limits.clients`), which the message names.
    /// `MessagesDropped` (present after the first time): the broker dropped messages for a client that was not connected.
    /// `ClientAuthorityValid` (if `spec.clientAuthority` is set): the Secret holds an authority that can sign.
    /// `CertificateValid` (if a listener has TLS): each Secret holds a certificate that clients can accept, and a handshake has
    /// verified that the broker presents it; the reason is `CertificateExpiresSoon` during the last seven days, and the message has
    /// the time of expiry. `Ready`: all of these. `Reconciling` or `Stalled`: why the Gateway is not ready.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["type"]))]
    pub conditions: Vec<Condition>,
}

impl Default for GatewayStatus {
    fn default() -> Self {
        Self { observed_generation: unobserved(), address: None, devices: None, clients: None, certificate: None, conditions: Vec::new() }
    }
}

/// A certificate that the broker has proven in a handshake to present.
#[derive(Clone, Debug, Deserialize, Eq, JsonSchema, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct GatewayCertificate {
    /// Secret that it came from.
    pub secret_name: String,

    /// It expires at this time.
    pub not_after: Time,

    /// SHA-256 of the certificate in hexadecimal digits, as `openssl x509 -fingerprint -sha256` prints it but for colons and case.
    pub sha256: String,
}

/// How many devices a Gateway has.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, JsonSchema, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct GatewayDevices {
    /// Devices that name this Gateway.
    #[serde(default)]
    pub declared: i64,

    /// Devices whose credential is verified at the broker; 0 for an external broker, where the operator does not verify credentials.
    #[serde(default)]
    pub live: i64,

    /// Devices that are connected; at most 10 seconds old. Left out while the operator does not reach the broker's agent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub connected: Option<i64>,
}

/// Clients that a broker refused.
#[derive(Clone, Debug, Default, Deserialize, Eq, JsonSchema, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct GatewayClients {
    /// Number of refused logins since the broker's pod was created.
    #[serde(default)]
    pub refused: i64,

    /// The ten clients with the most refused logins within the last hour.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 10))]
    pub recently_refused: Vec<RefusedClient>,
}

/// A client that a broker refused.
#[derive(Clone, Debug, Deserialize, Eq, JsonSchema, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct RefusedClient {
    /// The user name or client identifier that the client sent, cut to 64 characters; empty if it sent none. It is not verified.
    #[serde(default)]
    pub name: String,

    /// Address of the last attempt.
    #[serde(default)]
    pub address: String,

    /// Why: `NotAuthorised` (user name, password or certificate is wrong, or the Device does not exist or is disabled),
    /// `ClientIdentifierNotValid`, `ProtocolError` (it does not speak MQTT), `TlsHandshakeFailed`, `ConnectionLimit`
    /// (`limits.maxConnections` is reached), or `Other`.
    pub reason: String,

    /// Number of attempts.
    pub count: i64,

    /// Time of the last attempt.
    pub last_time: Time,
}

impl GatewaySpec {
    /// Whether the operator issues a certificate: a listener has TLS and names no Secret.
    #[must_use]
    pub fn issues_certificate(&self) -> bool {
        self.listeners.iter().filter_map(|listener| listener.tls.as_ref()).any(|tls| tls.secret_name.is_none())
    }
}
