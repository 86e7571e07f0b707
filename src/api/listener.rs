//! Where the broker of a Gateway listens, and for whom.

use kube::KubeSchema;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::name;

/// One port of the broker.
#[derive(Clone, Debug, Deserialize, Eq, KubeSchema, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Listener {
    /// Name of the listener, and of the port in the Service: lower case letters, digits and dashes, at most 15 characters.
    #[schemars(length(min = 1, max = 15), regex(pattern = r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$"))]
    pub name: String,

    /// TCP port, 1024 to 65535 (the broker runs without privileges; a Service can map a lower one). 1884 and 9090 are
    /// taken by the operator's own listener and the agent's probes.
    #[schemars(range(min = 1024, max = 65535))]
    #[x_kube(validation = ("self != 1884 && self != 9090", "ports 1884 and 9090 are used by Fleetwright itself: choose another port"))]
    pub port: i32,

    /// Protocol spoken: `Mqtt` is MQTT 3.1.1 and 5.0 over TCP.
    #[serde(default)]
    pub protocol: Protocol,

    /// Encrypts the listener with TLS 1.2 or 1.3; `tls: {}` is enough for that. Left out: plain TCP.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tls: Option<ListenerTls>,
}

/// TLS of a listener.
#[derive(Clone, Debug, Deserialize, Eq, JsonSchema, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct ListenerTls {
    /// Secret of type `kubernetes.io/tls` in this namespace, with the keys `tls.crt` (the chain, leaf first) and
    /// `tls.key`, and for clients `ca.crt`; as cert-manager writes it, or `kubectl create secret tls`. The certificate has to be
    /// for each of `service.hostNames`; without those, for `<gateway>.<namespace>.svc`. A renewed Secret is checked and then
    /// reaches the running broker, and no client is disconnected; of a bad one the condition `CertificateValid` tells, and the
    /// broker keeps the certificate that it has. Where the new key is of another kind (RSA, ECDSA), the broker presents the former
    /// certificate beside the new one until its pod is deleted, and `CertificateValid` says so. Left out: the operator issues a certificate from an authority of this Gateway's
    /// own, writes it to the Secret `<gateway>-tls` and renews it; clients trust that Secret's `ca.crt`. Should that Secret be
    /// deleted, it is issued again.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 253))]
    pub secret_name: Option<String>,

    /// How clients of this listener prove who they are. `Password`: by user name and password. `Certificate`: by a certificate of
    /// `spec.clientAuthority`, and by nothing else; user name and client identifier are the name of the Device, whatever the client
    /// says. `CertificateAndPassword`: by both, and both of the same Device. One listener does not take certificates from some
    /// and passwords from others: declare two for that, each with a port of its own. A change restarts the broker.
    #[serde(default)]
    pub authentication: ListenerAuthentication,
}

impl Listener {
    /// How clients prove who they are.
    #[must_use]
    pub fn authentication(&self) -> ListenerAuthentication {
        self.tls.as_ref().map_or(ListenerAuthentication::Password, |tls| tls.authentication)
    }

    /// Secret with the listener's certificate, where it has TLS.
    #[must_use]
    pub fn tls_secret(&self, gateway: &str) -> Option<String> {
        self.tls.as_ref().map(|tls| tls.secret_name.clone().unwrap_or_else(|| name::server_certificate(gateway)))
    }
}

/// Protocol of a listener.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, JsonSchema, PartialEq, Serialize)]
pub enum Protocol {
    /// MQTT 3.1.1 and 5.0 over TCP.
    #[default]
    Mqtt,
}

/// How clients of a listener prove who they are.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, JsonSchema, PartialEq, Serialize)]
pub enum ListenerAuthentication {
    /// By user name and password.
    #[default]
    Password,
    /// By certificate.
    Certificate,
    /// By certificate, and by user name and password.
    CertificateAndPassword,
}
