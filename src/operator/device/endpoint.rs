//! The address that the devices of a Gateway connect to, as written to their Secrets. Pure.

use std::collections::BTreeMap;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::num::NonZeroU64;

use k8s_openapi::ByteString;
use k8s_openapi::api::core::v1::Secret;
use serde_json::{Value, json};

use crate::configuration::agent::TLS_AUTHORITIES;
use crate::operator::kubernetes::secret::value;

/// Keys of a Device's Secret with the address.
const KEYS: [&str; 4] = ["gateway", "port", "uri", TLS_AUTHORITIES];

/// Upper limit of the CA bundle that is copied into each Device's Secret, in bytes: some ten certificates. A public bundle of 200
/// KiB is present on devices; for 15,000 devices it would take 3 GB of the API server's storage.
const MAX_AUTHORITIES: usize = 16 << 10;

/// The address that the devices of a Gateway connect to.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Endpoint {
    data: BTreeMap<&'static str, Vec<u8>>,
    digest: NonZeroU64,
}

impl Endpoint {
    /// From host, port, whether the port expects TLS, and the CA bundle (PEM) that clients trust.
    #[must_use]
    pub fn new(host: &str, port: i32, tls: bool, authorities: Option<&[u8]>) -> Self {
        let scheme = if tls { "mqtts" } else { "mqtt" };
        // An IPv6 address is enclosed in brackets (RFC 3986, section 3.2.2).
        let authority = if host.contains(':') { format!("[{host}]:{port}") } else { format!("{host}:{port}") };
        let texts = [("gateway", host.to_owned()), ("port", port.to_string()), ("uri", format!("{scheme}://{authority}"))];
        let mut data: BTreeMap<_, _> = texts.into_iter().map(|(key, value)| (key, value.into_bytes())).collect();
        if let Some(authorities) = authorities.filter(|pem| tls && !pem.is_empty() && pem.len() <= MAX_AUTHORITIES) {
            data.insert(TLS_AUTHORITIES, authorities.to_vec());
        }
        let digest = digest(|key| data.get(key).map(Vec::as_slice));
        Self { data, digest }
    }

    /// Equal to [`digest_of`] a Secret with this address.
    #[must_use]
    pub fn digest(&self) -> NonZeroU64 {
        self.digest
    }

    /// The data of a Secret.
    #[must_use]
    pub fn data(&self) -> BTreeMap<String, ByteString> {
        self.data.iter().map(|(key, value)| ((*key).to_owned(), ByteString(value.clone()))).collect()
    }

    /// The merge patch that writes this address to a Secret.
    #[must_use]
    pub fn change(&self, secret: &Secret) -> Value {
        let data: BTreeMap<_, _> = KEYS.iter().map(|key| (*key, self.data.get(key).map(|value| ByteString(value.clone())))).collect();
        // The API server refuses the patch if the Secret changed meanwhile. Then the next action is determined again.
        json!({"metadata": {"resourceVersion": secret.metadata.resource_version}, "data": data})
    }
}

/// Digest of the address in a Secret. It is valid within this process.
#[must_use]
pub fn digest_of(secret: &Secret) -> NonZeroU64 {
    digest(|key| value(secret, key))
}

fn digest<'a>(value: impl Fn(&str) -> Option<&'a [u8]>) -> NonZeroU64 {
    let mut hasher = DefaultHasher::new();
    for key in KEYS {
        value(key).hash(&mut hasher);
    }
    NonZeroU64::new(hasher.finish()).unwrap_or(NonZeroU64::MIN)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(endpoint: &Endpoint, key: &str) -> Option<String> {
        endpoint.data().get(key).map(|value| String::from_utf8(value.0.clone()).unwrap())
    }

    #[test]
    fn a_uri_shows_tls_and_encloses_ipv6_in_brackets() {
        let large = vec![b'x'; MAX_AUTHORITIES + 1];
        for (host, tls, authorities, uri, copied) in [
            ("plant-1.fleet.svc", false, None, "mqtt://plant-1.fleet.svc:1883", false),
            ("plant-1.fleet.svc", false, Some(&b"PEM"[..]), "mqtt://plant-1.fleet.svc:1883", false),
            ("mqtt.example.org", true, Some(b"PEM"), "mqtts://mqtt.example.org:1883", true),
            ("mqtt.example.org", true, Some(b""), "mqtts://mqtt.example.org:1883", false),
            ("mqtt.example.org", true, Some(&large), "mqtts://mqtt.example.org:1883", false),
            ("2001:db8::1", true, None, "mqtts://[2001:db8::1]:1883", false),
        ] {
            let endpoint = Endpoint::new(host, 1883, tls, authorities);
            assert_eq!(text(&endpoint, "uri").as_deref(), Some(uri));
            assert_eq!((text(&endpoint, "gateway").as_deref(), text(&endpoint, "port").as_deref()), (Some(host), Some("1883")));
            assert_eq!(text(&endpoint, TLS_AUTHORITIES).is_some(), copied, "{uri}");
        }
    }

    #[test]
    fn the_digest_identifies_the_address_in_a_secret() {
        let endpoint = Endpoint::new("h", 8883, true, Some(b"PEM"));
        let mut secret = Secret { data: Some(endpoint.data()), ..Secret::default() };
        secret.data.as_mut().unwrap().insert("password".to_owned(), ByteString(b"of no concern".to_vec()));
        assert_eq!(digest_of(&secret), endpoint.digest());
        for key in KEYS {
            let mut other = secret.clone();
            other.data.as_mut().unwrap().remove(key);
            assert_ne!(digest_of(&other), endpoint.digest(), "without {key}");
        }
        assert_ne!(Endpoint::new("h", 8883, true, None).digest(), endpoint.digest());
        assert!(Endpoint::new("h", 8883, true, None).change(&secret)["data"][TLS_AUTHORITIES].is_null(), "outdated keys are removed");
    }
}
