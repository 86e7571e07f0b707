//! The external broker of a Gateway.

use kube::KubeSchema;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// An external broker, such as Mosquitto, EMQX, HiveMQ or a cloud service. It must support MQTT 5.
#[derive(Clone, Debug, Deserialize, Eq, KubeSchema, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct ExternalBroker {
    /// Address of the broker as `host:port`, for instance `mqtt.example.org:8883`. An IPv6 address is in brackets. The operator and
    /// the workers connect to it, so it must be reachable from inside the cluster.
    #[schemars(length(min = 3, max = 261), regex(pattern = r"^([a-zA-Z0-9]([-a-zA-Z0-9._]*[a-zA-Z0-9])?|\[[0-9a-fA-F:.]+\]):[0-9]{1,5}$"))]
    #[x_kube(validation = ("int(self.split(':')[self.split(':').size() - 1]) >= 1 && int(self.split(':')[self.split(':').size() - 1]) <= 65535", "the port is a number from 1 to 65535"))]
    pub address: String,

    /// Encrypts the connections with TLS 1.2 or 1.3; `tls: {}` is sufficient if a public authority issued the broker's certificate.
    /// The certificate must be valid for the host of `address`. Default: plain TCP, which transmits the password unencrypted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tls: Option<ExternalTls>,

    /// The user of the operator and the workers. It must be allowed to subscribe to `devices/+/desired`, `devices/+/reported` and
    /// `devices/+/connection`, to publish (retained) to `devices/+/desired` and `devices/+/reported`, and to subscribe to the topics
    /// of the Pipelines that read this Gateway. After a change of the Secret, workers use it at their next connection.
    ///
    /// The Secret must have the type `kubernetes.io/basic-auth` or the label `fleetwright.io/credentials: "true"`, because its values are sent
    /// to `address`. User name and password must not contain control characters; a final line break is removed.
    pub credentials_secret: LoginSecretReference,

    /// Lets several workers of a Pipeline read this broker at the same time, if its message rate (usually that of a cluster) exceeds
    /// the capacity of one worker. Default: each Pipeline reads with one session of one worker, and messages keep their order.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub shared_subscription: Option<SharedSubscription>,
}

/// A subscription that several sessions of each Pipeline share (MQTT 5.0, section 4.8.2): they subscribe to `$share/<group>/<filter>`,
/// with one group per Pipeline, and the broker delivers each message to one session of the group. `workers.replicas` of the Pipeline
/// distributes the sessions over workers. A worker that takes over a session continues where the previous worker stopped.
///
/// - The broker must support shared subscriptions with QoS 1, as EMQX, HiveMQ, VerneMQ, NanoMQ, Mosquitto and the cloud services do, and
///   must allow the user of `credentialsSecret` to use them.
/// - Messages of one device may go to different sessions, so they are stored in any order. Rows are sorted by their timestamp.
/// - No message is lost. Rows with a timestamp from the message are never duplicated, because the table has a unique index on time and
///   device. Rows with the time of arrival, and dead letters, have no such index. They are not duplicated if the broker redelivers
///   unacknowledged messages to the same session, as Mosquitto does. MQTT allows a broker to redeliver them to another session after a
///   connection breaks; then duplicates are possible. Duplicates are also possible while the topic of a Pipeline changes to a topic that
///   overlaps the previous one.
/// - While a worker is down, the messages that the broker has assigned to its sessions wait.
/// - A Pipeline with the format `SparkplugB` always uses one session, because the births of a node must arrive in the same session as its
///   data.
///
/// The field can be added, changed and removed at any time. Surplus sessions are unsubscribed, read until they are empty, and ended.
#[derive(Clone, Debug, Deserialize, Eq, JsonSchema, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct SharedSubscription {
    /// Number of sessions per Pipeline that share the subscription. It is the maximum number of workers that can read this broker.
    /// Each further session of a worker costs a little memory and throughput. Two to four sessions per planned worker are enough.
    #[serde(default = "default_sessions")]
    #[schemars(range(min = 2, max = MAX_SESSIONS))]
    pub sessions: i32,
}

/// Maximum number of sessions that share a subscription. This many workers exceed the write rate of a database. Each session assigns times
/// of arrival in steps of this many microseconds with its own offset. With a higher limit, the times of a busy session would run ahead of the
/// clock (here at more than 62,500 readings per second).
pub const MAX_SESSIONS: i32 = 16;

const fn default_sessions() -> i32 {
    4
}

/// TLS of the connections to an external broker.
#[derive(Clone, Debug, Default, Deserialize, Eq, JsonSchema, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct ExternalTls {
    /// Secret in this namespace with the certificates (PEM) of the trusted authorities in the key `ca.crt`. Default: the public
    /// authorities.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 253))]
    pub ca_secret_name: Option<String>,
}

/// Two keys of a Secret of the same namespace that hold a user name and its password.
#[derive(Clone, Debug, Deserialize, Eq, JsonSchema, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct LoginSecretReference {
    /// Name of the Secret.
    #[schemars(length(min = 1, max = 253))]
    pub name: String,

    /// Key of the Secret that holds the user name.
    #[serde(default = "username_key")]
    #[schemars(length(min = 1, max = 253), regex(pattern = r"^[-._a-zA-Z0-9]+$"))]
    pub username_key: String,

    /// Key of the Secret that holds the password.
    #[serde(default = "password_key")]
    #[schemars(length(min = 1, max = 253), regex(pattern = r"^[-._a-zA-Z0-9]+$"))]
    pub password_key: String,
}

fn username_key() -> String {
    "username".to_owned()
}

fn password_key() -> String {
    "password".to_owned()
}

impl ExternalBroker {
    /// The host, without the brackets of an IPv6 address, and the port. `None` if the address is invalid; the schema refuses such an
    /// address.
    #[must_use]
    pub fn host_and_port(&self) -> Option<(&str, u16)> {
        let (host, port) = self.address.rsplit_once(':')?;
        let host = host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(host);
        let port = port.parse().ok().filter(|port| *port > 0)?;
        (!host.is_empty()).then_some((host, port))
    }

    /// Names of the Secrets that it names.
    pub fn secrets(&self) -> impl Iterator<Item = &str> {
        let authorities = self.tls.as_ref().and_then(|tls| tls.ca_secret_name.as_deref());
        [Some(self.credentials_secret.name.as_str()), authorities].into_iter().flatten()
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn an_address_is_a_host_and_a_port() {
        for (address, expected) in [
            ("mqtt.example.org:8883", Some(("mqtt.example.org", 8883))),
            ("10.0.0.7:1883", Some(("10.0.0.7", 1883))),
            ("[2001:db8::1]:1883", Some(("2001:db8::1", 1883))),
            ("mqtt.example.org", None),
            ("mqtt.example.org:0", None),
            ("mqtt.example.org:65536", None),
            (":1883", None),
        ] {
            let broker: ExternalBroker =
                serde_json::from_value(json!({"address": address, "credentialsSecret": {"name": "login"}})).unwrap();
            assert_eq!(broker.host_and_port(), expected, "{address}");
            assert_eq!((&*broker.credentials_secret.username_key, &*broker.credentials_secret.password_key), ("username", "password"));
            assert_eq!(broker.secrets().collect::<Vec<_>>(), ["login"]);
        }
    }
}
