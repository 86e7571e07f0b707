//! Devices whose credentials do not fit into the shards of their Gateway.

use super::*;
use crate::broker::credential::shard::{MAX_SHARD_BYTES, shard_of};

/// The largest rules that a Device may have.
fn rules(count: usize) -> serde_json::Value {
    let acls: Vec<_> = (0..count).map(|number| json!({"topic": format!("{number:0>256}"), "access": "ReadWrite"})).collect();
    json!({"authorization": {"acls": acls}})
}

/// Names that meet in one shard, whatever the number of shards.
fn names() -> impl Iterator<Item = String> {
    (0..).map(|number| format!("press-{number}")).filter(|name| shard_of(name, 64) == 0)
}

fn apply(index: &mut DeviceIndex, name: &str, rules_of_256_bytes: usize, version: u32) {
    let mut device = device(name, &rules(rules_of_256_bytes));
    device.metadata.resource_version = Some(version.to_string());
    device.metadata.generation = Some(version.into());
    index.device_applied(&device);
    index.password_observed(&key(name), &format!("uid-{name}"), hashed(name, "secret"));
}

#[test]
fn only_the_largest_devices_of_a_full_shard_are_left_out() {
    let mut index = DeviceIndex::default();
    index.completed();
    gateway_appears(&mut index, "uid-g");
    let names: Vec<String> = names().take(131).collect();
    let (innocent, large) = names.split_first().unwrap();
    apply(&mut index, innocent, 0, 1);
    for name in large {
        apply(&mut index, name, 32, 1);
    }

    let (_, plan) = index.plan(&gateway()).unwrap();
    let bytes = |secret: &k8s_openapi::api::core::v1::Secret| secret.data.iter().flatten().map(|(_, value)| value.0.len()).sum::<usize>();
    assert!(plan.writes.iter().all(|secret| bytes(secret) <= MAX_SHARD_BYTES), "the API server accepts each");
    let revisions = flush(&mut index);
    index.proof_observed(&gateway(), revisions);
    assert_eq!(condition(&ready_status(&index, innocent), "CredentialsLive").0, "True");
    let reasons = |index: &DeviceIndex| -> Vec<(String, String)> {
        large.iter().map(|name| condition(&ready_status(index, name), "CredentialsLive")).collect()
    };
    let full = ("False".to_owned(), "CredentialsFull".to_owned());
    let excluded = reasons(&index).iter().filter(|reason| **reason == full).count();
    assert!((1..40).contains(&excluded), "{excluded} of {}", large.len());

    // Half of them get shorter rules: there is room for all.
    for name in &large[..65] {
        apply(&mut index, name, 1, 2);
    }
    let revisions = flush(&mut index);
    index.proof_observed(&gateway(), revisions);
    assert!(reasons(&index).iter().all(|reason| reason.0 == "True"), "{:?}", reasons(&index));
    assert!(!matches!(index.next_action(&key(innocent), false), DeviceAction::AwaitBroker));
}
