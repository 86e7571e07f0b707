//! Who signs the certificates of a Gateway's devices.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Who signs the certificates of devices.
#[derive(Clone, Debug, Deserialize, Eq, JsonSchema, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct ClientAuthority {
    /// Secret of type `kubernetes.io/tls` in this namespace with a certificate authority: `tls.crt` (its own certificate first,
    /// and after each certificate the one that issued it) and `tls.key`. What cert-manager writes for a Certificate with `isCA:
    /// true` is used as it is (with `privateKey.rotationPolicy: Never`, so that it stays the same authority when it is renewed).
    /// The operator reads the key and signs with it; neither the broker nor a device gets it. The broker trusts clients whose
    /// certificate chain ends in `tls.crt` or `ca.crt`; one of these certificates has to be a root (signed by itself). If the Secret
    /// is not usable, the condition `ClientAuthorityValid` is False, and the broker keeps the authorities that it has. When the
    /// authority is replaced, each Device gets a new certificate, and the broker restarts. Keep the certificate of the previous
    /// authority in `ca.crt`, together with the new one, until all devices have fetched their new certificates.
    #[schemars(length(min = 1, max = 253))]
    pub secret_name: String,

    /// An issuer of cert-manager that signs in place of the operator, so that the authority's key may be anywhere. For each
    /// `certificateSigningRequest` of a Device the operator creates a CertificateRequest (`<device>-certificate`), waits until it is
    /// approved and signed, and deletes it. The subject is what the request says: it has to be `CN=<device>`, and nothing else may be
    /// asked for. `secretName` then names a Secret of any type with the certificates to trust, in `ca.crt` or, where that is missing,
    /// in `tls.crt`, the issuer's own first; no key is read. Left out: the operator signs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub issuer_ref: Option<IssuerReference>,

    /// For how long a device's certificate is valid, such as `90d` or `12h`; never longer than the
    /// authority's own, and with an issuer no longer than that gives. When two thirds of that are over, at the latest, the Device's
    /// status holds a new one, and the device has the last third to fetch it.
    #[serde(default = "default_validity")]
    #[schemars(length(min = 2, max = 32), regex(pattern = super::duration::PATTERN))]
    pub validity: String,
}

/// An issuer of cert-manager, as its own resources name one.
#[derive(Clone, Debug, Deserialize, Eq, Hash, JsonSchema, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct IssuerReference {
    /// Name of the issuer.
    #[schemars(length(min = 1, max = 253))]
    pub name: String,

    /// `Issuer` (of this namespace), `ClusterIssuer`, or the kind of an issuer that is not cert-manager's own.
    #[serde(default = "default_issuer_kind")]
    #[schemars(length(min = 1, max = 63))]
    pub kind: String,

    /// API group of that kind.
    #[serde(default = "default_issuer_group")]
    #[schemars(length(min = 1, max = 253))]
    pub group: String,
}

fn default_issuer_kind() -> String {
    "Issuer".to_owned()
}

fn default_issuer_group() -> String {
    "cert-manager.io".to_owned()
}

fn default_validity() -> String {
    "90d".to_owned()
}

/// Seconds for which a device's certificate is valid where a Gateway says nothing else.
pub const DEFAULT_VALIDITY_SECONDS: i64 = 90 * 86_400;
