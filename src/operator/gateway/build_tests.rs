use serde_json::json;

use super::*;
use crate::api::Gateway;

fn built(valid: &Valid) -> Desired {
    let images = Images { fleetwright: "fleetwright:1".to_owned(), mosquitto: "mosquitto:1".to_owned(), pull_policy: None };
    build(valid, &images, "fleetwright-system")
}

/// A Gateway as the API server hands it out, defaults filled in.
fn valid(spec: &serde_json::Value) -> Valid {
    let object = json!({
        "apiVersion": "fleetwright.io/v1alpha1", "kind": "Gateway", "metadata": {"name": "plant-1", "namespace": "fleet"}, "spec": spec
    });
    let gateway: Gateway = serde_json::from_value(object).unwrap();
    let tls = gateway.spec.listeners.iter().filter_map(|listener| listener.tls_secret("plant-1"));
    Valid {
        namespace: "fleet".to_owned(),
        name: "plant-1".to_owned(),
        tls_secrets: tls.collect::<std::collections::BTreeSet<_>>().into_iter().collect(),
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

/// The shards are many and alike: two stand for all.
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
fn everything_of_a_gateway() {
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
fn building_again_gives_the_same() {
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

/// Mosquitto drops in silence at its own bounds: it must not come to them before the plugin steps in.
#[test]
fn the_plugin_steps_in_before_mosquitto_drops() {
    let number = |text: &str, key: &str| text.lines().find_map(|line| line.strip_prefix(key)?.trim().parse::<i64>().ok());
    for durability in ["Disk", "Process", "Snapshot"] {
        let text = mosquitto_configuration(&valid(&json!({"durability": durability, "limits": {"whenFull": "Slow"}})));
        assert!(text.contains("plugin_opt_when_full disconnect\n"), "{text}");
        assert_eq!(number(&text, "plugin_opt_trusted_port"), Some(name::INTERNAL_MQTT_PORT.into()));
        assert!(number(&text, "plugin_opt_memory_bytes").unwrap() < number(&text, "memory_limit").unwrap());
        let bounded = number(&text, "plugin_opt_session_bytes");
        // Without a bound of each, Mosquitto must have none either.
        assert_eq!(bounded.is_none(), durability == "Snapshot");
        let own = number(&text, "max_queued_bytes").unwrap();
        assert!(bounded.map_or(own == 0, |bounded| bounded == 256 << 20 && own > bounded), "{text}");
    }
    let mut most = full();
    most.queued_bytes = 1638 << 20;
    let own = number(&mosquitto_configuration(&most), "max_queued_bytes").unwrap();
    assert!(i32::try_from(own).is_ok(), "Mosquitto takes no larger number");
}

#[test]
fn the_pod_rolls_for_what_the_broker_reads_at_its_start_only() {
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
fn no_limit_of_memory_gives_the_broker_none() {
    let mut unlimited = full();
    unlimited.memory_limit = None;
    assert!(!mosquitto_configuration(&unlimited).contains("memory_limit"));
}

#[test]
fn names_fit_for_the_longest_gateway() {
    // StatefulSets add a hash of 10 to the name and put it in a label of 63; Services have 63.
    let longest = Valid { name: "g".repeat(40), ..full() };
    let desired = built(&longest);
    assert!(desired.stateful_set.metadata.name.unwrap().len() + 11 <= 63);
    assert!(desired.internal_service.metadata.name.unwrap().len() <= 63);
}

#[test]
fn listeners_for_certificates() {
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
    assert!(!without.contains("certificate.so"), "nobody is trusted yet, and the other listeners are served");
    gateway.clients.trusted = Some("PEM".to_owned());
    let text = mosquitto_configuration(&gateway);
    let plugins = [
        "certificate.so",
        "plugin_opt_certificate_ports 8884\n",
        "plugin_opt_certificate_and_password_ports 8885\n",
        "previous_password.so",
    ];
    let places: Vec<usize> = plugins.iter().map(|part| text.find(part).expect(part)).collect();
    assert!(places.is_sorted(), "who lets in on every listener is asked last: {text}");
    let of = |port: &str| text.split("\n\n").find(|block| block.starts_with(&format!("listener {port}\n"))).unwrap().to_owned();
    assert!(!of("8883").contains("require_certificate"));
    for (port, named) in [("8884", false), ("8885", true)] {
        assert!(of(port).contains("require_certificate true\ncafile /etc/fleetwright/client-ca.crt"));
        assert_eq!(of(port).contains("use_username_as_clientid true"), named, "by certificate the plugin names the client");
    }
    let annotations = |gateway: &Valid| built(gateway).stateful_set.spec.template.metadata.unwrap().annotations;
    let before = annotations(&gateway);
    gateway.clients.trusted = Some("another".to_owned());
    assert_ne!(annotations(&gateway), before, "Mosquitto reads whom to trust only at its start");
}
