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
    /// The operator reads the key to sign with it; neither the broker nor any device ever gets it. Clients are trusted whose
    /// certificates `tls.crt` or `ca.crt` lead to; one of these has to be a root (signed by itself). Of a Secret that cannot be
    /// used the condition `ClientAuthorityValid` tells, and the broker goes on with what it has. When another authority takes its
    /// place, each Device gets a new certificate, and the broker restarts; put the certificate of the one before into `ca.crt`,
    /// beside the new one, for as long as devices take to fetch theirs.
    #[schemars(length(min = 1, max = 253))]
    pub secret_name: String,

    /// For how long a device's certificate is valid, such as `90d`: a number and `s`, `m`, `h`, `d` or `w`; never longer than the
    /// authority's own. When two thirds of that are over, at the latest, the Device's status holds a new one, and the device has
    /// the last third to fetch it.
    #[serde(default = "default_validity")]
    #[schemars(length(max = 8), regex(pattern = r"^[1-9][0-9]{0,5}[smhdw]$"))]
    pub validity: String,
}

fn default_validity() -> String {
    "90d".to_owned()
}

/// Seconds for which a device's certificate is valid where a Gateway says nothing else.
pub const DEFAULT_VALIDITY_SECONDS: i64 = 90 * 86_400;
