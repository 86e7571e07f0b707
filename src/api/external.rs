//! A broker that runs elsewhere, as a Gateway names it.

use kube::KubeSchema;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// A broker that runs elsewhere: a Mosquitto, EMQX or HiveMQ of your own, or a cloud's. It has to speak MQTT 5.
#[derive(Clone, Debug, Deserialize, Eq, KubeSchema, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct ExternalBroker {
    /// Where the broker listens, as `host:port`, for instance `mqtt.example.org:8883`. An IPv6 address stands in brackets. Operator
    /// and workers connect to it, and so it has to be reachable from inside the cluster.
    #[schemars(length(min = 3, max = 261), regex(pattern = r"^([a-zA-Z0-9]([-a-zA-Z0-9._]*[a-zA-Z0-9])?|\[[0-9a-fA-F:.]+\]):[0-9]{1,5}$"))]
    #[x_kube(validation = ("int(self.split(':')[self.split(':').size() - 1]) >= 1 && int(self.split(':')[self.split(':').size() - 1]) <= 65535", "the port is a number from 1 to 65535"))]
    pub address: String,

    /// Encrypts the connections with TLS 1.2 or 1.3; `tls: {}` is enough where the broker's certificate is of a public authority.
    /// The certificate has to be for the host of `address`. Left out: plain TCP, over which the password is legible.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tls: Option<ExternalTls>,

    /// The login of operator and workers. The broker has to let it subscribe to `devices/+/desired`, `devices/+/reported` and
    /// `devices/+/connection`, publish (retained) to `devices/+/desired` and `devices/+/reported`, and subscribe to the topics of
    /// the Pipelines that read this Gateway. A changed Secret is followed; workers log in with it from their next connection on.
    ///
    /// The Secret has to be of the type `kubernetes.io/basic-auth` or to have the label `fleetwright.io/credentials: "true"`, because its
    /// values are sent to `address`. User name and password must have no control characters; a final line break is removed.
    pub credentials_secret: LoginSecretReference,

    /// Lets several workers of a Pipeline read this broker at the same time, for a broker (mostly a cluster) that one worker cannot
    /// follow. Left out: each Pipeline reads it in one session, by one worker, and the messages keep their order.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub shared_subscription: Option<SharedSubscription>,
}

/// A subscription that several sessions of each Pipeline share (MQTT 5.0, section 4.8.2): they subscribe to `$share/<group>/<filter>`,
/// with a group of the Pipeline's own, and the broker gives each message to one of them. `workers.replicas` of the Pipeline spreads
/// the sessions over workers; a worker that takes over a session continues where the previous worker stopped.
///
/// - The broker has to offer shared subscriptions with QoS 1, as EMQX, HiveMQ, VerneMQ, NanoMQ, Mosquitto and the clouds' brokers do, and
///   to let the login of `credentialsSecret` subscribe to them.
/// - Messages of one device may go to different sessions. So they are stored in any order; rows are sorted by their own time all the same.
/// - Nothing is lost, and rows whose time is in the message are stored once, whatever happens: the table's key (time and device) sees to that.
///   Rows that take the time of their arrival, and dead letters, have no such key. They are stored once at a broker that keeps what a session
///   has not acknowledged for that very session, as Mosquitto does. MQTT also lets a broker give it to another session when a connection
///   breaks: then they may be stored twice. So they may while the topic of a Pipeline changes to another that overlaps it.
/// - A worker that is away holds up the messages that the broker has given to its sessions, until it is back.
/// - A Pipeline of the format `SparkplugB` reads in one session nevertheless: what a node means follows from its births, which have to come
///   to where its data comes.
///
/// It can be added, changed and removed at any time: sessions that are no longer wanted are unsubscribed, read until they are empty, and ended.
#[derive(Clone, Debug, Deserialize, Eq, JsonSchema, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct SharedSubscription {
    /// How many sessions of each Pipeline share the subscription: the most workers that can read this broker. Several of one worker
    /// cost it a little memory and speed, so two to four for each worker that there may be one day are plenty.
    #[serde(default = "default_sessions")]
    #[schemars(range(min = 2, max = MAX_SESSIONS))]
    pub sessions: i32,
}

/// The most sessions that share a subscription: as many workers bring more than a database takes. Times of arrival are given in steps of so
/// many microseconds, a session each its own, so that with many more a busy session would run ahead of the clock (here beyond 62,500 readings
/// a second).
pub const MAX_SESSIONS: i32 = 16;

const fn default_sessions() -> i32 {
    4
}

/// TLS of the connections to a broker that runs elsewhere.
#[derive(Clone, Debug, Default, Deserialize, Eq, JsonSchema, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct ExternalTls {
    /// Secret in this namespace whose key `ca.crt` holds the certificates (PEM) of the authorities to trust. Left out: the public
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
    /// The host, without the brackets of an IPv6 address, and the port. `None` where the address is none, which the schema refuses.
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
