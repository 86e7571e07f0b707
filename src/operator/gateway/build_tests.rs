use k8s_openapi::ByteString;
use serde_json::json;

use super::*;
use crate::api::Gateway;
use crate::broker::credential::Password;
use crate::operator::gateway::tls::Issued;

fn built(valid: &Valid) -> Desired {
    let images = Images { fleetwright: "fleetwright:1".to_owned(), mosquitto: "mosquitto:1".to_owned(), pull_policy: None };
    build(valid, &images, "fleetwright-system")
}

fn mosquitto_configuration(valid: &Valid) -> String {
    crate::broker::configuration::render(&broker_configuration(valid))
}

/// As issued, with texts in place of certificates and keys.
fn internal() -> crate::operator::gateway::internal::Internal {
    let data = |part: &str| ["tls.crt", "tls.key", "ca.crt"].map(|key| (key.to_owned(), ByteString(format!("{part} {key}").into()))).into();
    crate::operator::gateway::internal::Internal {
        issued: Some(Issued { authority: data("authority"), certificate: data("certificate") }),
        authorities: Some(b"certificate ca.crt".to_vec()),
        awaiting: None,
    }
}

/// A Gateway as the API server returns it, with defaults.
fn valid(spec: &serde_json::Value) -> Valid {
    let object = json!({
        "apiVersion": "fleetwright.io/v1alpha1", "kind": "Gateway", "metadata": {"name": "plant-1", "namespace": "fleet"}, "spec": spec
    });
    let gateway: Gateway = serde_json::from_value(object).unwrap();
    let tls = gateway.spec.listeners.iter().filter_map(|listener| listener.tls_secret("plant-1"));
    Valid {
        namespace: "fleet".to_owned(),
        name: "plant-1".to_owned(),
        tls_secrets: tls.chain([name::internal_certificate("plant-1")]).collect::<std::collections::BTreeSet<_>>().into_iter().collect(),
        internal: internal(),
        spec: gateway.spec,
        memory_limit: Some(384 << 20),
        queued_bytes: 256 << 20,
        tls: crate::operator::gateway::tls::Certificates { host_names: vec!["mqtt.example.org".to_owned()], ..Default::default() },
        clients: crate::operator::gateway::client_authority::ClientTrust::default(),
        awaiting: None,
    }
}

fn full() -> Valid {
    valid(&json!({
        "listeners": [
            {"name": "mqtt", "port": 1883},
            {"name": "mqtts", "port": 8883, "tls": {"secretName": "plant-1-tls"}},
            {"name": "backup", "port": 8884, "tls": {"secretName": "plant-1-tls"}},
        ],
        "storage": {"size": "10Gi", "storageClassName": "fast"},
        "durability": "Disk",
        "limits": {"maxConnections": 500, "queuedBytesPerClient": "256Mi", "maxMessageBytes": 2048},
        "service": {"type": "LoadBalancer", "annotations": {"example.org/zone": "a"}},
    }))
}

/// Keeps two of the many similar shards.
fn short(desired: &Desired) -> Desired {
    let mut desired = desired.clone();
    let another = |text: &str| text.contains("-auth-") && !text.ends_with("-auth-0") && !text.ends_with("-auth-63");
    for rule in desired.role.rules.iter_mut().flatten() {
        rule.resource_names.iter_mut().for_each(|names| names.retain(|name| !another(name)));
    }
    for volume in desired.stateful_set.spec.template.spec.iter_mut().flat_map(|spec| spec.volumes.iter_mut().flatten()) {
        for sources in volume.projected.iter_mut().filter_map(|projected| projected.sources.as_mut()) {
            sources.retain(|source| !source.secret.as_ref().is_some_and(|secret| another(&secret.name)));
        }
    }
    desired
}

#[test]
fn the_objects_of_a_gateway_equal_their_snapshots() {
    let desired = short(&built(&full()));
    insta::assert_yaml_snapshot!("configuration", desired.configuration);
    insta::assert_yaml_snapshot!("report", desired.report);
    insta::assert_yaml_snapshot!("access", (desired.service_account, desired.role, desired.role_binding));
    insta::assert_yaml_snapshot!(
        "network",
        (desired.service, desired.internal_service, desired.network_policy, desired.agent_service, desired.disruption_budget)
    );
    insta::assert_yaml_snapshot!("stateful_set", desired.stateful_set);
}

#[test]
fn the_objects_of_a_gateway_are_deterministic() {
    assert!(built(&full()) == built(&full()));
}

#[test]
fn persistence_follows_durability() {
    let of = |durability: &str| mosquitto_configuration(&valid(&json!({"durability": durability})));
    assert!(of("Disk").contains("plugin_opt_sync full\nplugin_opt_flush_period 0\n"));
    assert!(of("Process").contains("plugin_opt_sync normal\nplugin_opt_flush_period 0\n"));
    // Mosquitto 2.1.2 refuses to run with both.
    let snapshot = of("Snapshot");
    assert!(snapshot.contains("persistence true\n") && !snapshot.contains("persist_sqlite"));
}

/// Mosquitto drops messages silently at its own limits, so the limits of the plugin must be lower.
#[test]
fn the_limits_of_the_plugin_are_below_those_of_mosquitto() {
    let number = |text: &str, key: &str| text.lines().find_map(|line| line.strip_prefix(key)?.trim().parse::<i64>().ok());
    for durability in ["Disk", "Process", "Snapshot"] {
        let text = mosquitto_configuration(&valid(&json!({"durability": durability, "limits": {"whenFull": "Slow"}})));
        assert!(text.contains("plugin_opt_when_full disconnect\n"), "{text}");
        assert_eq!(number(&text, "plugin_opt_trusted_port"), Some(name::INTERNAL_MQTT_PORT.into()));
        assert!(number(&text, "plugin_opt_memory_bytes").unwrap() < number(&text, "memory_limit").unwrap());
        let bounded = number(&text, "plugin_opt_session_bytes");
        // Without a limit of the plugin on queues, Mosquitto must have none either.
        assert_eq!(bounded.is_none(), durability == "Snapshot");
        let own = number(&text, "max_queued_bytes").unwrap();
        assert!(bounded.map_or(own == 0, |bounded| bounded == 256 << 20 && own > bounded), "{text}");
    }
    let mut most = full();
    most.queued_bytes = 1638 << 20;
    let own = number(&mosquitto_configuration(&most), "max_queued_bytes").unwrap();
    assert!(i32::try_from(own).is_ok(), "Mosquitto accepts no larger number");
}

#[test]
fn the_pod_restarts_only_for_settings_that_the_broker_reads_at_its_start() {
    let annotation = |valid: &Valid| {
        let template = built(valid).stateful_set.spec.template;
        template.metadata.and_then(|metadata| metadata.annotations).unwrap()
    };
    let reference = annotation(&full());
    let mut changed = full();
    changed.spec.limits.max_connections += 1;
    assert_ne!(annotation(&changed), reference);
    let mut same = full();
    same.spec.service.annotations.clear();
    same.awaiting = Some(crate::api::condition::Cause::new(crate::api::reason::Reason::SecretNotFound, ""));
    assert_eq!(annotation(&same), reference);
}

#[test]
fn a_gateway_without_a_memory_limit_has_no_limit_in_mosquitto() {
    let mut unlimited = full();
    unlimited.memory_limit = None;
    assert!(!mosquitto_configuration(&unlimited).contains("memory_limit"));
}

#[test]
fn names_of_objects_are_short_enough_for_the_longest_gateway_name() {
    // StatefulSets add a hash of 10 to the name and put it in a label of 63; Services have 63.
    let longest = Valid { name: "g".repeat(40), ..full() };
    let desired = built(&longest);
    assert!(desired.stateful_set.metadata.name.unwrap().len() + 11 <= 63);
    assert!(desired.internal_service.metadata.name.unwrap().len() <= 63);
}

#[test]
fn listeners_with_client_certificates_require_a_trusted_authority_and_the_plugin() {
    let spec = json!({
        "listeners": [
            {"name": "passwords", "port": 8883, "tls": {}},
            {"name": "certificates", "port": 8884, "tls": {"authentication": "Certificate"}},
            {"name": "both", "port": 8885, "tls": {"authentication": "CertificateAndPassword"}},
        ],
        "clientAuthority": {"secretName": "devices-ca"}
    });
    let mut gateway = valid(&spec);
    let without = mosquitto_configuration(&gateway);
    assert!(without.contains("listener 8883\n") && !without.contains("listener 8884\n") && !without.contains("listener 8885\n"));
    assert!(!without.contains("certificate.so"), "no authority is trusted yet, and the other listeners are configured");
    gateway.clients.trusted = Some("PEM".to_owned());
    let text = mosquitto_configuration(&gateway);
    let plugins = [
        "certificate.so",
        "plugin_opt_certificate_ports 8884\n",
        "plugin_opt_certificate_and_password_ports 8885\n",
        "previous_password.so",
    ];
    let places: Vec<usize> = plugins.iter().map(|part| text.find(part).expect(part)).collect();
    assert!(places.is_sorted(), "the plugin for all listeners comes last: {text}");
    let of = |port: &str| text.split("\n\n").find(|block| block.starts_with(&format!("listener {port}\n"))).unwrap().to_owned();
    assert!(!of("8883").contains("require_certificate"));
    for (port, named) in [("8884", false), ("8885", true)] {
        assert!(of(port).contains("require_certificate true\ncafile /etc/fleetwright/client-ca.crt"));
        assert_eq!(
            of(port).contains("use_username_as_clientid true"),
            named,
            "with a certificate alone the plugin sets the client identifier"
        );
    }
    let annotations = |gateway: &Valid| built(gateway).stateful_set.spec.template.metadata.unwrap().annotations;
    let before = annotations(&gateway);
    gateway.clients.trusted = Some("another".to_owned());
    assert_ne!(annotations(&gateway), before, "Mosquitto reads the trusted authorities only at its start");
}

#[test]
fn the_issued_key_is_kept_only_while_a_listener_names_no_secret() {
    let listeners = |tls: serde_json::Value| json!({"listeners": [{"name": "mqtts", "port": 8883, "tls": tls}]});
    let (link, authority) = (name::link_credentials("plant-1"), name::server_authority("plant-1"));
    let own = [name::internal_authority("plant-1"), name::internal_certificate("plant-1"), link.clone()];
    assert_eq!(secret_names(&valid(&listeners(json!({"secretName": "plant-1-tls"})))), own);
    let issued = secret_names(&valid(&listeners(json!({}))));
    assert!(issued.contains(&link) && issued.contains(&authority), "{issued:?}");
}

#[test]
fn the_key_of_the_internal_authority_stays_with_the_operator() {
    let mut gateway = full();
    let desired = built(&gateway);
    let names: Vec<&str> = desired.issued.iter().filter_map(|secret| secret.metadata.name.as_deref()).collect();
    assert_eq!(names, ["plant-1-internal-ca", "plant-1-internal-tls"], "in the order of the writes");
    for object in [json!(desired.stateful_set), json!(desired.role), json!(desired.configuration)] {
        let text = object.to_string();
        assert!(!text.contains("plant-1-internal-ca"), "{text}");
        assert!(text.contains("plant-1-internal-tls"), "{text}");
    }
    let link = link_credentials(&gateway, &Password::generate()).data.unwrap();
    assert_eq!(link["ca.crt"].0, b"certificate ca.crt");
    assert_eq!(link.len(), 2, "and the password, but no key");
    gateway.internal.issued = None;
    assert_eq!(secret_names(&gateway), secret_names(&full()), "what an unreadable authority issued is kept");
}

#[test]
fn only_the_container_of_the_agent_has_a_token() {
    let pod = built(&full()).stateful_set.spec.template.spec.unwrap();
    assert_eq!(pod.automount_service_account_token, Some(false));
    let volumes = pod.volumes.iter().flatten();
    let tokens = volumes.filter(|volume| json!(volume).to_string().contains("serviceAccountToken")).map(|volume| volume.name.as_str());
    let tokens: Vec<&str> = tokens.collect();
    assert_eq!(tokens, ["api-access"]);
    let mounts = |container: &k8s_openapi::api::core::v1::Container| {
        container.volume_mounts.iter().flatten().any(|mount| tokens.contains(&mount.name.as_str()))
    };
    assert!(mounts(&pod.init_containers.unwrap()[0]) && !pod.containers.iter().any(mounts));
}
