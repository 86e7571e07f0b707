use serde_json::json;

use super::*;
use crate::operator::pipeline::observe::Observed;
use crate::operator::pipeline::validate::tests::{observed, pipeline};
use crate::operator::pipeline::validate::validate;

const URI: &str = "postgresql://u:database-password@db/fleet";

fn images() -> Images {
    Images { fleetwright: "fleetwright:1".to_owned(), mosquitto: "mosquitto:1".to_owned(), pull_policy: None }
}

fn password() -> Password {
    Password::given(b"secret-of-the-workers").unwrap()
}

fn built(pipeline: &Pipeline, observed: &Observed, uri: &str) -> Workers {
    workers(pipeline, &validate(pipeline, observed).unwrap(), &password(), Some(&uri.parse().unwrap()), &images())
}

fn revision_of(workers: &Workers) -> String {
    let template = &workers.workers.spec.template;
    template.metadata.as_ref().unwrap().annotations.as_ref().unwrap()[REVISION_ANNOTATION].clone()
}

#[test]
fn the_objects_of_a_pipeline_equal_their_snapshots() {
    let pipeline = pipeline(json!({}));
    let built = built(&pipeline, &observed(), URI);
    insta::assert_yaml_snapshot!("stateful_set", built.workers);
    insta::assert_yaml_snapshot!("network_policy", built.network_policy);
    insta::assert_yaml_snapshot!("service", built.service);
    let configuration: IngestConfiguration = serde_json::from_str(&built.configuration.data.unwrap()[FILE]).unwrap();
    assert_eq!(configuration.gateways[1].host, "plant-2-internal.plant.svc");
    assert_eq!(configuration.table, "vibration");
}

#[test]
fn the_credentials_contain_gateways_and_topic_filters() {
    let pipeline = pipeline(json!({"paused": true}));
    let secret = credentials(&pipeline, &validate(&pipeline, &observed()).unwrap(), &password());
    assert_eq!(secret.annotations()[INGEST_GATEWAYS_ANNOTATION], "plant-1,plant-2");
    assert_eq!(secret.annotations()[INGEST_FILTER_ANNOTATION], "devices/+/telemetry");
    assert!(!secret.annotations().contains_key(INGEST_COMMANDS_ANNOTATION), "it may write nothing");
    assert_eq!(secret.labels()[ROLE_LABEL], ROLE_INGEST_CREDENTIALS);
    assert_eq!(secret.data.unwrap()[PASSWORD_KEY].0, b"secret-of-the-workers");
}

#[test]
fn workers_of_sparkplug_may_publish_rebirth_requests() {
    let spec = json!({"source": {"topic": "spBv1.0/plant/+/{node}/{device}"}, "decode": {"format": "SparkplugB"}});
    let pipeline = pipeline(spec);
    let mut secret = credentials(&pipeline, &validate(&pipeline, &observed()).unwrap(), &password());
    secret.metadata.owner_references = Some(vec![crate::operator::kubernetes::apply::owner_reference(&pipeline)]);
    let users = crate::operator::device::secret::read_workers(&secret).unwrap();
    let lines = ["topic read spBv1.0/plant/+/+/#", "topic write spBv1.0/plant/NCMD/+"];
    assert!(users["plant-1"].iter().all(|user| user.acls() == lines), "{users:?}");
}

#[test]
fn the_number_of_workers_is_limited_by_the_number_of_gateways() {
    let none = || Observed { gateways: BTreeMap::new(), ..observed() };
    for (spec, observed, expected) in [
        (json!({}), observed(), 1),
        (json!({"workers": {"replicas": 2}}), observed(), 2),
        (json!({"workers": {"replicas": 3}}), observed(), 2),
        (json!({"paused": true, "workers": {"replicas": 2}}), observed(), 0),
        (json!({}), none(), 0),
    ] {
        let pipeline = pipeline(spec);
        assert_eq!(built(&pipeline, &observed, URI).workers.spec.replicas, Some(expected));
    }
}

#[test]
fn a_shared_subscription_is_read_by_as_many_workers_as_there_are_sessions() {
    let broker = json!({"address": "mqtt:1883", "credentialsSecret": {"name": "login"}, "sharedSubscription": {"sessions": 3}});
    let externals = [("plant-2".to_owned(), serde_json::from_value(broker).unwrap())].into();
    let observed = Observed { externals, usable_logins: ["plant-2".to_owned()].into(), ..observed() };
    let sparkplug = json!({"source": {"topic": "spBv1.0/plant/+/{node}/{device}"}, "decode": {"format": "SparkplugB"}});
    for (spec, sessions, shared) in
        [(json!({}), vec!["plant-1", "plant-2", "plant-2/1", "plant-2/2"], Some(3)), (sparkplug, vec!["plant-1", "plant-2"], None)]
    {
        let mut pipeline = pipeline(spec);
        pipeline.spec.workers.replicas = 9;
        assert_eq!(validate(&pipeline, &observed).unwrap().sessions, sessions);
        let built = built(&pipeline, &observed, URI);
        assert_eq!(built.workers.spec.replicas, i32::try_from(sessions.len()).ok());
        let configuration: IngestConfiguration = serde_json::from_str(&built.configuration.data.unwrap()[FILE]).unwrap();
        let found: Vec<Option<i32>> =
            configuration.gateways.into_iter().map(|gateway| gateway.external.and_then(|external| external.shared_by)).collect();
        assert_eq!(found, [None, shared]);
    }
}

#[test]
fn workers_restart_only_for_settings_that_they_read_at_their_start() {
    let plain = revision_of(&built(&pipeline(json!({})), &observed(), URI));
    assert_eq!(plain, revision_of(&built(&pipeline(json!({"deadLetters": {"retention": "7d"}})), &observed(), URI)));
    assert_ne!(plain, revision_of(&built(&pipeline(json!({"sink": {"timescale": {"chunkInterval": "2d"}}})), &observed(), URI)));
    assert_eq!(plain, revision_of(&built(&pipeline(json!({"paused": true})), &observed(), URI)));
    assert_eq!(plain, revision_of(&built(&pipeline(json!({"workers": {"replicas": 2}})), &observed(), URI)));
    let mut fewer = observed();
    fewer.gateways.remove("plant-2");
    assert_ne!(plain, revision_of(&built(&pipeline(json!({})), &fewer, URI)));
    assert_ne!(plain, revision_of(&built(&pipeline(json!({})), &observed(), "postgresql://u:other@db/fleet")));
    assert_ne!(plain, revision_of(&built(&pipeline(json!({"decode": {"fields": [{"name": "a", "type": "Text"}]}})), &observed(), URI)));
}

#[test]
fn the_authorities_of_the_database_are_mounted_if_the_secret_has_them() {
    let (pipeline, observed) = (pipeline(json!({})), observed());
    let valid = validate(&pipeline, &observed).unwrap();
    let pem = rcgen::CertificateParams::default().self_signed(&rcgen::KeyPair::generate().unwrap()).unwrap().pem();
    let uri: ConnectionUri = URI.parse().unwrap();
    let built = workers(&pipeline, &valid, &password(), Some(&uri.verified_by(pem.as_bytes()).unwrap()), &images());
    let pod = built.workers.spec.template.spec.as_ref().unwrap();
    let items = json!([{"key": "uri", "path": "uri"}, {"key": "ca.crt", "path": "ca.crt"}]);
    assert_eq!(json!(pod.volumes.as_ref().unwrap()[2].secret.as_ref().unwrap().items), items);
    assert_ne!(revision_of(&built), revision_of(&self::built(&pipeline, &observed, URI)), "workers read it only at their start");
}

#[test]
fn no_object_except_the_secret_contains_a_password() {
    let built = built(&pipeline(json!({})), &observed(), URI);
    let text = json!([built.workers, built.configuration, built.network_policy, built.service]).to_string();
    assert!(!text.contains("database-password") && !text.contains("secret-of-the-workers"));
}

#[test]
fn an_external_broker_is_read_with_the_login_of_its_secret() {
    let pipeline = pipeline(json!({}));
    let broker = json!({
        "address": "[2001:db8::1]:8883", "tls": {"caSecretName": "ca"},
        "credentialsSecret": {"name": "login", "usernameKey": "user", "passwordKey": "token"},
    });
    let externals = [("plant-2".to_owned(), serde_json::from_value(broker).unwrap())].into();
    let observed = Observed { externals, usable_logins: ["plant-2".to_owned()].into(), ..observed() };
    let valid = validate(&pipeline, &observed).unwrap();
    let built = workers(&pipeline, &valid, &password(), Some(&URI.parse().unwrap()), &images());
    let configuration: IngestConfiguration = serde_json::from_str(&built.configuration.data.unwrap()[FILE]).unwrap();
    let expected = json!({
        "name": "plant-2", "host": "2001:db8::1", "port": 8883, "tls": true,
        "external": {"clientId": "fwi64c133a8ba4b907d", "authorities": true},
    });
    assert_eq!(json!(configuration.gateways[1]), expected);
    let pod = built.workers.spec.template.spec.unwrap();
    let file =
        |secret: &str, key: &str, path: &str| json!({"secret": {"name": secret, "optional": true, "items": [{"key": key, "path": path}]}});
    let sources = json!([
        file("plant-1-internal-tls", "ca.crt", "plant-1/ca.crt"),
        file("login", "user", "plant-2/username"),
        file("login", "token", "plant-2/password"),
        file("ca", "ca.crt", "plant-2/ca.crt"),
    ]);
    assert_eq!(json!(pod.volumes.unwrap()[3]), json!({"name": "gateways", "projected": {"defaultMode": 0o440, "sources": sources}}));
    assert!(pod.containers[0].args.as_ref().unwrap().ends_with(&["--gateways-folder".to_owned(), broker_files::FOLDER.to_owned()]));
    assert_eq!(credentials(&pipeline, &valid, &password()).annotations()[INGEST_GATEWAYS_ANNOTATION], "plant-1");

    // A Secret that does not allow its use does not reach a worker, which would send it to the address.
    let refused = Observed { usable_logins: [].into(), ..observed };
    let built = workers(&pipeline, &validate(&pipeline, &refused).unwrap(), &password(), Some(&URI.parse().unwrap()), &images());
    assert!(!json!(built.workers).to_string().contains("\"login\""));
}
