use k8s_openapi::ByteString;
use serde_json::{Value, json};

use super::*;
use crate::api::condition::{READY, RECONCILING};

fn gateway(external: &Value, status: Option<&GatewayStatus>) -> Gateway {
    let mut object = json!({
        "apiVersion": "fleetwright.io/v1alpha1", "kind": "Gateway", "spec": {"external": external},
        "metadata": {"name": "plant-1", "namespace": "fleet", "generation": 3, "uid": "u"}
    });
    if let Some(status) = status {
        object["status"] = serde_json::to_value(status).unwrap();
    }
    serde_json::from_value(object).unwrap()
}

fn external(changes: &Value) -> ExternalBroker {
    let mut object = json!({"address": "mqtt.example.org:8883", "credentialsSecret": {"name": "login"}});
    object.as_object_mut().unwrap().extend(changes.as_object().unwrap().clone());
    serde_json::from_value(object).unwrap()
}

fn secret(data: &[(&str, &[u8])]) -> Secret {
    let data = data.iter().map(|(key, value)| ((*key).to_owned(), ByteString(value.to_vec()))).collect();
    Secret { data: Some(data), type_: Some("kubernetes.io/basic-auth".to_owned()), ..Secret::default() }
}

/// A Secret that does not allow its use.
fn unlabelled(secret: &Secret) -> Secret {
    Secret { type_: Some("Opaque".to_owned()), ..secret.clone() }
}

fn observed(gateway: &Gateway, login: Result<Login, Cause>, outcome: Option<Result<(), Cause>>) -> Observed<'_> {
    Observed { gateway, devices: Some(GatewayDevices { declared: 3, live: 0, connected: Some(1) }), login, outcome }
}

fn found(changes: &Value, credentials: Option<&Secret>, authorities: Option<&Secret>) -> Result<Login, Cause> {
    login(&external(changes), "c".to_owned(), credentials, authorities)
}

#[test]
fn each_invalid_address_or_secret_has_its_reason() {
    let good = secret(&[("username", b"fleet"), ("password", b"open sesame\n")]);
    let other_keys = json!({"credentialsSecret": {"name": "login", "usernameKey": "user", "passwordKey": "token"}});
    let authority = json!({"tls": {"caSecretName": "ca"}});
    for (changes, credentials, authorities, reason) in [
        (json!({"address": "mqtt.example.org:99999"}), Some(good.clone()), None, "InvalidAddress"),
        (json!({}), None, None, "SecretNotFound"),
        (json!({}), Some(secret(&[("username", b"fleet")])), None, "SecretKeyNotFound"),
        (json!({}), Some(secret(&[("password", b"x")])), None, "SecretKeyNotFound"),
        (other_keys.clone(), Some(good.clone()), None, "SecretKeyNotFound"),
        (json!({}), Some(secret(&[("username", b"\xff"), ("password", b"x")])), None, "InvalidSecret"),
        (json!({}), Some(secret(&[("username", b"fleet"), ("password", b"\n")])), None, "InvalidSecret"),
        (json!({}), Some(secret(&[("username", b"fleet\nroot"), ("password", b"x")])), None, "InvalidSecret"),
        (json!({}), Some(secret(&[("username", b"fleet"), ("password", b"open\r\nsesame\n")])), None, "InvalidSecret"),
        (json!({}), Some(secret(&[("username", b"fleet"), ("password", b"\xff\x00sesame")])), None, "InvalidSecret"),
        (json!({}), Some(unlabelled(&good)), None, "SecretNotAllowed"),
        (other_keys.clone(), Some(unlabelled(&secret(&[("uri", b"sesame")]))), None, "SecretNotAllowed"),
        (json!({}), Some(secret(&[("username", b"fleet"), ("password", &vec![b'x'; 65_536])])), None, "InvalidSecret"),
        (authority.clone(), Some(good.clone()), None, "SecretNotFound"),
        (authority.clone(), Some(good.clone()), Some(secret(&[("tls.crt", b"x")])), "SecretKeyNotFound"),
        (
            authority.clone(),
            Some(good.clone()),
            Some(secret(&[("ca.crt", b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n")])),
            "InvalidSecret",
        ),
    ] {
        let cause = found(&changes, credentials.as_ref(), authorities.as_ref()).unwrap_err();
        assert_eq!(cause.reason.as_str(), reason, "{changes}: {}", cause.message);
        assert!(!cause.message.contains("sesame") && !cause.message.contains("root"), "{}", cause.message);
    }
    let login = found(&json!({}), Some(&good), None).unwrap();
    assert_eq!((&*login.username, &*login.password, login.tls.is_some()), ("fleet", &b"open sesame"[..], false), "without the line break");
    let tokens = secret(&[("user", b"fleet"), ("token", b"ey.x")]);
    assert_eq!(&*found(&other_keys, Some(&tokens), None).unwrap().password, b"ey.x");
    assert!(found(&json!({"tls": {}}), Some(&good), None).unwrap().tls.unwrap().authorities.is_none(), "the public authorities");
    assert!(!format!("{login:?}").contains("sesame") && !format!("{login:?}").contains("\"fleet"));
}

#[test]
fn the_status_reports_the_result_of_the_login() {
    let credentials = secret(&[("username", b"postgresql://u:sesame@db"), ("password", b"x")]);
    let login = || found(&json!({}), Some(&credentials), None);
    let fresh = gateway(&json!(external(&json!({}))), None);
    let refused = || Cause::new(Reason::LoginRefused, "no");
    let proven = status(&observed(&fresh, login(), Some(Ok(()))));
    let restarted = gateway(&json!(external(&json!({}))), Some(&proven));
    let mut changed = restarted.clone();
    changed.metadata.generation = Some(4);
    for (name, gateway, login, outcome, available, ready) in [
        ("before the first answer", &fresh, login(), None, ("Unknown", "AwaitingBroker"), ("False", "AwaitingBroker")),
        ("proven", &fresh, login(), Some(Ok(())), ("True", "BrokerAvailable"), ("True", "Ready")),
        ("refused", &fresh, login(), Some(Err(refused())), ("False", "LoginRefused"), ("False", "LoginRefused")),
        ("refused later", &restarted, login(), Some(Err(refused())), ("False", "LoginRefused"), ("False", "LoginRefused")),
        ("after a restart", &restarted, login(), None, ("True", "BrokerAvailable"), ("True", "Ready")),
        ("after a change", &changed, login(), None, ("Unknown", "AwaitingBroker"), ("False", "AwaitingBroker")),
        (
            "without a Secret",
            &restarted,
            Err(Cause::new(Reason::SecretNotFound, "")),
            None,
            ("Unknown", "SecretNotFound"),
            ("False", "SecretNotFound"),
        ),
    ] {
        let status = status(&observed(gateway, login, outcome));
        let of = |type_: &str| status.conditions.iter().find(|c| c.type_ == type_).map(|c| (c.status.as_str(), c.reason.as_str()));
        assert_eq!((of(BROKER_AVAILABLE), of(READY)), (Some(available), Some(ready)), "{name}");
        assert_eq!(of(RECONCILING).is_some(), ready.0 == "False", "{name}");
        assert_eq!(status.address.as_deref(), Some("mqtt.example.org:8883"));
        assert!(!serde_json::to_string(&status).unwrap().contains("sesame"), "{name}: the status shows a value of the Secret");
    }
    assert_eq!(status(&observed(&restarted, login(), None)), proven, "a restart of the operator writes nothing");
}
