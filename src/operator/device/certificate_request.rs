//! The CertificateRequest of cert-manager that the operator creates for a Device. Pure.
//!
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

/// The fields of a CertificateRequest that the operator uses.
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

    /// The issuer.
    pub issuer_ref: IssuerReference,

    /// Requested validity, in the format of Go. An issuer may grant less.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub duration: Option<String>,

    /// Requested key usages.
    #[serde(default)]
    pub usages: Vec<String>,
}

/// The status that the issuer writes.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Serialize)]
pub struct CertificateRequestStatus {
    /// `Ready`, `Approved`, `Denied`, `InvalidRequest`.
    #[serde(default)]
    pub conditions: Vec<CertificateRequestCondition>,

    /// The certificate and its chain, as PEM.
    #[serde(default)]
    pub certificate: Option<ByteString>,
}

/// A condition. Unlike a Condition of Kubernetes, only type and status are required.
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

/// The state of a CertificateRequest.
#[derive(Debug, Eq, PartialEq)]
pub enum RequestState<'a> {
    /// Not issued yet. With the message of the issuer, if there is one.
    Pending(Option<&'a str>),
    /// Issued: the certificate chain as PEM.
    Issued(&'a [u8]),
    /// Refused. With reason and message.
    Refused(Reason, &'a str),
}

/// The CertificateRequest for a Device (with this uid) and its signing request.
#[must_use]
pub fn desired(key: &DeviceKey, uid: &str, text: &str, issuer: &IssuerReference, signer: &Signer) -> CertificateRequest {
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

/// Whether a CertificateRequest has the desired request and issuer. The duration is not compared, because issuers set defaults.
#[must_use]
pub fn matches(found: &CertificateRequest, wanted: &CertificateRequest) -> bool {
    found.spec.request == wanted.spec.request && found.spec.issuer_ref == wanted.spec.issuer_ref
}

/// The state of a CertificateRequest.
#[must_use]
pub fn request_state(request: &CertificateRequest) -> RequestState<'_> {
    let Some(status) = &request.status else { return RequestState::Pending(None) };
    let of = |type_: &str| status.conditions.iter().find(|condition| condition.type_ == type_);
    let holds = |type_: &str| of(type_).filter(|condition| condition.status == "True");
    if let Some(denied) = holds("Denied") {
        return RequestState::Refused(Reason::CertificateDenied, &denied.message);
    }
    if let Some(invalid) = holds("InvalidRequest") {
        return RequestState::Refused(Reason::CertificateRefused, &invalid.message);
    }
    match (of("Ready"), &status.certificate) {
        (Some(ready), Some(certificate)) if ready.status == "True" => RequestState::Issued(&certificate.0),
        (Some(ready), _) if ["Failed", "Denied"].contains(&ready.reason.as_str()) => {
            RequestState::Refused(Reason::CertificateRefused, &ready.message)
        }
        (Some(ready), _) => RequestState::Pending(Some(&ready.message)),
        (None, _) => RequestState::Pending(None),
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
    fn conditions_determine_the_state_of_a_request() {
        let approved = condition("Approved", "True", "cert-manager.io");
        for (status, expected) in [
            (Value::Null, RequestState::Pending(None)),
            (json!({}), RequestState::Pending(None)),
            (json!({"conditions": [approved]}), RequestState::Pending(None)),
            (json!({"conditions": [approved, condition("Ready", "False", "Pending")]}), RequestState::Pending(Some("why"))),
            (json!({"conditions": [approved, condition("Ready", "True", "Issued")], "certificate": "cGVt"}), RequestState::Issued(b"pem")),
            (
                json!({"conditions": [approved, condition("Ready", "False", "Failed")]}),
                RequestState::Refused(Reason::CertificateRefused, "why"),
            ),
            (
                json!({"conditions": [condition("Denied", "True", "x"), condition("Ready", "False", "Denied")]}),
                RequestState::Refused(Reason::CertificateDenied, "why"),
            ),
            (json!({"conditions": [condition("Denied", "False", "x")]}), RequestState::Pending(None)),
            (json!({"conditions": [condition("InvalidRequest", "True", "x")]}), RequestState::Refused(Reason::CertificateRefused, "why")),
        ] {
            assert_eq!(request_state(&request(&status)), expected, "{status}");
        }
    }

    #[test]
    fn a_request_matches_by_signing_request_and_issuer() {
        let found = request(&Value::Null);
        let mut wanted = found.clone();
        assert!(matches(&found, &wanted));
        wanted.spec.duration = Some("1s".to_owned());
        assert!(matches(&found, &wanted), "as the issuer defaults it");
        wanted.spec.issuer_ref.kind = "ClusterIssuer".to_owned();
        assert!(!matches(&found, &wanted));
        wanted = found.clone();
        wanted.spec.request = ByteString(b"other".to_vec());
        assert!(!matches(&found, &wanted));
    }
}
