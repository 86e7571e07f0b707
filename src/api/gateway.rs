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

/// A Gateway is one MQTT broker for a site or a region. The operator runs Mosquitto with its storage, Services, credentials and
/// limits, or `external` has the address of an existing broker. Devices name the Gateway they connect to; Pipelines select the
/// Gateways they read.
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
    validation = ("has(self.spec.clientAuthority) || !self.spec.listeners.exists(l, has(l.tls) && l.tls.authentication != 'Password')", "a listener whose tls.authentication requires certificates needs spec.clientAuthority, the authority that signs them"),
    validation = ("!self.metadata.name.contains('.')", "a Gateway's name has no dots, since its Service has the same name"),
    printcolumn(name = "Ready", type_ = "string", json_path = ".status.conditions[?(@.type==\"Ready\")].status"),
    printcolumn(name = "Address", type_ = "string", json_path = ".status.address"),
    printcolumn(name = "Devices", type_ = "integer", json_path = ".status.devices.declared"),
    printcolumn(name = "Live", type_ = "integer", json_path = ".status.devices.live"),
    printcolumn(name = "Connected", type_ = "integer", json_path = ".status.devices.connected"),
    printcolumn(name = "Certificate", type_ = "string", json_path = ".status.certificate.notAfter", priority = 1),
    printcolumn(name = "Reason", type_ = "string", json_path = ".status.conditions[?(@.type==\"Ready\")].reason"),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp"),
    doc = "A Gateway is one MQTT broker for a site or a region. The operator runs Mosquitto with its storage, Services, credentials and limits, or `external` has the address of an existing broker. Devices name the Gateway they connect to; Pipelines select the Gateways they read."
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
    /// The operator and the workers use the client identifiers `fwo` and `fwi` followed by 16 hexadecimal digits. The broker must
    /// accept client identifiers that differ from the user name. Sessions outlive their connection: the operator's by ten minutes, a
    /// worker's by seven days. When a Pipeline is deleted or stops reading this Gateway, its sessions end at once.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub external: Option<ExternalBroker>,

    /// The listeners of the broker for devices. At least one. Names and ports are unique.
    #[serde(default = "default_listeners")]
    #[schemars(length(min = 1, max = 8))]
    #[x_kube(validation = ("self.all(a, self.exists_one(b, a.port == b.port))", "each port may be used by one listener only"))]
    #[x_kube(merge_strategy = ListMerge::Map(vec!["name".into()]))]
    pub listeners: Vec<Listener>,

    /// The certificate authority for client certificates. It signs the certificates of Devices with a certificate signing request
    /// (`authentication.x509`). Listeners with a `tls.authentication` other than `Password` require such a certificate.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub client_authority: Option<ClientAuthority>,

    /// The volume for retained messages and for the queues of disconnected sessions. It cannot be changed later, because the volume
    /// claim of a StatefulSet is immutable in Kubernetes.
    #[serde(default)]
    #[x_kube(validation = ("self == oldSelf", "storage cannot be changed: create a Gateway with another name, and move the devices to it"))]
    pub storage: Storage,

    /// Durability of acknowledged messages: with `Disk` they survive a crash of the machine, with `Process` a crash of the broker,
    /// with `Snapshot` only an orderly stop (a crash loses everything since the last snapshot). Measured on two cores, the broker
    /// accepts 74,000, 80,000 and 117,000 messages per second. With `Disk` and `Process` the broker commits messages in groups, and sends their
    /// acknowledgements after the commit. `Snapshot` uses other files than `Disk` and `Process`: after a change from or to `Snapshot`
    /// the broker starts without its previous sessions, queues and retained messages.
    #[serde(default)]
    pub durability: Durability,

    /// Limits that protect the broker. Messages that are dropped because of them are counted, and a condition reports them.
    #[serde(default)]
    pub limits: Limits,

    /// Compute resources of the broker's container. Three quarters of `limits.memory` are available to sessions and messages. When
    /// three quarters of that share are used, `spec.limits.whenFull` applies to publishers. The rest is reserved for the delivery of
    /// queued messages.
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

/// Durability of acknowledged messages.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, JsonSchema, PartialEq, Serialize)]
pub enum Durability {
    /// A message survives a crash of the machine: it is synchronised to the disk before it is acknowledged.
    Disk,
    /// A message survives a crash of the broker: it is written to the operating system before it is acknowledged.
    #[default]
    Process,
    /// A message survives an orderly stop. A crash of the broker loses all messages since the last snapshot.
    Snapshot,
}

/// Limits of a broker.
#[derive(Clone, Debug, Deserialize, Eq, JsonSchema, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Limits {
    /// Maximum number of concurrent connections per listener. The broker refuses further connections.
    #[serde(default = "default_max_connections")]
    #[schemars(range(min = 1, max = 1_000_000))]
    pub max_connections: i32,

    /// Maximum size of the queue of a Pipeline, in bytes of payloads; at most 1638Mi. When the queue reaches it, `whenFull` applies to the
    /// publishers of the messages that the Pipeline reads. `clients.queuedBytes` limits the queues of devices; these never affect
    /// publishers, so that one disconnected device cannot stop a plant. With `durability: Snapshot` the broker does not report the size
    /// of a queue, and memory (`spec.resources.limits.memory`) limits all queues together.
    #[serde(default = "default_queued_bytes")]
    pub queued_bytes_per_client: ResourceQuantity,

    /// How the broker treats publishers when it is full. It is full when the queue of a Pipeline has reached `queuedBytesPerClient`
    /// (only for the messages that this Pipeline reads), when memory is used up, or when the volume is used up except for a reserve
    /// that the broker needs to continue (an eighth of the volume, at least 64Mi and at most 1Gi).
    ///
    /// `Refuse`: the broker rejects each message of an MQTT 5 client with reason code 0x97, "Quota exceeded", in the acknowledgement.
    /// The client stays connected, and may keep the message, send less or give up. MQTT 3.1.1 has no such reason code; its clients
    /// are treated as with `Slow`.
    ///
    /// `Slow`: the broker closes the connection of a client that publishes, without an acknowledgement. The client's library
    /// reconnects with its usual backoff and sends the message again until the broker accepts it. Publishers slow down to the rate
    /// at which queues drain. Use it for devices that discard a rejected message. While the broker is full, these devices are
    /// disconnected at times: their last wills are published, and commands reach them late.
    ///
    /// The broker never drops an acknowledged message of a Pipeline. The condition `BrokerFull` and its Event say what is full and how
    /// to fix it, and the metric `fleetwright_broker_messages_refused` counts the rejected messages. QoS 0 has no acknowledgement:
    /// with both values the broker drops QoS 0 messages when memory is full, and otherwise delivers them to connected subscribers.
    /// Messages of the operator and the workers, and last wills, are always accepted. Deleting a retained message is always
    /// possible.
    #[serde(default)]
    pub when_full: WhenFull,

    /// Maximum size of a published message in bytes, including its topic and properties. The broker disconnects a client that
    /// publishes a larger message.
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

/// How the broker treats publishers when it is full.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, JsonSchema, PartialEq, Serialize)]
pub enum WhenFull {
    /// Messages of MQTT 5 clients are rejected with a reason code; MQTT 3.1.1 clients are disconnected.
    #[default]
    Refuse,
    /// Publishers are disconnected without an acknowledgement, and send the message again.
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

    /// Host names and IP addresses at which clients outside the cluster reach the Service, such as `mqtt.example.org`. The
    /// certificates of TLS listeners must be valid for each of them. A change restarts the broker.
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

    /// SHA-256 of the certificate: the output of `openssl x509 -fingerprint -sha256` in lower case and without colons.
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
