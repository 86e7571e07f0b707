//! The listeners of a Gateway's broker.

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

    /// TCP port, 1024 to 65535, because the broker runs without privileges. Ports 1884, 9090 and 9443 are reserved for the internal
    /// listener and the agent's HTTP endpoint.
    #[schemars(range(min = 1024, max = 65535))]
    #[x_kube(validation = ("self != 1884 && self != 9090 && self != 9443", "ports 1884, 9090 and 9443 are used by Fleetwright itself: choose another port"))]
    pub port: i32,

    /// Protocol of the listener: `Mqtt` is MQTT 3.1.1 and 5.0 over TCP.
    #[serde(default)]
    pub protocol: Protocol,

    /// Encrypts connections with TLS 1.2 or 1.3; `tls: {}` uses the defaults. Default: plain TCP.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tls: Option<ListenerTls>,
}

/// TLS of a listener.
#[derive(Clone, Debug, Deserialize, Eq, JsonSchema, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct ListenerTls {
    /// Secret of type `kubernetes.io/tls` in this namespace with the keys `tls.crt` (the chain, leaf first), `tls.key` and, for
    /// clients, `ca.crt`, as cert-manager or `kubectl create secret tls` writes it. The certificate must be valid for each of
    /// `service.hostNames`, or for `<gateway>.<namespace>.svc` if there are none. The operator validates a renewed certificate, and
    /// the broker loads it without disconnecting clients. If the certificate is invalid, the condition `CertificateValid` has the
    /// reason, and the broker keeps its current certificate. If the new key is of another kind (RSA or ECDSA), the broker presents the
    /// previous certificate as well until its pod is deleted, and `CertificateValid` reports it.
    ///
    /// Default: the operator creates an authority for this Gateway, issues a certificate, writes it to the Secret `<gateway>-tls` and
    /// renews it. Clients trust the `ca.crt` of that Secret. If that Secret is deleted, the operator issues another certificate.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 253))]
    pub secret_name: Option<String>,

    /// Authentication of the listener's clients. `Password`: user name and password. `Certificate`: a client certificate of
    /// `spec.clientAuthority` and no password; the user name and the client identifier are the name of the Device, and the values
    /// that the client sends are ignored. `CertificateAndPassword`: both, for the same Device. To accept certificates from some
    /// clients and passwords from others, declare two listeners with different ports. A change restarts the broker.
    #[serde(default)]
    pub authentication: ListenerAuthentication,
}

impl Listener {
    /// Authentication of the listener's clients.
    #[must_use]
    pub fn authentication(&self) -> ListenerAuthentication {
        self.tls.as_ref().map_or(ListenerAuthentication::Password, |tls| tls.authentication)
    }

    /// Secret with the listener's certificate, if it has TLS.
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

/// Authentication of a listener's clients.
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
