//! A CertificateRequest of cert-manager: what is asked for a Device, and what comes of it. Pure.
//! <https://cert-manager.io/docs/usage/certificaterequest/>

use k8s_openapi::ByteString;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::CustomResource;
use serde::{Deserialize, Serialize};

use super::certificate::Signer;
use super::key::DeviceKey;
use super::secret::owner;
use crate::api::client_authority::IssuerReference;
use crate::api::name::{self, GATEWAY_LABEL, ROLE_CERTIFICATE_REQUEST, ROLE_LABEL};
use crate::api::reason::Reason;
use crate::operator::kubernetes::apply::standard_labels;

/// The part of a CertificateRequest that is used.
#[derive(Clone, CustomResource, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[kube(
    group = "cert-manager.io",
    version = "v1",
    kind = "CertificateRequest",
    namespaced,
    schema = "disabled",
    status = "CertificateRequestStatus"
)]
#[serde(rename_all = "camelCase")]
pub struct CertificateRequestSpec {
    /// The signing request, as PEM.
    pub request: ByteString,

    /// Who is to sign.
    pub issuer_ref: IssuerReference,

    /// For how long, as Go writes it. What is issued may be valid for less.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub duration: Option<String>,

    /// For what.
    #[serde(default)]
    pub usages: Vec<String>,
}

/// What came of it.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Serialize)]
pub struct CertificateRequestStatus {
    /// `Ready`, `Approved`, `Denied`, `InvalidRequest`.
    #[serde(default)]
    pub conditions: Vec<CertificateRequestCondition>,

    /// As PEM: the certificate, and what leads to the root.
    #[serde(default)]
    pub certificate: Option<ByteString>,
}

/// Unlike those of Kubernetes, all but type and status may be missing.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct CertificateRequestCondition {
    /// As in a Condition of Kubernetes.
    #[serde(rename = "type")]
    pub type_: String,
    /// As in a Condition of Kubernetes.
    pub status: String,
    /// As in a Condition of Kubernetes.
    #[serde(default)]
    pub reason: String,
    /// As in a Condition of Kubernetes.
    #[serde(default)]
    pub message: String,
}

/// What a CertificateRequest came to.
#[derive(Debug, Eq, PartialEq)]
pub enum Answer<'a> {
    /// Nothing yet; with what it waits for, as far as it says so.
    Pending(Option<&'a str>),
    /// A certificate.
    Issued(&'a [u8]),
    /// It will never be one, for this reason.
    Refused(Reason, &'a str),
}

/// What is asked for a Device (of this uid), whose signing request has this text.
#[must_use]
pub fn wanted(key: &DeviceKey, uid: &str, text: &str, issuer: &IssuerReference, signer: &Signer) -> CertificateRequest {
    let mut labels = standard_labels("device", &key.gateway.name);
    labels.insert(GATEWAY_LABEL.to_owned(), key.gateway.name.to_string());
    labels.insert(ROLE_LABEL.to_owned(), ROLE_CERTIFICATE_REQUEST.to_owned());
    CertificateRequest {
        metadata: ObjectMeta {
            name: Some(name::certificate_request(&key.name)),
            namespace: Some(key.gateway.namespace.to_string()),
            labels: Some(labels),
            owner_references: Some(vec![owner(key, uid)]),
            ..ObjectMeta::default()
        },
        spec: CertificateRequestSpec {
            request: ByteString(text.as_bytes().to_vec()),
            issuer_ref: issuer.clone(),
            duration: Some(format!("{}s", signer.validity.as_secs())),
            usages: vec!["digital signature".to_owned(), "client auth".to_owned()],
        },
        status: None,
    }
}

/// Whether a CertificateRequest asks for this. For how long is the issuer's to say.
#[must_use]
pub fn asks_for(found: &CertificateRequest, wanted: &CertificateRequest) -> bool {
    found.spec.request == wanted.spec.request && found.spec.issuer_ref == wanted.spec.issuer_ref
}

/// What a CertificateRequest came to.
#[must_use]
pub fn answer(request: &CertificateRequest) -> Answer<'_> {
    let Some(status) = &request.status else { return Answer::Pending(None) };
    let of = |type_: &str| status.conditions.iter().find(|condition| condition.type_ == type_);
    let holds = |type_: &str| of(type_).filter(|condition| condition.status == "True");
    if let Some(denied) = holds("Denied") {
        return Answer::Refused(Reason::CertificateDenied, &denied.message);
    }
    if let Some(invalid) = holds("InvalidRequest") {
        return Answer::Refused(Reason::CertificateRefused, &invalid.message);
    }
    match (of("Ready"), &status.certificate) {
        (Some(ready), Some(certificate)) if ready.status == "True" => Answer::Issued(&certificate.0),
        (Some(ready), _) if ["Failed", "Denied"].contains(&ready.reason.as_str()) => {
            Answer::Refused(Reason::CertificateRefused, &ready.message)
        }
        (Some(ready), _) => Answer::Pending(Some(&ready.message)),
        (None, _) => Answer::Pending(None),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn request(status: &Value) -> CertificateRequest {
        serde_json::from_value(json!({
            "apiVersion": "cert-manager.io/v1", "kind": "CertificateRequest", "metadata": {"name": "d-certificate"},
            "spec": {"request": "Y3Ny", "issuerRef": {"name": "i"}, "usages": ["client auth"], "username": "u"}, "status": status
        }))
        .unwrap()
    }

    fn condition(type_: &str, status: &str, reason: &str) -> Value {
        json!({"type": type_, "status": status, "reason": reason, "message": "why"})
    }

    #[test]
    fn a_request_is_followed_to_its_end() {
        let approved = condition("Approved", "True", "cert-manager.io");
        for (status, expected) in [
            (Value::Null, Answer::Pending(None)),
            (json!({}), Answer::Pending(None)),
            (json!({"conditions": [approved]}), Answer::Pending(None)),
            (json!({"conditions": [approved, condition("Ready", "False", "Pending")]}), Answer::Pending(Some("why"))),
            (json!({"conditions": [approved, condition("Ready", "True", "Issued")], "certificate": "cGVt"}), Answer::Issued(b"pem")),
            (json!({"conditions": [approved, condition("Ready", "False", "Failed")]}), Answer::Refused(Reason::CertificateRefused, "why")),
            (
                json!({"conditions": [condition("Denied", "True", "x"), condition("Ready", "False", "Denied")]}),
                Answer::Refused(Reason::CertificateDenied, "why"),
            ),
            (json!({"conditions": [condition("Denied", "False", "x")]}), Answer::Pending(None)),
            (json!({"conditions": [condition("InvalidRequest", "True", "x")]}), Answer::Refused(Reason::CertificateRefused, "why")),
        ] {
            assert_eq!(answer(&request(&status)), expected, "{status}");
        }
    }

    #[test]
    fn another_request_or_issuer_asks_for_something_else() {
        let found = request(&Value::Null);
        let mut wanted = found.clone();
        assert!(asks_for(&found, &wanted));
        wanted.spec.duration = Some("1s".to_owned());
        assert!(asks_for(&found, &wanted), "as the issuer defaults it");
        wanted.spec.issuer_ref.kind = "ClusterIssuer".to_owned();
        assert!(!asks_for(&found, &wanted));
        wanted = found.clone();
        wanted.spec.request = ByteString(b"other".to_vec());
        assert!(!asks_for(&found, &wanted));
    }
}
