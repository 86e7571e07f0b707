//! Validation by the API server with helpful messages, and recovery when missing objects are created.

use anyhow::{Context, Result, ensure};
use fleetwright_e2e::certificate::Authority;
use fleetwright_e2e::cluster::{output, root};
use fleetwright_e2e::manifest::{CONNECTION_SECRET, device, gateway, pipeline, secret, with};
use fleetwright_e2e::{Fleet, run};
use futures::{StreamExt, TryStreamExt, stream};
use kube::api::{Patch, PatchParams};
use serde_json::{Value, json};
use tokio::process::Command;

/// Number of concurrent requests.
const AT_ONCE: usize = 8;

/// An object that is refused, and a part of the message.
type Case = (Value, &'static str);

#[test]
fn invalid_specs_are_refused_with_the_violated_rule() {
    run("invalid", async |fleet| {
        // The unchanged objects are valid, so each refusal below is caused by its change.
        for object in [gateway("plant-1"), device("press-1", "plant-1"), pipeline("readings"), external()] {
            tried(&fleet, object).await?;
        }
        let samples = root().join("config/samples");
        let mut kubectl = Command::new("kubectl");
        kubectl.args(["-n", &fleet.namespace, "apply", "--dry-run=server", "--validate=strict", "-f"]).arg(samples);
        output(&mut kubectl).await.context("the API server refuses a sample")?;
        let cases: Vec<Case> = [gateways(), externals(), listeners(), devices(), pipelines(), fields(), sinks(), dead_letters()].concat();
        println!("{} cases", cases.len());
        stream::iter(cases).map(Ok).try_for_each_concurrent(AT_ONCE, |(object, message)| ensure_refused(&fleet, object, message)).await
    });
}

/// Sends the object to the API server as a dry run with strict validation: unknown fields are refused too.
async fn tried(fleet: &Fleet, object: Value) -> Result<()> {
    let kind = object["kind"].as_str().context("no kind")?.to_owned();
    let name = object["metadata"]["name"].as_str().context("no name")?.to_owned();
    let parameters = PatchParams { dry_run: true, ..PatchParams::apply("e2e").force().validation_strict() };
    fleet.api(&kind).patch(&name, &parameters, &Patch::Apply(object)).await.map(drop).context("refused")
}

async fn ensure_refused(fleet: &Fleet, object: Value, message: &str) -> Result<()> {
    let Err(error) = tried(fleet, object.clone()).await else { anyhow::bail!("accepted: {object}") };
    let found = format!("{error:#}");
    ensure!(found.contains(message), "expected {message:?}, found {found:?} for {object}");
    Ok(())
}

fn gateways() -> Vec<Case> {
    let changed = |pointer, value| with(gateway("plant-1"), pointer, value);
    vec![
        (gateway(&"g".repeat(41)), "at most 40 characters"),
        (gateway("plant.1"), "no dots"),
        (changed("/spec/limits", json!({"maxConnections": 0})), "spec.limits.maxConnections"),
        (changed("/spec/limits", json!({"maxConnections": 1_000_001})), "spec.limits.maxConnections"),
        (changed("/spec/limits", json!({"maxMessageBytes": 1023})), "spec.limits.maxMessageBytes"),
        (changed("/spec/limits", json!({"queuedBytesPerClient": "many"})), "spec.limits.queuedBytesPerClient"),
        (changed("/spec/limits", json!({"whenFull": "Drop"})), "spec.limits.whenFull"),
        (changed("/spec/durability", json!("Perhaps")), "spec.durability"),
        (changed("/spec/service", json!({"type": "ExternalName"})), "spec.service.type"),
        (changed("/spec/storage", json!({"size": "1 GB"})), "spec.storage.size"),
        (changed("/spec/resources", json!({"limits": {"memory": "-1"}})), "spec.resources.limits.memory"),
        (changed("/spec/unknown", json!(1)), "unknown"),
        (
            changed("/spec/listeners", json!([{"name": "a", "port": 8884, "tls": {"authentication": "Certificate"}}])),
            "needs spec.clientAuthority",
        ),
        (changed("/spec/clientAuthority", json!({"secretName": "ca", "validity": "always"})), "spec.clientAuthority.validity"),
    ]
}

fn external() -> Value {
    with(gateway("far"), "/spec/external", json!({"address": "mqtt.example.org:8883", "tls": {}, "credentialsSecret": {"name": "login"}}))
}

fn externals() -> Vec<Case> {
    let changed = |pointer, value| with(external(), pointer, value);
    let mut cases = vec![
        (changed("/spec/listeners", json!([{"name": "mqtt", "port": 1884}])), "an external broker has its own listeners"),
        (changed("/spec/listeners", json!([{"name": "mqtt", "port": 1883, "tls": {}}])), "an external broker has its own listeners"),
        (changed("/spec/storage", json!({"size": "2Gi"})), "an external broker has its own storage"),
        (changed("/spec/durability", json!("Disk")), "an external broker has its own durability"),
        (changed("/spec/limits", json!({"maxMessageBytes": 2048})), "an external broker has its own limits"),
        (changed("/spec/limits", json!({"whenFull": "Slow"})), "an external broker has its own limits"),
        (changed("/spec/resources", json!({"limits": {"memory": "1Gi"}})), "an external broker has its own resources"),
        (changed("/spec/service", json!({"type": "NodePort"})), "an external broker has no Service"),
        (changed("/spec/external/credentialsSecret", json!({"name": "login", "usernameKey": "a/b"})), "usernameKey"),
        (with(gateway("far"), "/spec/external", json!({"address": "h:1883"})), "credentialsSecret"),
    ];
    for address in ["mqtt.example.org", "mqtt://mqtt.example.org:1883", "a b:1883", "::1:1883", ":1883"] {
        cases.push((changed("/spec/external/address", json!(address)), "spec.external.address"));
    }
    for address in ["h:0", "h:65536", "[::1]:99999"] {
        cases.push((changed("/spec/external/address", json!(address)), "the port is a number from 1 to 65535"));
    }
    cases
}

fn listeners() -> Vec<Case> {
    let changed = |list| with(gateway("plant-1"), "/spec/listeners", list);
    vec![
        (changed(json!([])), "spec.listeners"),
        (changed(json!([{"name": "a", "port": 1883}, {"name": "b", "port": 1883}])), "each port may be used by one listener only"),
        (changed(json!([{"name": "a", "port": 1883}, {"name": "a", "port": 1893}])), "duplicate"),
        (changed(json!([{"name": "Mqtt", "port": 1883}])), "spec.listeners[0].name"),
        (changed(json!([{"name": "sixteen-letters-", "port": 1883}])), "spec.listeners[0].name"),
        (changed(json!([{"name": "a", "port": 1023}])), "spec.listeners[0].port"),
        (changed(json!([{"name": "a", "port": 65536}])), "spec.listeners[0].port"),
        (changed(json!([{"name": "a", "port": 1884}])), "ports 1884, 9090 and 9443 are used by Fleetwright itself"),
        (changed(json!([{"name": "a", "port": 9443}])), "ports 1884, 9090 and 9443 are used by Fleetwright itself"),
        (changed(json!([{"name": "a", "port": 1883, "protocol": "Coap"}])), "spec.listeners[0].protocol"),
        (changed(json!([{"name": "a", "port": 8883, "tls": {"secretName": ""}}])), "secretName"),
    ]
}

fn devices() -> Vec<Case> {
    let acl = |topic: &str, access: &str| {
        with(device("press-1", "plant-1"), "/spec/authorization", json!({"acls": [{"topic": topic, "access": access}]}))
    };
    let long = |count: usize| (0..count).map(|number| json!({"topic": format!("{number:0>256}"), "access": "Read"})).collect::<Vec<_>>();
    let password = |password: Value| with(device("press-1", "plant-1"), "/spec/authentication", json!({"password": password}));
    let x509 = |name: &str, x509: Value| with(device(name, "plant-1"), "/spec/authentication", json!({"x509": x509}));
    vec![
        (device(&"d".repeat(201), "plant-1"), "at most 200 characters"),
        (device("press-1", ""), "spec.gatewayRef.name"),
        (x509(&"d".repeat(65), json!({"certificateSigningRequest": "x"})), "at most 64 characters"),
        (x509("press-1", json!({})), "certificateSigningRequest"),
        (x509("press-1", json!({"certificateSigningRequest": "x".repeat(16385)})), "certificateSigningRequest"),
        (device("press-1", &"g".repeat(41)), "spec.gatewayRef.name"),
        (with(device("press-1", "plant-1"), "/spec", json!({})), "gatewayRef"),
        (acl("$SYS/#", "Read"), "topics that start with $ belong to the broker"),
        (acl(" plants/1", "Read"), "neither starts nor ends with white space"),
        (acl("plants/1 ", "Read"), "neither starts nor ends with white space"),
        (acl("plants/#/press", "Read"), "topic"),
        (acl("plants/a+", "Read"), "topic"),
        (acl("plants/1\nuser x", "Read"), "topic"),
        (acl("", "Read"), "topic"),
        (acl("plants/1", "Own"), "access"),
        (with(device("press-1", "plant-1"), "/spec/authorization", json!({"acls": long(33)})), "at most 8,192 bytes"),
        (password(json!({"secretRef": {"name": ""}})), "secretRef"),
        (password(json!({"secretRef": {"name": "own"}, "rotation": {"every": "90d"}})), "rotation is for generated passwords"),
        (password(json!({"rotation": {"every": "0d"}})), "spec.authentication.password.rotation.every"),
        (password(json!({"rotation": {"overlap": "1.5h"}})), "spec.authentication.password.rotation.overlap"),
        (with(device("press-1", "plant-1"), "/spec/enabled", json!("yes")), "spec.enabled"),
    ]
}

fn pipelines() -> Vec<Case> {
    let topic = |topic: &str| with(pipeline("readings"), "/spec/source/topic", topic.into());
    let pointer = |pointer: &str| with(pipeline("readings"), "/spec/decode/time", json!({"pointer": pointer}));
    vec![
        (pipeline(&"p".repeat(41)), "at most 40 characters"),
        (pipeline("read.ings"), "no dots"),
        (topic("devices/telemetry"), "must name {device} exactly once"),
        (topic("{device}/{device}"), "must name {device} exactly once"),
        (topic("{device}/{time}"), "may not be called time or device_id"),
        (topic("{device}/{device_id}"), "may not be called time or device_id"),
        (topic("devices/{device}/#"), "spec.source.topic"),
        (topic("devices/{Device}/{device}"), "spec.source.topic"),
        (topic("devices/{device}/a{b}"), "spec.source.topic"),
        (topic("$SYS/{device}"), "spec.source.topic"),
        (topic("devices//{device}"), "spec.source.topic"),
        (pointer("ts"), "spec.decode.time.pointer"),
        (pointer("/a~2"), "spec.decode.time.pointer"),
        (with(pipeline("readings"), "/spec/decode/time", json!({"pointer": "/ts", "unit": "Days"})), "spec.decode.time.unit"),
        (with(pipeline("readings"), "/spec/decode/format", json!("Xml")), "spec.decode.format"),
        (with(pipeline("readings"), "/spec/deletionPolicy", json!("Keep")), "spec.deletionPolicy"),
        (with(pipeline("readings"), "/spec/decode/fields", json!([])), "spec.decode.fields"),
    ]
}

fn fields() -> Vec<Case> {
    let field = |value: Value| with(pipeline("readings"), "/spec/decode/fields/0", value);
    let named = |name: &str| field(json!({"name": name, "type": "Text"}));
    vec![
        (named("Value"), "spec.decode.fields[0].name"),
        (named("1st"), "spec.decode.fields[0].name"),
        (named(&"f".repeat(64)), "spec.decode.fields[0].name"),
        (named("time"), "this name is taken"),
        (named("device_id"), "this name is taken"),
        (named("xmin"), "this name is taken"),
        (field(json!({"name": "value"})), "type"),
        (field(json!({"name": "value", "type": "Float32"})), "spec.decode.fields[0].type"),
        (field(json!({"name": "value", "type": "Text", "min": 0})), "min and max are for Float64 and Int64 only"),
        (field(json!({"name": "value", "type": "Boolean", "max": 1})), "min and max are for Float64 and Int64 only"),
        (field(json!({"name": "value", "type": "Int64", "min": 2, "max": 1})), "min must not be above max"),
        (field(json!({"name": "value", "type": "Float64", "pointer": "value"})), "spec.decode.fields[0].pointer"),
        (field(json!({"name": "value", "type": "Float64", "unit": ""})), "spec.decode.fields[0].unit"),
    ]
}

fn sinks() -> Vec<Case> {
    let changed = |key: &str, value: Value| with(pipeline("readings"), &format!("/spec/sink/timescale/{key}"), value);
    let mut cases = vec![
        (changed("table", json!("Reading")), "spec.sink.timescale.table"),
        (changed("table", json!("public.reading")), "spec.sink.timescale.table"),
        (changed("table", json!("t".repeat(49))), "spec.sink.timescale.table"),
        (changed("connectionSecret", json!({"name": ""})), "connectionSecret.name"),
        (with(pipeline("readings"), "/spec/sink", json!({})), "timescale"),
    ];
    cases.extend(["1", "0d", "1s", "1.5h", "P1D", "-1d"].map(|interval| (changed("chunkInterval", interval.into()), "chunkInterval")));
    cases
}

fn dead_letters() -> Vec<Case> {
    let changed = |key: &str, value: Value| with(pipeline("readings"), &format!("/spec/{key}"), value);
    let (earlier, later) = ("2026-11-24T00:00:00Z", "2026-11-24T01:00:00Z");
    vec![
        (changed("deadLetters", json!({"retention": "0d"})), "spec.deadLetters.retention"),
        (changed("deadLetters", json!({"retention": "for ever"})), "spec.deadLetters.retention"),
        (changed("deadLetters", json!({"maxBytesPerHour": "much"})), "spec.deadLetters.maxBytesPerHour"),
        (changed("replay", json!({})), "spec.replay.token"),
        (changed("replay", json!({"token": "after the fix"})), "spec.replay.token"),
        (changed("replay", json!({"token": "a", "reasons": ["Unloved"]})), "spec.replay.reasons[0]"),
        (changed("replay", json!({"token": "a", "since": "yesterday"})), "spec.replay.since"),
        (changed("replay", json!({"token": "a", "since": later, "until": earlier})), "since must be before until"),
    ]
}

#[test]
fn immutable_fields_are_refused_with_instructions() {
    run("immutable", async |fleet| {
        // Nothing is started: the referenced objects do not exist, and the Gateway is paused.
        let paused = json!({"name": "plant-1", "annotations": {"fleetwright.io/pause-reconciliation": "true"}});
        fleet.apply_all([with(gateway("plant-1"), "/metadata", paused), device("press-1", "plant-2"), pipeline("readings")]).await?;
        for (object, message) in [
            (device("press-1", "plant-3"), "gatewayRef cannot be changed: delete the Device"),
            (with(gateway("plant-1"), "/spec/storage", json!({"size": "2Gi"})), "storage cannot be changed"),
            (with(pipeline("readings"), "/spec/sink/timescale/table", "another".into()), "table cannot be changed"),
        ] {
            ensure_refused(&fleet, object, message).await?;
        }
        let brokers = fleet.api("StatefulSet").list(&kube::api::ListParams::default()).await?;
        ensure!(brokers.items.is_empty(), "a paused Gateway was reconciled");
        Ok(())
    });
}

#[test]
fn missing_objects_are_named_and_their_creation_is_sufficient() {
    run("missing", async |fleet| {
        let database = fleet.database_without_secret().await?;
        let tls = json!([{"name": "mqtts", "port": 8883, "tls": {"secretName": "plant-1-tls"}}]);
        fleet.apply(with(gateway("plant-1"), "/spec/listeners", tls)).await?;
        let given = json!({"password": {"secretRef": {"name": "press-1-own"}}});
        fleet.apply_all([with(device("press-1", "plant-1"), "/spec/authentication", given), device("press-2", "plant-2")]).await?;
        let labelled = with(pipeline("elsewhere"), "/spec/source/gatewaySelector", json!({"matchLabels": {"site": "2"}}));
        fleet.apply_all([with(labelled, "/spec/sink/timescale/table", "elsewhere".into()), pipeline("readings")]).await?;
        for (kind, name, missing) in [
            ("Gateway", "plant-1", "plant-1-tls"),
            ("Device", "press-1", "press-1-own"),
            ("Device", "press-2", "plant-2"),
            ("Pipeline", "readings", CONNECTION_SECRET),
            ("Pipeline", "elsewhere", ""),
        ] {
            reconciling(&fleet, kind, name, missing).await?;
        }
        fleet.apply_all([authority_secret(&fleet)?, secret("press-1-own", &json!({"password": "given"}))]).await?;
        // First an unknown server, then a missing database, then an existing one.
        for (uri, missing) in [
            ("postgresql://u:p@nowhere.invalid:5432/fleet?sslmode=disable".to_owned(), "nowhere.invalid"),
            (database.uri_of_database("not_there"), "not_there"),
        ] {
            fleet.apply(secret(CONNECTION_SECRET, &json!({"uri": uri}))).await?;
            reconciling(&fleet, "Pipeline", "readings", missing).await?;
        }
        fleet.apply(database.secret()).await?;
        fleet.apply(with(gateway("plant-2"), "/metadata/labels", json!({"site": "2"}))).await?;
        fleet.all_ready(&["Gateway/plant-1", "Gateway/plant-2", "Device/press-1", "Device/press-2"]).await?;
        fleet.all_ready(&["Pipeline/readings", "Pipeline/elsewhere"]).await
    });
}

fn authority_secret(fleet: &Fleet) -> Result<Value> {
    Authority::new()?.secret("plant-1-tls", &format!("plant-1.{}.svc", fleet.namespace))
}

/// Waits until the object is Reconciling with a message that names the missing object, and not Ready for the same reason.
async fn reconciling(fleet: &Fleet, kind: &str, name: &str, missing: &str) -> Result<()> {
    use fleetwright_e2e::fleet::{conditions, summary};
    use fleetwright_e2e::wait::{seconds, until};
    until(seconds(40), format!("{kind} {name} says that {missing:?} is missing"), async || {
        let object = fleet.api(kind).get(name).await?;
        let list = conditions(&object);
        let says = |type_: &str, status: &str| list.iter().any(|c| c.type_ == type_ && c.status == status && c.message.contains(missing));
        ensure!(says("Reconciling", "True") && says("Ready", "False"), "it is {}", summary(&object));
        ensure!(!list.iter().any(|c| c.type_ == "Stalled"), "it is {}", summary(&object));
        Ok(())
    })
    .await
}
