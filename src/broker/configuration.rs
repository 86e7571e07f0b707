//! mosquitto.conf of a Gateway.

use std::fmt::Write;

use crate::api::client_limits::ClientLimits;
use crate::api::gateway::{Durability, GatewaySpec, Listener, ListenerAuthentication, WhenFull};
use crate::api::name::{self, SYSTEM_USERNAME_PREFIX};
use crate::configuration::agent::{
    self, ACL_FILE, CERTIFICATE_KEYS_FILE, CLIENT_AUTHORITIES_FILE, CONFIGURATION_FOLDER, DATA_FOLDER, LOG_FILE, LOG_FOLDER, PASSWORD_FILE,
    PREVIOUS_PASSWORD_FILE, RUNTIME_FOLDER, TLS_CERTIFICATE, TLS_KEY,
};

/// The SQLite persistence plugin in the broker's image. With `flush_period 0` it commits in each iteration of the broker's main loop, and
/// the broker holds acknowledgements until then (`images/mosquitto/patches`).
const PERSISTENCE_PLUGIN: &str = "/usr/lib/mosquitto/persist_sqlite.so";

/// Our plugin that accepts the previous password while one is rotated (`images/mosquitto/plugins/previous_password.c`).
const PREVIOUS_PASSWORD_PLUGIN: &str = "/usr/lib/mosquitto/previous_password.so";

/// Our plugin that decides which client certificates are accepted (`images/mosquitto/plugins/certificate.c`).
const CERTIFICATE_PLUGIN: &str = "/usr/lib/mosquitto/certificate.so";

/// Our plugin that ends sessions of users that no longer exist (`images/mosquitto/plugins/users.c`).
const USERS_PLUGIN: &str = "/usr/lib/mosquitto/users.so";

/// How often the broker deletes retained messages that have expired; its smallest value.
const RETAIN_EXPIRY_MINUTES: u8 = 1;

/// Our plugin that refuses publishers while the broker is full (`images/mosquitto/plugins/bounds.c`).
const BOUNDS_PLUGIN: &str = "/usr/lib/mosquitto/bounds.so";

/// Percent of Mosquitto's own memory limit at which that plugin starts to refuse. At its own limit, Mosquitto loses messages that it
/// has just accepted. The rest is for delivery, which needs a copy of each message in flight to a worker.
const TAKEN_MEMORY_PERCENT: i64 = 75;

/// Divisor of that memory for the payloads in flight to one client, so that the copies fit …
const INFLIGHT_MEMORY_SHARE: i64 = 16;

/// … and the maximum of these payloads in bytes: a client may acknowledge all messages in flight at once. The plugin then deletes them in
/// one transaction, and reserves space for its journal on the volume. About 160 bytes a message with 65,534 messages in flight.
const MAX_INFLIGHT_BYTES: i64 = 16 << 20;

/// Seconds between two snapshots of the classic persistence. Each snapshot writes the whole store and blocks the broker.
const SNAPSHOT_SECONDS: u32 = 60;

/// The maximum of messages in flight to one client, and the Receive Maximum for publishers (MQTT 5.0 section 3.2.2.3.3). With
/// Mosquitto's default of 20, every publisher waits for the disk after 20 messages. The value is one less than MQTT allows: 2.1.2
/// treats 65,535 as "no maximum", then ignores the limit on queues and logs a false warning for every message
/// (<https://github.com/eclipse-mosquitto/mosquitto/issues/3579>).
const MAX_INFLIGHT: u32 = 65_534;

/// Divisor of the margin by which Mosquitto's own limit on queues exceeds the plugin's. The margin is for messages that the plugin
/// does not check: last wills, and messages from the operator and the workers.
pub const QUEUE_MARGIN: i64 = 4;

/// Bytes that the Maximum Packet Size of MQTT counts beyond the Remaining Length: one byte of type and up to four of length.
const FIXED_HEADER_BYTES: i32 = 5;

/// The input of mosquitto.conf: a Gateway's spec, and the values that its validation computed.
#[derive(Clone, Copy, Debug)]
pub struct BrokerConfiguration<'a> {
    /// Namespace of the Gateway.
    pub namespace: &'a str,

    /// Name of the Gateway.
    pub name: &'a str,

    /// The declared spec.
    pub spec: &'a GatewaySpec,

    /// Bytes that the broker may use for sessions and messages; unlimited without a memory limit.
    pub memory_limit: Option<i64>,

    /// Bytes that the broker may queue for one client.
    pub queued_bytes: i64,

    /// Whether there are certificates that client certificates can be verified with.
    pub trusts_client_certificates: bool,
}

/// Mosquitto's configuration (mosquitto.conf(5) of 2.1). The log file is cheap: 15,000 clients that connect and disconnect take
/// 930 ms of the broker's processor time with it, and 920 ms without.
#[must_use]
pub fn render(broker: &BrokerConfiguration<'_>) -> String {
    let mut text = format!(
        "# Written by the operator from Gateway {}/{}; a change made here does not last.\n\
         allow_anonymous false\n\
         password_file {RUNTIME_FOLDER}/{PASSWORD_FILE}\n\
         acl_file {RUNTIME_FOLDER}/{ACL_FILE}\n\
         {}global_plugin {PREVIOUS_PASSWORD_PLUGIN}\n\
         plugin_opt_file {RUNTIME_FOLDER}/{PREVIOUS_PASSWORD_FILE}\n\n\
         log_dest stderr\n\
         # For the agent, which follows it and keeps it short.\n\
         log_dest file {LOG_FOLDER}/{LOG_FILE}\n\
         log_type error\n\
         log_type warning\n\
         log_type notice\n\
         log_type information\n\
         log_timestamp_format %Y-%m-%dT%H:%M:%S\n\n\
         set_tcp_nodelay true\n\
         max_inflight_messages {MAX_INFLIGHT}\n\
         # Queues are bounded by bytes, not by number.\n\
         max_queued_messages 0\n\
         max_queued_bytes {}\n\
         max_packet_size {}\n",
        broker.namespace,
        broker.name,
        certificate_plugin(broker),
        queued_bytes(broker).map_or(0, |bytes| bytes + bytes / QUEUE_MARGIN),
        broker.spec.limits.max_message_bytes.saturating_add(FIXED_HEADER_BYTES),
    );
    // Writing to a String cannot fail, here and below.
    if let Some(bytes) = broker.memory_limit {
        let _ = writeln!(text, "memory_limit {bytes}");
    }
    let inflight = broker.memory_limit.map_or(MAX_INFLIGHT_BYTES, |bytes| (bytes / INFLIGHT_MEMORY_SHARE).min(MAX_INFLIGHT_BYTES));
    let _ = writeln!(text, "max_inflight_bytes {inflight}");
    text += &client_limits(&broker.spec.limits.clients);
    // The bounds plugin comes first: it affects how the database is opened.
    let _ = write!(text, "\npersistence_location {DATA_FOLDER}/\n{}\n{}", bounds_plugin(broker), persistence(broker.spec.durability));
    // For workers and the agent; a NetworkPolicy denies all others. Connections of devices do not count towards its limit.
    let internal = certificate(&name::internal_certificate(broker.name));
    let _ = write!(text, "\n{}{internal}client_limits false\n", listener(name::INTERNAL_MQTT_PORT, -1, true));
    for declared in started_listeners(broker) {
        // If only a certificate is required, the plugin sets the user name; the client's own user name is ignored.
        let named = declared.authentication() != ListenerAuthentication::Certificate;
        let _ = write!(text, "\n{}{}", listener(declared.port, broker.spec.limits.max_connections, named), tls(broker, declared));
    }
    text
}

/// The listeners that the broker opens. Without a trusted certificate, a listener that requires client certificates would prevent the start
/// of the broker.
pub fn started_listeners<'a>(broker: &BrokerConfiguration<'a>) -> impl Iterator<Item = &'a Listener> + use<'a> {
    let trusting = broker.trusts_client_certificates;
    broker.spec.listeners.iter().filter(move |listener| trusting || listener.authentication() == ListenerAuthentication::Password)
}

/// This plugin comes before the other one, which accepts its users on every listener.
fn certificate_plugin(broker: &BrokerConfiguration<'_>) -> String {
    let ports = |authentication| {
        let ports = started_listeners(broker)
            .filter(|listener| listener.authentication() == authentication)
            .map(|listener| listener.port.to_string());
        ports.collect::<Vec<_>>().join(",")
    };
    let options = [
        ("certificate_ports", ports(ListenerAuthentication::Certificate)),
        ("certificate_and_password_ports", ports(ListenerAuthentication::CertificateAndPassword)),
    ];
    let mut text = String::new();
    for (key, ports) in options.iter().filter(|(_, ports)| !ports.is_empty()) {
        let _ = writeln!(text, "plugin_opt_{key} {ports}");
    }
    if text.is_empty() {
        return text;
    }
    format!("global_plugin {CERTIFICATE_PLUGIN}\nplugin_opt_file {RUNTIME_FOLDER}/{CERTIFICATE_KEYS_FILE}\n{text}")
}

/// Bytes that may be queued for one client, if each queue has a limit. Mosquitto reports queues to a plugin only if a plugin persists
/// them: with snapshots, only the memory limit applies.
fn queued_bytes(broker: &BrokerConfiguration<'_>) -> Option<i64> {
    (broker.spec.durability != Durability::Snapshot).then_some(broker.queued_bytes)
}

/// Limits of each client (`images/mosquitto/patches`), and the plugin that removes what is left of devices that no longer exist.
fn client_limits(limits: &ClientLimits) -> String {
    let options = [
        ("queued_messages", limits.queued_messages),
        ("queued_bytes", limits.queued_bytes),
        ("inflight_messages", limits.in_flight_messages),
        ("retained_messages", limits.retained_messages),
        ("retained_bytes", limits.retained_bytes),
        ("subscriptions", limits.subscriptions),
        ("topic_levels", limits.topic_levels),
        ("topic_bytes", limits.topic_bytes),
        ("property_bytes", limits.property_bytes),
        ("will_bytes", limits.will_bytes),
        ("will_retain", i32::from(limits.retained_wills)),
        ("session_expiry", limits.session_expiry_seconds),
        ("messages_per_second", limits.messages_per_second),
        ("message_burst", limits.message_burst),
        ("bytes_per_second", limits.bytes_per_second),
        ("byte_burst", limits.byte_burst),
    ];
    let mut text = format!(
        "\nclient_limits_exempt_prefix {SYSTEM_USERNAME_PREFIX}\n\
         # In minutes. Until then an expired message counts towards the limits of its client.\n\
         retain_expiry_interval {RETAIN_EXPIRY_MINUTES}\n"
    );
    for (name, value) in options {
        let _ = writeln!(text, "client_limit_{name} {value}");
    }
    let _ = write!(
        text,
        "\nglobal_plugin {USERS_PLUGIN}\nplugin_opt_password_file {RUNTIME_FOLDER}/{PASSWORD_FILE}\n\
         plugin_opt_certificate_file {RUNTIME_FOLDER}/{CERTIFICATE_KEYS_FILE}\nplugin_opt_keep_prefix {SYSTEM_USERNAME_PREFIX}\n"
    );
    text
}

fn bounds_plugin(broker: &BrokerConfiguration<'_>) -> String {
    let when_full = match broker.spec.limits.when_full {
        WhenFull::Refuse => "refuse",
        WhenFull::Slow => "disconnect",
    };
    let port = name::INTERNAL_MQTT_PORT;
    let mut text = format!("global_plugin {BOUNDS_PLUGIN}\nplugin_opt_when_full {when_full}\nplugin_opt_trusted_port {port}\n");
    if let Some(bytes) = broker.memory_limit {
        let _ = writeln!(text, "plugin_opt_memory_bytes {}", bytes / 100 * TAKEN_MEMORY_PERCENT);
    }
    if let Some(bytes) = queued_bytes(broker) {
        let _ = writeln!(text, "plugin_opt_session_prefix {}\nplugin_opt_session_bytes {bytes}", name::INGEST_USERNAME_PREFIX);
    }
    text
}

fn persistence(durability: Durability) -> String {
    let sqlite = |sync: &str| format!("plugin {PERSISTENCE_PLUGIN}\nplugin_opt_sync {sync}\nplugin_opt_flush_period 0\n");
    match durability {
        Durability::Disk => sqlite("full"),
        Durability::Process => sqlite("normal"),
        Durability::Snapshot => format!("persistence true\nautosave_interval {SNAPSHOT_SECONDS}\n"),
    }
}

fn listener(port: i32, max_connections: i32, named: bool) -> String {
    let named = if named { "use_username_as_clientid true\n" } else { "" };
    format!("listener {port}\n{named}max_connections {max_connections}\n")
}

fn tls(broker: &BrokerConfiguration<'_>, listener: &Listener) -> String {
    listener.tls_secret(broker.name).map_or_else(String::new, |secret| {
        let mut text = certificate(&secret);
        if listener.authentication() != ListenerAuthentication::Password {
            let _ = write!(text, "require_certificate true\ncafile {CONFIGURATION_FOLDER}/{CLIENT_AUTHORITIES_FILE}\n");
        }
        text
    })
}

/// The certificate in this Secret, as the agent writes it, and the oldest allowed version of TLS.
fn certificate(secret: &str) -> String {
    let folder = format!("{RUNTIME_FOLDER}/{}", agent::tls_folder(secret));
    format!("certfile {folder}/{TLS_CERTIFICATE}\nkeyfile {folder}/{TLS_KEY}\ntls_version tlsv1.2\n")
}
