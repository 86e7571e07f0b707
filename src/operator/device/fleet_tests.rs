//! The fleet as a table of events and what follows from them.

use std::collections::BTreeMap;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::OwnerReference;
use serde_json::json;

use super::*;
use crate::api::condition::Cause;
use crate::api::reason::Reason;
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

fn gateway_appears(fleet: &mut Fleet, uid: &str) {
    fleet.gateway_observed(&gateway(), Some(owner(uid)));
    fleet.endpoint_observed(&gateway(), uid, endpoint(1883));
}

/// A fleet whose Gateway exists, with one device that has a password.
fn fleet() -> Fleet {
    let mut fleet = Fleet::default();
    fleet.completed();
    gateway_appears(&mut fleet, "uid-g");
    add(&mut fleet, "d");
    fleet
}

fn add(fleet: &mut Fleet, name: &str) {
    fleet.device_applied(&device(name, &json!({})));
    fleet.password_observed(&key(name), &format!("uid-{name}"), hashed(name, "secret"));
}

/// Carries out the plan, and returns the revisions of all shards, for the broker to prove.
fn flush(fleet: &mut Fleet) -> BTreeMap<usize, String> {
    let (number, plan) = fleet.plan(&gateway()).expect("something to write");
    let revisions = plan.writes.iter().map(|secret| {
        let number = secret.metadata.name.as_ref().unwrap().rsplit_once('-').unwrap().1.parse().unwrap();
        (number, shard::revision(secret.data.as_ref().unwrap()))
    });
    let revisions = revisions.collect();
    fleet.plan_carried_out(&gateway(), number, plan);
    revisions
}

fn ready_status(fleet: &Fleet, name: &str) -> DeviceStatus {
    match fleet.step(&key(name), false) {
        Step::WriteStatus(status) => *status,
        other => panic!("expected a status, got {other:?}"),
    }
}

/// The API server's answer to a status.
fn write(fleet: &mut Fleet, name: &str, status: DeviceStatus) {
    let mut written = device(name, &json!({}));
    written.metadata.resource_version = Some("2".to_owned());
    written.status = Some(status);
    fleet.status_written(&key(name), &written);
}

fn condition(status: &DeviceStatus, type_: &str) -> (String, String) {
    let condition = status.conditions.iter().find(|condition| condition.type_ == type_).expect(type_);
    (condition.status.clone(), condition.reason.clone())
}

#[test]
fn a_device_is_ready_with_two_writes_once_the_broker_has_proven_it() {
    let mut fleet = Fleet::default();
    gateway_appears(&mut fleet, "uid-g");
    fleet.device_applied(&device("d", &json!({})));
    assert!(matches!(fleet.step(&key("d"), false), Step::CreateSecret { .. }));
    fleet.password_observed(&key("d"), "uid-d", hashed("d", "secret"));
    assert!(matches!(fleet.step(&key("d"), false), Step::AwaitBroker));
    let revisions = flush(&mut fleet);
    assert!(matches!(fleet.step(&key("d"), false), Step::AwaitBroker), "written is not proven");
    fleet.proof_observed(&gateway(), revisions);
    let status = ready_status(&fleet, "d");
    assert_eq!(condition(&status, "CredentialsLive").0, "True");
    assert_eq!(condition(&status, "Ready").0, "True");
    write(&mut fleet, "d", status);
    assert!(matches!(fleet.step(&key("d"), false), Step::Rest));
    fleet.completed();
    assert_eq!(fleet.totals(&gateway()), Some((1, 1)));
    assert!(fleet.plan(&gateway()).is_none());
}

#[test]
fn a_proof_of_an_older_state_does_not_count() {
    let mut fleet = fleet();
    let old = flush(&mut fleet);
    fleet.password_observed(&key("d"), "uid-d", hashed("d", "another"));
    fleet.proof_observed(&gateway(), old);
    assert!(matches!(fleet.step(&key("d"), false), Step::AwaitBroker));
    let new = flush(&mut fleet);
    assert!(matches!(fleet.step(&key("d"), false), Step::AwaitBroker));
    fleet.proof_observed(&gateway(), new);
    assert!(matches!(fleet.step(&key("d"), false), Step::WriteStatus(_)));
}

#[test]
fn a_change_of_one_device_does_not_unsettle_another() {
    let mut fleet = fleet();
    let revisions = flush(&mut fleet);
    fleet.proof_observed(&gateway(), revisions);
    let status = ready_status(&fleet, "d");
    write(&mut fleet, "d", status);
    add(&mut fleet, "e");
    assert!(matches!(fleet.step(&key("d"), true), Step::Rest), "proven once, and unchanged since");
}

#[test]
fn a_restart_writes_nothing() {
    let mut before = fleet();
    let revisions = flush(&mut before);
    before.proof_observed(&gateway(), revisions.clone());
    let status = ready_status(&before, "d");

    let mut written = device("d", &json!({}));
    written.status = Some(status);
    let data = Shard::divide(1, [before.gateways[&gateway()].devices["d"].entry("d").unwrap().unwrap()])[0].render();
    let mut after = Fleet::default();
    after.device_applied(&written);
    after.password_observed(&key("d"), "uid-d", hashed("d", "secret"));
    gateway_appears(&mut after, "uid-g");
    after.shard_observed(&gateway(), 0, Some(&data));
    assert!(after.plan(&gateway()).is_none());
    assert!(matches!(after.step(&key("d"), true), Step::Rest), "even before the agent has reported");
    after.proof_observed(&gateway(), revisions);
    assert!(matches!(after.step(&key("d"), true), Step::Rest));
}

#[test]
fn what_a_device_waits_for_stands_in_its_status() {
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
        let mut fleet = Fleet::default();
        if gateway_exists {
            gateway_appears(&mut fleet, "uid-g");
        }
        fleet.device_applied(&device("d", &spec));
        fleet.password_observed(&key("d"), "uid-d", password);
        let Step::WriteStatus(status) = fleet.step(&key("d"), true) else { panic!("{name}: no status") };
        assert_eq!(condition(&status, type_), ("False".to_owned(), reason.to_owned()), "{name}");
        assert_eq!(condition(&status, "Ready").0, "False", "{name}");
        assert_eq!(condition(&status, "Reconciling").0, "True", "{name}");
    }
}

#[test]
fn what_only_the_device_itself_can_mend_is_stalled() {
    let mut fleet = fleet();
    fleet.device_applied(&device("d", &json!({"authorization": {"acls": [{"topic": "a\nuser b", "access": "Read"}]}})));
    let status = ready_status(&fleet, "d");
    assert_eq!(condition(&status, "Stalled").0, "True");
}

#[test]
fn a_disabled_device_is_ready_once_the_broker_has_proven_to_refuse_it() {
    let mut fleet = fleet();
    let revisions = flush(&mut fleet);
    fleet.proof_observed(&gateway(), revisions);
    let status = ready_status(&fleet, "d");
    write(&mut fleet, "d", status);
    fleet.device_applied(&device("d", &json!({"enabled": false})));
    assert!(matches!(fleet.step(&key("d"), false), Step::AwaitBroker));
    let revisions = flush(&mut fleet);
    fleet.proof_observed(&gateway(), revisions);
    let status = ready_status(&fleet, "d");
    assert_eq!(condition(&status, "Ready"), ("True".to_owned(), "Disabled".to_owned()));
    assert_eq!(condition(&status, "CredentialsLive").0, "False");
}

#[test]
fn no_shard_is_written_before_every_given_password_has_been_read() {
    let mut fleet = fleet();
    fleet.device_applied(&device("e", &json!({"authentication": {"password": {"secretRef": {"name": "mine"}}}})));
    assert!(fleet.plan(&gateway()).is_none(), "the device would be thrown out of a shard that holds it");
    fleet.password_observed(&key("e"), "uid-e", hashed("e", "given"));
    assert!(fleet.plan(&gateway()).is_some());
}

#[test]
fn a_given_secret_that_changes_is_read_again_and_the_old_password_goes_on_until_then() {
    let mut fleet = Fleet::default();
    gateway_appears(&mut fleet, "uid-g");
    fleet.device_applied(&device("e", &json!({"authentication": {"password": {"secretRef": {"name": "mine"}}}})));
    fleet.password_observed(&key("e"), "uid-e", hashed("e", "given"));
    flush(&mut fleet);
    fleet.given_secret_changed("n", "another");
    assert!(!matches!(fleet.step(&key("e"), false), Step::ReadSecret { .. }));
    fleet.given_secret_changed("n", "mine");
    assert!(matches!(fleet.step(&key("e"), false), Step::ReadSecret { .. }));
    assert!(fleet.plan(&gateway()).is_none());
}

#[test]
fn a_deleted_device_leaves_the_shards() {
    let mut fleet = fleet();
    add(&mut fleet, "e");
    flush(&mut fleet);
    fleet.device_deleted(&device("e", &json!({})));
    let (_, plan) = fleet.plan(&gateway()).unwrap();
    let shard = Shard::parse(plan.writes[0].data.as_ref().unwrap()).unwrap();
    assert_eq!(shard.entries().keys().collect::<Vec<_>>(), ["d"]);
    assert_eq!(fleet.registry("n").len(), 1);
}

#[test]
fn a_device_of_the_same_name_created_again_starts_anew() {
    let mut fleet = fleet();
    let mut again = device("d", &json!({}));
    again.metadata.uid = Some("uid-2".to_owned());
    fleet.device_applied(&again);
    fleet.password_observed(&key("d"), "uid-d", hashed("d", "of the first"));
    assert!(matches!(fleet.step(&key("d"), false), Step::CreateSecret { uid, .. } if *uid == *"uid-2"));
}

#[test]
fn a_late_event_does_not_undo_what_was_written() {
    let mut fleet = fleet();
    let revisions = flush(&mut fleet);
    fleet.proof_observed(&gateway(), revisions);
    let status = ready_status(&fleet, "d");
    write(&mut fleet, "d", status);
    fleet.device_applied(&device("d", &json!({})));
    assert!(matches!(fleet.step(&key("d"), false), Step::Rest));
}

#[test]
fn workers_come_and_go_with_their_secret() {
    let mut fleet = fleet();
    flush(&mut fleet);
    let password = Password::generate();
    let entry = Entry::new("_ingest_p_0", &hash("uid-p", "_ingest_p_0", &password, GENERATED_ITERATIONS), &[]).unwrap();
    fleet.workers_observed("n", "p-ingest", &[("g".to_owned(), vec![entry])].into());
    let shard = |plan: &ShardPlan| Shard::parse(plan.writes[0].data.as_ref().unwrap()).unwrap().entries().len();
    let (number, plan) = fleet.plan(&gateway()).unwrap();
    assert_eq!(shard(&plan), 2);
    fleet.plan_carried_out(&gateway(), number, plan);
    fleet.workers_observed("n", "p-ingest", &BTreeMap::new());
    assert_eq!(shard(&fleet.plan(&gateway()).unwrap().1), 1);
}

#[test]
fn many_devices_all_become_ready_while_shards_grow() {
    let mut fleet = fleet();
    let mut proven = BTreeMap::new();
    for batch in 0..4 {
        for index in 0..400 {
            add(&mut fleet, &format!("d-{batch}-{index}"));
        }
        proven.extend(flush(&mut fleet));
    }
    assert!(proven.len() > 1, "more than one shard");
    fleet.proof_observed(&gateway(), proven);
    for batch in 0..4 {
        for index in 0..400 {
            assert!(matches!(fleet.step(&key(&format!("d-{batch}-{index}")), false), Step::WriteStatus(_)));
        }
    }
}

#[test]
fn a_rotation_is_proven_twice_with_both_passwords_and_with_the_new_one_alone() {
    let lifetime = |token: Option<&str>, previous: Option<(&str, i64)>| Lifetime {
        carried_out: token.map(Into::into),
        since: 100,
        previous: previous.map(|(password, until)| Box::new(Previous { hash: hashed("d", password).hash().unwrap().into(), until })),
        endpoint: Some(endpoint(1883).digest()),
    };
    let previous = |fleet: &mut Fleet| {
        let (number, plan) = fleet.plan(&gateway()).expect("something to write");
        let shard = Shard::parse(plan.writes[0].data.as_ref().unwrap()).unwrap();
        let previous = shard.entries()["d"].previous_hash().map(str::to_owned);
        let revisions = BTreeMap::from([(0, shard::revision(plan.writes[0].data.as_ref().unwrap()))]);
        fleet.plan_carried_out(&gateway(), number, plan);
        fleet.proof_observed(&gateway(), revisions);
        previous
    };
    let mut fleet = fleet();
    fleet.generated_observed(&key("d"), "uid-d", hashed("d", "first"), lifetime(None, None), 200);
    assert_eq!(previous(&mut fleet), None);
    assert!(matches!(fleet.step(&key("d"), false), Step::WriteStatus(_)));
    let mut asking = device("d", &json!({"authentication": {"password": {"rotation": {"overlap": "5m"}}}}));
    asking.metadata.annotations = Some([("fleetwright.io/rotate-password".to_owned(), "now".to_owned())].into());
    fleet.device_applied(&asking);
    match fleet.step(&key("d"), false) {
        Step::RotatePassword { token, overlap, .. } => assert_eq!((token.as_deref(), overlap), (Some("now"), 300)),
        other => panic!("expected a rotation, got {other:?}"),
    }
    fleet.generated_observed(&key("d"), "uid-d", hashed("d", "second"), lifetime(Some("now"), Some(("first", 500))), 200);
    assert!(matches!(fleet.step(&key("d"), false), Step::AwaitBroker), "it was carried out, and is not proven");
    assert_eq!(previous(&mut fleet).as_deref(), hashed("d", "first").hash());
    assert!(matches!(fleet.step(&key("d"), false), Step::WriteStatus(_)));
    fleet.advance(499);
    assert!(fleet.plan(&gateway()).is_none(), "both are accepted still");
    assert_eq!(fleet.next_deadline(), Some(500));
    fleet.take_changes();
    fleet.advance(500);
    assert!(fleet.take_changes().shards.contains(&gateway()));
    assert_eq!(previous(&mut fleet), None);
    // What a restart reads again is over.
    fleet.generated_observed(&key("d"), "uid-d", hashed("d", "second"), lifetime(Some("now"), Some(("first", 500))), 501);
    assert!(fleet.plan(&gateway()).is_none());
}

#[test]
fn devices_of_an_external_broker_have_no_credentials_of_ours_and_are_ready_once_it_is_reached() {
    let mut fleet = Fleet::default();
    fleet.kind_observed(&gateway(), true);
    fleet.gateway_observed(&gateway(), Some(owner("uid-g")));
    let given = json!({"authentication": {"password": {"secretRef": {"name": "mine"}}}});
    for (name, spec) in [("d", json!({})), ("given", given), ("off", json!({"enabled": false}))] {
        fleet.device_applied(&device(name, &spec));
        assert!(matches!(fleet.step(&key(name), false), Step::AwaitBroker), "{name}");
        let Step::WriteStatus(status) = fleet.step(&key(name), true) else { panic!("{name}") };
        assert_eq!(condition(&status, "Ready"), ("False".to_owned(), "AwaitingBroker".to_owned()));
    }
    assert!(fleet.plan(&gateway()).is_none(), "no shards");
    fleet.take_changes();
    fleet.link_observed(&gateway(), true);
    assert_eq!(fleet.take_changes().devices.len(), 3);
    for (name, ready) in [("d", "BrokerReached"), ("given", "BrokerReached"), ("off", "Disabled")] {
        let status = ready_status(&fleet, name);
        assert_eq!(condition(&status, "CredentialsLive"), ("Unknown".to_owned(), "ManagedElsewhere".to_owned()));
        assert_eq!(condition(&status, "Ready"), ("True".to_owned(), ready.to_owned()));
        assert!(status.credentials_secret.is_none() && status.username.is_none());
    }
    let status = ready_status(&fleet, "d");
    write(&mut fleet, "d", status);
    assert!(matches!(fleet.step(&key("d"), false), Step::Rest));
    fleet.link_observed(&gateway(), false);
    assert!(matches!(fleet.step(&key("d"), true), Step::Rest), "a broker that is away costs no write");
    fleet.completed();
    assert_eq!(fleet.totals(&gateway()), Some((3, 0)), "nobody has proven a credential");
}

#[path = "fleet_listing_tests.rs"]
mod listing;
