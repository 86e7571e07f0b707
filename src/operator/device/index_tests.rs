//! Events and the actions that follow from them.

use crate::api::reason::Reason;
use std::collections::BTreeMap;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::OwnerReference;
use serde_json::json;

use super::action::DeviceAction;
use super::*;
use crate::api::condition::Cause;
use crate::api::{Device, DeviceStatus};
use crate::broker::credential::entry::Entry;
use crate::broker::credential::hash::{GENERATED_ITERATIONS, hash};
use crate::broker::credential::password::Password;
use crate::broker::credential::shard::{self, Shard};
use crate::operator::device::endpoint::Endpoint;
use crate::operator::device::gateway::ShardPlan;
use crate::operator::device::record::PasswordState;
use crate::operator::device::rotation::{Lifetime, Previous};

fn device(name: &str, spec: &serde_json::Value) -> Device {
    let mut spec_with_gateway = json!({"gatewayRef": {"name": "g"}});
    spec_with_gateway.as_object_mut().unwrap().extend(spec.as_object().unwrap().clone());
    serde_json::from_value(json!({
        "apiVersion": "fleetwright.io/v1alpha1", "kind": "Device",
        "metadata": {"name": name, "namespace": "n", "uid": format!("uid-{name}"), "generation": 1, "resourceVersion": "1"},
        "spec": spec_with_gateway
    }))
    .unwrap()
}

fn gateway() -> GatewayKey {
    GatewayKey::new("n", "g")
}

fn key(name: &str) -> DeviceKey {
    DeviceKey { gateway: gateway(), name: name.into() }
}

fn hashed(name: &str, password: &str) -> PasswordState {
    let password = Password::given(password.as_bytes()).unwrap();
    PasswordState::Hashed(hash(&format!("uid-{name}"), name, &password, GENERATED_ITERATIONS).into())
}

fn owner(uid: &str) -> OwnerReference {
    OwnerReference { uid: uid.to_owned(), ..OwnerReference::default() }
}

fn endpoint(port: i32) -> Endpoint {
    Endpoint::new("g.n.svc", port, false, None)
}

fn gateway_appears(index: &mut DeviceIndex, uid: &str) {
    index.gateway_observed(&gateway(), Some(owner(uid)));
    index.endpoint_observed(&gateway(), uid, endpoint(1883));
}

/// An index with a Gateway and one device that has a password.
fn index() -> DeviceIndex {
    let mut index = DeviceIndex::default();
    index.completed();
    gateway_appears(&mut index, "uid-g");
    add(&mut index, "d");
    index
}

fn add(index: &mut DeviceIndex, name: &str) {
    index.device_applied(&device(name, &json!({})));
    index.password_observed(&key(name), &format!("uid-{name}"), hashed(name, "secret"));
}

/// Applies the plan, and returns the revisions of all shards for the proof.
fn flush(index: &mut DeviceIndex) -> BTreeMap<usize, String> {
    let (number, plan) = index.plan(&gateway()).expect("something to write");
    let revisions = plan.writes.iter().map(|secret| {
        let number = secret.metadata.name.as_ref().unwrap().rsplit_once('-').unwrap().1.parse().unwrap();
        (number, shard::revision(secret.data.as_ref().unwrap()))
    });
    let revisions = revisions.collect();
    index.plan_applied(&gateway(), number, plan);
    revisions
}

fn ready_status(index: &DeviceIndex, name: &str) -> DeviceStatus {
    match index.next_action(&key(name), false) {
        DeviceAction::WriteStatus(status) => *status,
        other => panic!("expected a status, got {other:?}"),
    }
}

/// Simulates the API server's response to a status write.
fn write(index: &mut DeviceIndex, name: &str, status: DeviceStatus) {
    let mut written = device(name, &json!({}));
    written.metadata.resource_version = Some("2".to_owned());
    written.status = Some(status);
    index.status_written(&key(name), &written);
}

fn condition(status: &DeviceStatus, type_: &str) -> (String, String) {
    let condition = status.conditions.iter().find(|condition| condition.type_ == type_).expect(type_);
    (condition.status.clone(), condition.reason.clone())
}

#[test]
fn a_device_is_ready_with_two_writes_once_it_is_verified_at_the_broker() {
    let mut index = DeviceIndex::default();
    gateway_appears(&mut index, "uid-g");
    index.device_applied(&device("d", &json!({})));
    assert!(matches!(index.next_action(&key("d"), false), DeviceAction::CreateSecret { .. }));
    index.password_observed(&key("d"), "uid-d", hashed("d", "secret"));
    assert!(matches!(index.next_action(&key("d"), false), DeviceAction::AwaitBroker));
    let revisions = flush(&mut index);
    assert!(matches!(index.next_action(&key("d"), false), DeviceAction::AwaitBroker), "written and not verified yet");
    index.proof_observed(&gateway(), revisions);
    let status = ready_status(&index, "d");
    assert_eq!(condition(&status, "CredentialsLive").0, "True");
    assert_eq!(condition(&status, "Ready").0, "True");
    write(&mut index, "d", status);
    assert!(matches!(index.next_action(&key("d"), false), DeviceAction::None));
    index.completed();
    assert_eq!(index.totals(&gateway()), Some((1, 1)));
    assert!(index.plan(&gateway()).is_none());
}

#[test]
fn a_verification_of_an_older_state_does_not_count() {
    let mut index = index();
    let old = flush(&mut index);
    index.password_observed(&key("d"), "uid-d", hashed("d", "another"));
    index.proof_observed(&gateway(), old);
    assert!(matches!(index.next_action(&key("d"), false), DeviceAction::AwaitBroker));
    let new = flush(&mut index);
    assert!(matches!(index.next_action(&key("d"), false), DeviceAction::AwaitBroker));
    index.proof_observed(&gateway(), new);
    assert!(matches!(index.next_action(&key("d"), false), DeviceAction::WriteStatus(_)));
}

#[test]
fn a_change_of_one_device_does_not_affect_another() {
    let mut index = index();
    let revisions = flush(&mut index);
    index.proof_observed(&gateway(), revisions);
    let status = ready_status(&index, "d");
    write(&mut index, "d", status);
    add(&mut index, "e");
    assert!(matches!(index.next_action(&key("d"), true), DeviceAction::None), "verified once, and unchanged since");
}

#[test]
fn a_restart_writes_nothing() {
    let mut before = index();
    let revisions = flush(&mut before);
    before.proof_observed(&gateway(), revisions.clone());
    let status = ready_status(&before, "d");

    let mut written = device("d", &json!({}));
    written.status = Some(status);
    let data = Shard::divide(1, [before.gateways[&gateway()].devices["d"].entry("d").unwrap().unwrap()])[0].render();
    // The key outlives the process.
    let mut after = DeviceIndex { digest_key: Arc::clone(&before.digest_key), ..DeviceIndex::default() };
    after.device_applied(&written);
    after.password_observed(&key("d"), "uid-d", hashed("d", "secret"));
    gateway_appears(&mut after, "uid-g");
    after.shard_observed(&gateway(), 0, Some(&data));
    assert!(after.plan(&gateway()).is_none());
    assert!(matches!(after.next_action(&key("d"), true), DeviceAction::None), "even before the agent has reported");
    after.proof_observed(&gateway(), revisions);
    assert!(matches!(after.next_action(&key("d"), true), DeviceAction::None));
}

#[test]
fn the_status_reports_what_a_device_waits_for() {
    let cases = [
        ("no gateway", json!({}), hashed("d", "secret"), false, ("Accepted", "GatewayNotFound")),
        (
            "no secret",
            json!({"authentication": {"password": {"secretRef": {"name": "mine"}}}}),
            PasswordState::Missing(Box::new(Cause::new(Reason::SecretNotFound, "")), None),
            true,
            ("Accepted", "SecretNotFound"),
        ),
        ("no proof", json!({}), hashed("d", "secret"), true, ("CredentialsLive", "AwaitingBroker")),
    ];
    for (name, spec, password, gateway_exists, (type_, reason)) in cases {
        let mut index = DeviceIndex::default();
        if gateway_exists {
            gateway_appears(&mut index, "uid-g");
        }
        index.device_applied(&device("d", &spec));
        index.password_observed(&key("d"), "uid-d", password);
        let DeviceAction::WriteStatus(status) = index.next_action(&key("d"), true) else { panic!("{name}: no status") };
        assert_eq!(condition(&status, type_), ("False".to_owned(), reason.to_owned()), "{name}");
        assert_eq!(condition(&status, "Ready").0, "False", "{name}");
        assert_eq!(condition(&status, "Reconciling").0, "True", "{name}");
    }
}

#[test]
fn an_error_in_the_spec_is_stalled() {
    let mut index = index();
    index.device_applied(&device("d", &json!({"authorization": {"acls": [{"topic": "a\nuser b", "access": "Read"}]}})));
    let status = ready_status(&index, "d");
    assert_eq!(condition(&status, "Stalled").0, "True");
}

#[test]
fn a_disabled_device_is_ready_once_its_removal_is_verified_at_the_broker() {
    let mut index = index();
    let revisions = flush(&mut index);
    index.proof_observed(&gateway(), revisions);
    let status = ready_status(&index, "d");
    write(&mut index, "d", status);
    index.device_applied(&device("d", &json!({"enabled": false})));
    assert!(matches!(index.next_action(&key("d"), false), DeviceAction::AwaitBroker));
    let revisions = flush(&mut index);
    index.proof_observed(&gateway(), revisions);
    let status = ready_status(&index, "d");
    assert_eq!(condition(&status, "Ready"), ("True".to_owned(), "Disabled".to_owned()));
    assert_eq!(condition(&status, "CredentialsLive").0, "False");
}

#[test]
fn no_shard_is_written_before_every_user_password_has_been_read() {
    let mut index = index();
    index.device_applied(&device("e", &json!({"authentication": {"password": {"secretRef": {"name": "mine"}}}})));
    assert!(index.plan(&gateway()).is_none(), "the device would be removed from its shard");
    index.password_observed(&key("e"), "uid-e", hashed("e", "given"));
    assert!(index.plan(&gateway()).is_some());
}

#[test]
fn a_changed_user_secret_is_read_again_before_the_next_plan() {
    let mut index = DeviceIndex::default();
    gateway_appears(&mut index, "uid-g");
    index.device_applied(&device("e", &json!({"authentication": {"password": {"secretRef": {"name": "mine"}}}})));
    index.password_observed(&key("e"), "uid-e", hashed("e", "given"));
    flush(&mut index);
    index.given_secret_changed("n", "another");
    assert!(!matches!(index.next_action(&key("e"), false), DeviceAction::ReadSecret { .. }));
    index.given_secret_changed("n", "mine");
    assert!(matches!(index.next_action(&key("e"), false), DeviceAction::ReadSecret { .. }));
    assert!(index.plan(&gateway()).is_none());
}

#[test]
fn a_deleted_device_is_removed_from_the_shards() {
    let mut index = index();
    add(&mut index, "e");
    flush(&mut index);
    index.device_deleted(&device("e", &json!({})));
    let (_, plan) = index.plan(&gateway()).unwrap();
    let shard = Shard::parse(plan.writes[0].data.as_ref().unwrap()).unwrap();
    assert_eq!(shard.entries().keys().collect::<Vec<_>>(), ["d"]);
    assert_eq!(index.registry("n").len(), 1);
}

#[test]
fn a_recreated_device_gets_a_new_password() {
    let mut index = index();
    let mut again = device("d", &json!({}));
    again.metadata.uid = Some("uid-2".to_owned());
    index.device_applied(&again);
    index.password_observed(&key("d"), "uid-d", hashed("d", "of the first"));
    assert!(matches!(index.next_action(&key("d"), false), DeviceAction::CreateSecret { uid, .. } if *uid == *"uid-2"));
}

#[test]
fn a_late_event_does_not_cause_another_status_write() {
    let mut index = index();
    let revisions = flush(&mut index);
    index.proof_observed(&gateway(), revisions);
    let status = ready_status(&index, "d");
    write(&mut index, "d", status);
    index.device_applied(&device("d", &json!({})));
    assert!(matches!(index.next_action(&key("d"), false), DeviceAction::None));
}

#[test]
fn workers_are_added_and_removed_with_their_secret() {
    let mut index = index();
    flush(&mut index);
    let password = Password::generate();
    let entry = Entry::new("_ingest_p_0", &hash("uid-p", "_ingest_p_0", &password, GENERATED_ITERATIONS), &[]).unwrap();
    index.workers_observed("n", "p-ingest", &[("g".to_owned(), vec![entry])].into());
    let shard = |plan: &ShardPlan| Shard::parse(plan.writes[0].data.as_ref().unwrap()).unwrap().entries().len();
    let (number, plan) = index.plan(&gateway()).unwrap();
    assert_eq!(shard(&plan), 2);
    index.plan_applied(&gateway(), number, plan);
    index.workers_observed("n", "p-ingest", &BTreeMap::new());
    assert_eq!(shard(&index.plan(&gateway()).unwrap().1), 1);
}

#[test]
fn many_devices_all_become_ready_while_shards_grow() {
    let mut index = index();
    let mut proven = BTreeMap::new();
    for batch in 0..4 {
        for number in 0..400 {
            add(&mut index, &format!("d-{batch}-{number}"));
        }
        proven.extend(flush(&mut index));
    }
    assert!(proven.len() > 1, "more than one shard");
    index.proof_observed(&gateway(), proven);
    for batch in 0..4 {
        for number in 0..400 {
            assert!(matches!(index.next_action(&key(&format!("d-{batch}-{number}")), false), DeviceAction::WriteStatus(_)));
        }
    }
}

#[test]
fn a_rotation_is_verified_during_the_overlap_and_after_it() {
    let lifetime = |token: Option<&str>, previous: Option<(&str, i64)>| Lifetime {
        completed: token.map(Into::into),
        since: 100,
        previous: previous.map(|(password, until)| Box::new(Previous { hash: hashed("d", password).hash().unwrap().into(), until })),
        endpoint: Some(endpoint(1883).digest()),
    };
    let previous = |index: &mut DeviceIndex| {
        let (number, plan) = index.plan(&gateway()).expect("something to write");
        let shard = Shard::parse(plan.writes[0].data.as_ref().unwrap()).unwrap();
        let previous = shard.entries()["d"].previous_hash().map(str::to_owned);
        let revisions = BTreeMap::from([(0, shard::revision(plan.writes[0].data.as_ref().unwrap()))]);
        index.plan_applied(&gateway(), number, plan);
        index.proof_observed(&gateway(), revisions);
        previous
    };
    let mut index = index();
    index.generated_observed(&key("d"), "uid-d", hashed("d", "first"), lifetime(None, None), 200);
    assert_eq!(previous(&mut index), None);
    assert!(matches!(index.next_action(&key("d"), false), DeviceAction::WriteStatus(_)));
    let mut asking = device("d", &json!({"authentication": {"password": {"rotation": {"overlap": "5m"}}}}));
    asking.metadata.annotations = Some([("fleetwright.io/rotate-password".to_owned(), "now".to_owned())].into());
    index.device_applied(&asking);
    match index.next_action(&key("d"), false) {
        DeviceAction::RotatePassword { token, overlap, .. } => assert_eq!((token.as_deref(), overlap), (Some("now"), 300)),
        other => panic!("expected a rotation, got {other:?}"),
    }
    index.generated_observed(&key("d"), "uid-d", hashed("d", "second"), lifetime(Some("now"), Some(("first", 500))), 200);
    assert!(matches!(index.next_action(&key("d"), false), DeviceAction::AwaitBroker), "the rotation was executed and is not verified yet");
    assert_eq!(previous(&mut index).as_deref(), hashed("d", "first").hash());
    assert!(matches!(index.next_action(&key("d"), false), DeviceAction::WriteStatus(_)));
    index.advance(499);
    assert!(index.plan(&gateway()).is_none(), "both are accepted still");
    assert_eq!(index.next_deadline(), Some(500));
    index.take_changes();
    index.advance(500);
    assert!(index.take_changes().shards.contains(&gateway()));
    assert_eq!(previous(&mut index), None);
    // A restart reads it again after it has expired.
    index.generated_observed(&key("d"), "uid-d", hashed("d", "second"), lifetime(Some("now"), Some(("first", 500))), 501);
    assert!(index.plan(&gateway()).is_none());
}

#[test]
fn devices_of_an_external_broker_are_ready_once_it_is_connected() {
    let mut index = DeviceIndex::default();
    index.kind_observed(&gateway(), true);
    index.gateway_observed(&gateway(), Some(owner("uid-g")));
    let given = json!({"authentication": {"password": {"secretRef": {"name": "mine"}}}});
    for (name, spec) in [("d", json!({})), ("given", given), ("off", json!({"enabled": false}))] {
        index.device_applied(&device(name, &spec));
        assert!(matches!(index.next_action(&key(name), false), DeviceAction::AwaitBroker), "{name}");
        let DeviceAction::WriteStatus(status) = index.next_action(&key(name), true) else { panic!("{name}") };
        assert_eq!(condition(&status, "Ready"), ("False".to_owned(), "AwaitingBroker".to_owned()));
    }
    assert!(index.plan(&gateway()).is_none(), "no shards");
    index.take_changes();
    index.broker_connection_observed(&gateway(), true);
    assert_eq!(index.take_changes().devices.len(), 3);
    for (name, ready) in [("d", "BrokerReached"), ("given", "BrokerReached"), ("off", "Disabled")] {
        let status = ready_status(&index, name);
        assert_eq!(condition(&status, "CredentialsLive"), ("Unknown".to_owned(), "ManagedElsewhere".to_owned()));
        assert_eq!(condition(&status, "Ready"), ("True".to_owned(), ready.to_owned()));
        assert!(status.credentials_secret.is_none() && status.username.is_none());
    }
    let status = ready_status(&index, "d");
    write(&mut index, "d", status);
    assert!(matches!(index.next_action(&key("d"), false), DeviceAction::None));
    index.broker_connection_observed(&gateway(), false);
    assert!(matches!(index.next_action(&key("d"), true), DeviceAction::None), "an unavailable broker causes no write");
    index.completed();
    assert_eq!(index.totals(&gateway()), Some((3, 0)), "no credential is verified");
}

#[path = "index_listing_tests.rs"]
mod listing;

#[path = "index_room_tests.rs"]
mod room;
