//! An external broker: a Mosquitto with its own passwords. Its devices belong to the fleet, and login failures are reported.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use fleetwright_e2e::client::{Listener, Session, mosquitto_pub};
use fleetwright_e2e::cluster::SYSTEM_NAMESPACE;
use fleetwright_e2e::manifest::{device, gateway, pipeline, secret, with};
use fleetwright_e2e::wait::{seconds, until};
use fleetwright_e2e::{Fleet, run};
use k8s_openapi::api::apps::v1::{Deployment, StatefulSet};
use kube::Api;
use kube::api::ListParams;
use serde_json::{Value, json};

/// Maximum time until a device receives a message, or until its presence is in the status.
const SHOWS_WITHIN: Duration = seconds(30);

/// The passwords of the external broker in the format of `mosquitto_passwd`: `fleet` has "open sesame", `press-1` "of the press".
const PASSWORDS: &str = include_str!("external.passwords");

const CONFIGURATION: &str = "listener 1883\nallow_anonymous false\npassword_file /run/foreign/passwords\npersistence false\nmax_queued_messages 0\nsys_interval 1\n";

/// Mosquitto refuses a password file that is a symbolic link, as all files of a ConfigMap are.
const START: &str = "umask 077 && cp /etc/foreign/passwords /run/foreign/ && exec /usr/sbin/mosquitto -c /etc/foreign/mosquitto.conf";

const PRESS: (&str, &str) = ("press-1", "of the press");

const CONNECTION: &str = "devices/press-1/connection";

#[test]
fn an_external_broker_is_part_of_the_fleet() {
    run("external", async |fleet| {
        let database = fleet.database().await?;
        let address = foreign(&fleet).await?;
        let press = with(device("press-1", "far"), "/spec/desired", json!({"samplingSeconds": 5}));
        fleet.apply_all([external(&address), press]).await?;
        fleet.condition("Gateway", "far", "Accepted", "False", "SecretNotFound").await?;
        fleet.apply(secret("login", &json!({"username": "fleet", "password": "wrong"}))).await?;
        let refused = fleet.condition("Gateway", "far", "BrokerAvailable", "False", "LoginRefused").await?;
        ensure!(!refused.message.contains("wrong"), "{}", refused.message);
        fleet.condition("Device", "press-1", "Ready", "False", "AwaitingBroker").await?;
        fleet.apply(secret("login", &json!({"username": "fleet", "password": "open sesame"}))).await?;
        fleet.all_ready(&["Gateway/far", "Device/press-1"]).await?;
        fleet.condition("Device", "press-1", "CredentialsLive", "Unknown", "ManagedElsewhere").await?;
        made_nothing(&fleet).await?;

        // The device receives its desired state, and its report is in the status.
        let listener = Listener::plain(address.trim_end_matches(":1883"));
        let mut session = Session::connect(&listener, PRESS.0, PRESS.1).await?;
        session.subscribe("devices/press-1/desired").await?;
        let message = session.message(SHOWS_WITHIN).await?;
        ensure!(message.contains(r#""samplingSeconds":5"#), "received {message}");
        session.publish("devices/press-1/reported", r#"{"samplingSeconds":5}"#).await?;
        fleet.condition("Device", "press-1", "Synced", "True", "Synced").await?;
        for (said, shown) in [("online", "Online"), ("offline", "Offline")] {
            session.publish(CONNECTION, said).await?;
            connected(&fleet, shown).await?;
        }

        // Its messages become rows.
        fleet.apply(pipeline("readings")).await?;
        fleet.ready("Pipeline", "readings").await?;
        let payload = json!({"ts": 1_777_863_721_500_u64, "value": 7}).to_string();
        mosquitto_pub(&listener, PRESS.0, PRESS.1, "devices/press-1/telemetry", &payload).await?;
        until(SHOWS_WITHIN, "the reading is in the table", async || {
            let rows = database.number("SELECT count(*) FROM reading WHERE value = 7").await?;
            ensure!(rows == 1, "there are {rows}");
            Ok(())
        })
        .await?;

        // Without a Pipeline the broker queues nothing for workers: only sessions of connected clients remain.
        fleet.delete("Pipeline", "readings").await?;
        fleet.gone("Pipeline", "readings", SHOWS_WITHIN).await?;
        until(SHOWS_WITHIN, "the broker keeps no session for nobody", async || {
            let mut reader = Session::connect(&listener, PRESS.0, PRESS.1).await?;
            reader.subscribe("$SYS/broker/clients/disconnected").await?;
            let found = reader.message(SHOWS_WITHIN).await?;
            ensure!(found.ends_with(" 0"), "it keeps {found}");
            Ok(())
        })
        .await?;

        // When the broker is unavailable, an Event names the sessions that could not be deleted.
        fleet.apply(pipeline("late")).await?;
        fleet.ready("Pipeline", "late").await?;
        fleet.delete("Pod", "foreign").await?;
        fleet.gone("Pod", "foreign", SHOWS_WITHIN).await?;
        fleet.delete("Pipeline", "late").await?;
        let told = fleet.event("Pipeline", "late", "Warning", "SessionsNotEnded").await?;
        ensure!(told.contains("Gateway far") && told.contains("fwi"), "it does not say which client to end: {told}");
        fleet.gone("Pipeline", "late", SHOWS_WITHIN).await?;

        // A Gateway cannot change between an operated and an external broker.
        let error = fleet.apply(gateway("far")).await.err().context("an external Gateway became one of ours")?;
        ensure!(format!("{error:#}").contains("create another Gateway"), "{error:#}");
        Ok(())
    });
}

fn external(address: &str) -> Value {
    with(gateway("far"), "/spec/external", json!({"address": address, "credentialsSecret": {"name": "login"}}))
}

/// The operator creates no workload for the Gateway, and no credentials for its devices.
async fn made_nothing(fleet: &Fleet) -> Result<()> {
    let workloads = Api::<StatefulSet>::namespaced(fleet.client.clone(), &fleet.namespace).list(&ListParams::default()).await?;
    let brokers: Vec<_> = workloads.items.into_iter().filter_map(|set| set.metadata.name).filter(|name| name.contains("broker")).collect();
    ensure!(brokers.is_empty(), "{brokers:?}");
    for name in ["press-1-credentials", "far-auth-0", "far-link"] {
        ensure!(fleet.api("Secret").get_opt(name).await?.is_none(), "there is a Secret {name}");
    }
    Ok(())
}

async fn connected(fleet: &Fleet, state: &str) -> Result<()> {
    until(SHOWS_WITHIN, format!("press-1 is {state}"), async || {
        let device = fleet.api("Device").get("press-1").await?;
        let found = device.data.pointer("/status/connection/state").and_then(Value::as_str);
        ensure!(found == Some(state), "it is {found:?}");
        Ok(())
    })
    .await
}

/// Starts the external broker and returns its address.
async fn foreign(fleet: &Fleet) -> Result<String> {
    let labels = json!({"app": "foreign"});
    let configuration = json!({
        "apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "foreign"},
        "data": {"mosquitto.conf": CONFIGURATION, "passwords": PASSWORDS},
    });
    let service = json!({
        "apiVersion": "v1", "kind": "Service", "metadata": {"name": "foreign"},
        "spec": {"selector": labels, "ports": [{"port": 1883}]},
    });
    let pod = json!({
        "apiVersion": "v1", "kind": "Pod", "metadata": {"name": "foreign", "labels": labels},
        "spec": {
            "terminationGracePeriodSeconds": 1,
            "securityContext": {"runAsNonRoot": true, "runAsUser": 65532, "runAsGroup": 65532, "fsGroup": 65532, "seccompProfile": {"type": "RuntimeDefault"}},
            "containers": [{
                "name": "mosquitto", "image": image(fleet).await?,
                "command": ["sh", "-c", START],
                "securityContext": {"allowPrivilegeEscalation": false, "capabilities": {"drop": ["ALL"]}},
                "readinessProbe": {"tcpSocket": {"port": 1883}, "periodSeconds": 1},
                "volumeMounts": [{"name": "configuration", "mountPath": "/etc/foreign"}, {"name": "own", "mountPath": "/run/foreign"}],
            }],
            "volumes": [{"name": "configuration", "configMap": {"name": "foreign"}}, {"name": "own", "emptyDir": {}}],
        },
    });
    fleet.apply_all([configuration, service, pod]).await?;
    Ok(format!("foreign.{}.svc:1883", fleet.namespace))
}

/// The image of the broker, from the operator's Deployment.
async fn image(fleet: &Fleet) -> Result<String> {
    let deployments = Api::<Deployment>::namespaced(fleet.client.clone(), SYSTEM_NAMESPACE).list(&ListParams::default()).await?;
    let containers = deployments.items.into_iter().filter_map(|deployment| deployment.spec.template.spec).flat_map(|pod| pod.containers);
    let variables = containers.flat_map(|container| container.env.into_iter().flatten().map(|variable| (variable.name, variable.value)));
    let found = variables.filter(|(name, _)| name == "FLEETWRIGHT_MOSQUITTO_IMAGE").find_map(|(_, value)| value);
    found.context("the operator does not say which image its brokers have")
}
