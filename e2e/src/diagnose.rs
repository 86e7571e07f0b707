//! Prints the objects, events and logs of a namespace when its test has failed.

use k8s_openapi::api::core::v1::{Event, Pod};
use kube::api::{DynamicObject, ListParams, LogParams};
use kube::{Api, ResourceExt};
use serde_json::{Value, json};

use crate::Fleet;
use crate::cluster::SYSTEM_NAMESPACE;

const KINDS: [&str; 7] = ["Gateway", "Device", "Pipeline", "StatefulSet", "ConfigMap", "Secret", "Service"];

/// Number of lines of each log, from its end.
const LINES: i64 = 60;

/// Maximum number of objects of a kind: more of them add no information.
const OBJECTS: usize = 12;

/// Maximum number of characters of each object, without its status.
const CHARACTERS: usize = 1500;

/// Prints everything. Read errors are printed and skipped, because the test has already failed.
pub async fn print(fleet: &Fleet) {
    for kind in KINDS {
        match fleet.api(kind).list(&ListParams::default()).await {
            Ok(list) => list.items.into_iter().take(OBJECTS).for_each(|object| print_object(kind, object)),
            Err(error) => eprintln!("  {kind}: {error}"),
        }
    }
    let events = Api::<Event>::namespaced(fleet.client.clone(), &fleet.namespace).list(&ListParams::default()).await;
    for event in events.map(|list| list.items).unwrap_or_default() {
        let object = event.involved_object;
        let text = [event.reason, event.message].map(Option::unwrap_or_default).join(": ");
        eprintln!("  event {} {} {text}", object.kind.unwrap_or_default(), object.name.unwrap_or_default());
    }
    for namespace in [&fleet.namespace, SYSTEM_NAMESPACE] {
        print_logs(fleet, namespace).await;
    }
}

fn print_object(kind: &str, mut object: DynamicObject) {
    object.metadata.managed_fields = None;
    if kind == "Secret" {
        redact(&mut object.data);
    }
    let status = object.data.as_object_mut().and_then(|data| data.remove("status")).unwrap_or_default();
    let rest: String = object.data.to_string().chars().take(CHARACTERS).collect();
    eprintln!("  {kind} {}, status {status}, metadata {}, {rest}", object.name_any(), json!(object.metadata));
}

/// Removes the values of a Secret and keeps its keys.
fn redact(data: &mut Value) {
    if let Some(values) = data.get_mut("data").and_then(Value::as_object_mut) {
        values.values_mut().for_each(|value| *value = Value::from("redacted"));
    }
}

async fn print_logs(fleet: &Fleet, namespace: &str) {
    let pods = Api::<Pod>::namespaced(fleet.client.clone(), namespace);
    let list = match pods.list(&ListParams::default()).await {
        Ok(list) => list.items,
        Err(error) => return eprintln!("  pods of {namespace}: {error}"),
    };
    for pod in list {
        let name = pod.metadata.name.clone().unwrap_or_default();
        let status = pod.status.unwrap_or_default();
        eprintln!("  pod {name}: {} {}", status.phase.unwrap_or_default(), status.message.unwrap_or_default());
        for container in status.container_statuses.unwrap_or_default() {
            eprintln!("    container {}: restarts {}, {}", container.name, container.restart_count, json!(container.state));
            for previous in [true, false] {
                if previous && container.restart_count == 0 {
                    continue;
                }
                let parameters =
                    LogParams { container: Some(container.name.clone()), tail_lines: Some(LINES), previous, ..LogParams::default() };
                match pods.logs(&name, &parameters).await {
                    Ok(log) => log.lines().for_each(|line| eprintln!("    {} | {line}", if previous { "before" } else { "log" })),
                    Err(error) => eprintln!("    no log: {error}"),
                }
            }
        }
    }
}
