use std::collections::BTreeMap;

use serde_json::{Value, json};

use super::*;
use crate::api::condition::{BROKER_FULL, READY, RECONCILING, STALLED};
use crate::api::gateway::{GatewayDevices, WhenFull};
use crate::configuration::agent::{AgentReport, Fullness};
use crate::operator::gateway::client_authority::ClientTrust;
use crate::operator::gateway::internal::Internal;
use crate::operator::gateway::tls::Certificates;

fn gateway(status: Option<&GatewayStatus>) -> Gateway {
    let mut object = json!({
        "apiVersion": "fleetwright.io/v1alpha1", "kind": "Gateway", "spec": {},
        "metadata": {"name": "plant-1", "namespace": "fleet", "generation": 3}
    });
    if let Some(status) = status {
        object["status"] = serde_json::to_value(status).unwrap();
    }
    serde_json::from_value(object).unwrap()
}

fn observed(report: Option<bool>) -> Observed {
    Observed {
        gateway: gateway(None),
        tls: BTreeMap::new(),
        authority: None,
        internal_authority: None,
        internal_certificate: None,
        client_authority: None,
        trusted_before: None,
        link_password: None,
        report: report.map(|messages_dropped| AgentReport { messages_dropped, ..AgentReport::default() }),
        devices: Some(GatewayDevices { declared: 3, live: 2, connected: Some(1) }),
        clients: None,
    }
}

fn valid(awaiting: Option<Cause>) -> Valid {
    Valid {
        namespace: "fleet".to_owned(),
        name: "plant-1".to_owned(),
        spec: gateway(None).spec,
        memory_limit: None,
        queued_bytes: 1,
        tls_secrets: Vec::new(),
        internal: Internal::default(),
        tls: Certificates { awaiting: awaiting.clone(), ..Certificates::default() },
        clients: ClientTrust::default(),
        awaiting,
    }
}

fn stateful_set(status: &Value) -> StatefulSet {
    serde_json::from_value(json!({
        "metadata": {"generation": 2}, "spec": {"selector": {}, "template": {}, "serviceName": ""}, "status": status
    }))
    .unwrap()
}

fn ready() -> StatefulSet {
    stateful_set(&json!({"observedGeneration": 2, "replicas": 1, "readyReplicas": 1, "currentRevision": "a", "updateRevision": "a"}))
}

/// Each condition's type with its status and reason.
fn summary(status: &GatewayStatus) -> BTreeMap<&str, (&str, &str)> {
    status.conditions.iter().map(|c| (c.type_.as_str(), (c.status.as_str(), c.reason.as_str()))).collect()
}

#[test]
fn a_broker_is_available_when_the_current_pod_is_ready_and_the_agent_has_logged_in() {
    let starting = json!({"observedGeneration": 2, "replicas": 1, "currentRevision": "a", "updateRevision": "a"});
    let stale = json!({"observedGeneration": 1, "replicas": 1, "readyReplicas": 1, "currentRevision": "a", "updateRevision": "a"});
    let rolling = json!({"observedGeneration": 2, "replicas": 1, "readyReplicas": 1, "currentRevision": "a", "updateRevision": "b"});
    let ready = &json!({"observedGeneration": 2, "replicas": 1, "readyReplicas": 1, "currentRevision": "a", "updateRevision": "a"});
    for (live, report, reason) in [
        (&Value::Null, None, "BrokerNotReady"),
        (&stale, Some(false), "BrokerUpdating"),
        (&rolling, Some(false), "BrokerUpdating"),
        (&starting, None, "BrokerNotReady"),
        (&starting, Some(false), "BrokerNotReady"),
        (ready, None, "CredentialsNotProven"),
        (ready, Some(false), "BrokerAvailable"),
    ] {
        let status = status(&observed(report), &Outcome::Applied(&valid(None), &stateful_set(live)));
        let (summary, available) = (summary(&status), reason == "BrokerAvailable");
        assert_eq!(summary[BROKER_AVAILABLE], (if available { "True" } else { "False" }, reason));
        assert_eq!(summary[READY].0, if available { "True" } else { "False" });
        assert_eq!(summary.contains_key(RECONCILING), !available);
        assert!(!summary.contains_key(STALLED));
        assert_eq!(summary[ACCEPTED].0, "True");
        assert_eq!(status.observed_generation, 3);
        assert_eq!(status.address.as_deref(), Some("plant-1.fleet.svc"));
        assert_eq!(status.devices, Some(GatewayDevices { declared: 3, live: 2, connected: Some(1) }));
    }
}

#[test]
fn a_missing_secret_is_reconciling_and_does_not_stop_the_broker() {
    let awaiting = valid(Some(Cause::new(Reason::SecretNotFound, "Secret plant-1-tls does not exist")));
    let status = status(&observed(Some(false)), &Outcome::Applied(&awaiting, &ready()));
    let summary = summary(&status);
    assert_eq!(summary[ACCEPTED], ("False", "SecretNotFound"));
    assert_eq!(summary[RECONCILING], ("True", "SecretNotFound"));
    assert_eq!(summary[BROKER_AVAILABLE].0, "True", "a running broker continues");
}

#[test]
fn an_invalid_spec_is_stalled() {
    let cause = Cause::new(Reason::InvalidQuantity, "x");
    let status = status(&observed(None), &Outcome::Rejected(&cause));
    let summary = summary(&status);
    assert_eq!((summary[ACCEPTED], summary[STALLED]), (("False", "InvalidQuantity"), ("True", "InvalidQuantity")));
    assert_eq!(summary[BROKER_AVAILABLE].0, "Unknown");
}

#[test]
fn a_refused_write_is_stalled_only_if_the_spec_is_invalid() {
    let refused = |code: u16, reason: &str| {
        let answer = json!({"kind": "Status", "apiVersion": "v1", "status": "Failure", "message": "no", "reason": reason, "code": code});
        WriteError::Call {
            verb: "apply",
            kind: "Service".to_owned(),
            name: "plant-1".to_owned(),
            source: Box::new(kube::Error::Api(Box::new(serde_json::from_value(answer).unwrap()))),
        }
    };
    let conflict = WriteError::NameConflict { kind: "Service".to_owned(), name: "plant-1".to_owned() };
    for (error, condition, reason) in [
        (refused(422, "Invalid"), STALLED, "ApplyFailed"),
        (refused(500, "InternalError"), RECONCILING, "ApplyFailed"),
        (conflict, RECONCILING, "NameConflict"),
    ] {
        let status = status(&observed(None), &Outcome::NotApplied(&valid(None), &error));
        assert_eq!(summary(&status)[condition], ("True", reason));
        assert_eq!(summary(&status)[ACCEPTED].0, "True");
    }
}

#[test]
fn dropped_messages_are_reported_and_the_gateway_stays_ready() {
    let status = status(&observed(Some(true)), &Outcome::Applied(&valid(None), &ready()));
    let summary = summary(&status);
    assert_eq!((summary[MESSAGES_DROPPED].0, summary[READY].0), ("True", "True"));
}

/// The broker becomes full and then accepts messages again. The Gateway stays ready.
#[test]
fn a_full_broker_is_reported_and_its_end_as_well() {
    let mut observed = observed(Some(false));
    let reconcile = |observed: &mut Observed, fullness: Fullness| {
        observed.report = Some(AgentReport { fullness, ..AgentReport::default() });
        let status = status(observed, &Outcome::Applied(&valid(None), &ready()));
        let when_full = observed.gateway.spec.limits.when_full;
        observed.gateway = gateway(Some(&status));
        observed.gateway.spec.limits.when_full = when_full;
        assert_eq!(summary(&status)[READY].0, "True");
        let found = status.conditions.into_iter().find(|condition| condition.type_ == BROKER_FULL);
        found.map(|condition| (condition.status, condition.reason, condition.message))
    };
    assert_eq!(reconcile(&mut observed, Fullness::Nothing), None);
    let queue = Fullness::Queue { session: "_ingest_vibration".to_owned() };
    let (status, reason, message) = reconcile(&mut observed, queue.clone()).unwrap();
    assert_eq!((status.as_str(), reason.as_str()), ("True", "QueueFull"));
    assert!(message.contains("Pipeline vibration") && message.contains("256Mi") && message.contains("0x97"), "{message}");
    observed.gateway.spec.limits.when_full = WhenFull::Slow;
    assert!(!reconcile(&mut observed, queue).unwrap().2.contains("0x97"));
    for (fullness, expected) in [
        (Fullness::Memory, ("True", "MemoryFull")),
        (Fullness::Disk, ("True", "DiskFull")),
        (Fullness::Clients { clients: "press-1: retained".to_owned() }, ("False", "ClientsLimited")),
        (Fullness::Nothing, ("False", "AcceptingMessages")),
        (Fullness::Nothing, ("False", "AcceptingMessages")),
    ] {
        let (status, reason, _) = reconcile(&mut observed, fullness).unwrap();
        assert_eq!((status.as_str(), reason.as_str()), expected);
    }
}

#[test]
fn the_status_does_not_change_while_the_observed_state_is_the_same() {
    let mut observed = observed(Some(true));
    let first = status(&observed, &Outcome::Applied(&valid(None), &ready()));
    observed.gateway = gateway(Some(&first));
    assert_eq!(status(&observed, &Outcome::Applied(&valid(None), &ready())), first);
}

#[test]
fn a_missing_or_additional_presented_certificate_is_reported() {
    let key = rcgen::KeyPair::generate().unwrap();
    let chain = rcgen::CertificateParams::default().self_signed(&key).unwrap().pem();
    let certificate = crate::certificate::server::ServerCertificate::parse(chain.as_bytes(), key.serialize_pem().as_bytes()).unwrap();
    let other = "00".repeat(32);
    let mut valid = valid(None);
    valid.tls.usable.insert("mqtt-tls".to_owned(), certificate.clone());
    for (shown, former, expected) in [
        (None, None, ("False", "CertificateNotProven")),
        (Some(&other), None, ("False", "CertificateNotProven")),
        (Some(&certificate.fingerprint), None, ("True", "CertificateProven")),
        (Some(&certificate.fingerprint), Some("2030-01-01T00:00:00Z"), ("False", "FormerCertificatePresented")),
    ] {
        let mut observed = observed(Some(false));
        observed.tls.insert("mqtt-tls".to_owned(), None);
        if let (Some(fingerprint), Some(report)) = (shown, &mut observed.report) {
            let presented = json!({"fingerprint": fingerprint, "notAfter": "2040-01-01T00:00:00Z", "formerNotAfter": former});
            report.certificates.insert("mqtt-tls".to_owned(), serde_json::from_value(presented).unwrap());
        }
        let status = status(&observed, &Outcome::Applied(&valid, &ready()));
        assert_eq!((summary(&status)[CERTIFICATE_VALID], summary(&status)[READY].0), (expected, expected.0));
        assert_eq!(status.certificate.map(|certificate| certificate.sha256).as_ref(), shown);
    }
}

#[test]
fn the_client_authority_has_a_separate_condition() {
    let mut observed = observed(Some(false));
    let spec = json!({"secretName": "devices-ca"});
    observed.gateway.spec.client_authority = Some(serde_json::from_value(spec).unwrap());
    let of = |awaiting: Option<Cause>, expiring: Option<Cause>| {
        let mut valid = valid(None);
        valid.awaiting.clone_from(&awaiting);
        valid.clients = ClientTrust { awaiting, expiring, ..ClientTrust::default() };
        status(&observed, &Outcome::Applied(&valid, &ready()))
    };
    let missing = of(Some(Cause::new(Reason::SecretNotFound, "x")), None);
    assert_eq!(summary(&missing)[CLIENT_AUTHORITY_VALID], ("False", "SecretNotFound"));
    assert_eq!(summary(&missing)[RECONCILING], ("True", "SecretNotFound"));
    assert_eq!(summary(&missing)[BROKER_AVAILABLE].0, "True", "devices with a certificate can connect");
    let expiring = of(None, Some(Cause::new(Reason::CertificateExpiresSoon, "x")));
    assert_eq!(summary(&expiring)[CLIENT_AUTHORITY_VALID], ("True", "CertificateExpiresSoon"));
    assert_eq!(summary(&expiring)[READY].0, "True");
    assert_eq!(summary(&of(None, None))[CLIENT_AUTHORITY_VALID], ("True", "ClientAuthorityUsable"));
}
