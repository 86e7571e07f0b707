//! The authority that signs the certificates of a Gateway's devices.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// The authority that signs the certificates of devices.
#[derive(Clone, Debug, Deserialize, Eq, JsonSchema, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct ClientAuthority {
    /// Secret of type `kubernetes.io/tls` in this namespace with a certificate authority: `tls.crt` (the authority's certificate
    /// first, each certificate followed by its issuer's) and `tls.key`. A Secret of a cert-manager Certificate with `isCA: true` is
    /// suitable; set `privateKey.rotationPolicy: Never`, so that renewal keeps the key. The operator signs with the key; neither the
    /// broker nor a device gets it. The broker trusts clients whose certificate chain ends in `tls.crt` or `ca.crt`; one of these
    /// certificates must be a self-signed root. If the Secret is invalid, the condition `ClientAuthorityValid` is False, and the
    /// broker keeps its current authorities. When the authority is replaced, each Device gets a new certificate, and the broker
    /// restarts. Keep the certificates of both authorities in `ca.crt` until all devices have fetched their new certificates.
    #[schemars(length(min = 1, max = 253))]
    pub secret_name: String,

    /// A cert-manager issuer that signs instead of the operator, so that the key of the authority does not have to be in the
    /// cluster. For each `certificateSigningRequest` of a Device the operator creates a CertificateRequest (`<device>-certificate`),
    /// waits until it is approved and signed, and deletes it. The signing request must have the subject `CN=<device>` and no other
    /// attributes or extensions. `secretName` then names a Secret of any type with the certificates to trust in `ca.crt` or, without
    /// that key, in `tls.crt`, the issuer's certificate first; the operator reads no private key. Default: the operator signs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub issuer_ref: Option<IssuerReference>,

    /// Validity of a device's certificate, such as `90d` or `12h`. A certificate never outlives the authority's certificate, and an
    /// issuer may shorten its validity. After two thirds of the validity, at the latest, the Device's status has a new certificate;
    /// the device fetches it in the last third.
    #[serde(default = "default_validity")]
    #[schemars(length(min = 2, max = 32), regex(pattern = super::duration::PATTERN))]
    pub validity: String,
}

/// Reference to a cert-manager issuer.
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

/// Validity in seconds of a device's certificate unless a Gateway sets `validity`.
pub const DEFAULT_VALIDITY_SECONDS: i64 = 90 * 86_400;
