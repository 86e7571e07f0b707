//! What lists and echoes tell the fleet, and what is pressing.

use super::*;

#[test]
fn half_a_list_is_no_total() {
    let mut fleet = Fleet::default();
    fleet.listing_devices();
    add(&mut fleet, "e");
    assert_eq!(fleet.totals(&gateway()), None);
    fleet.devices_listed();
    fleet.completed();
    assert_eq!(fleet.totals(&gateway()), Some((1, 0)));
}

#[test]
fn devices_that_a_list_no_longer_shows_are_gone() {
    let mut fleet = fleet();
    fleet.listing_devices();
    add(&mut fleet, "e");
    fleet.devices_listed();
    assert_eq!(fleet.totals(&gateway()).unwrap().0, 1);
    assert_eq!(fleet.registry("n")[0].name, "e");
}

#[test]
fn a_generated_password_that_a_list_no_longer_shows_is_generated_anew() {
    let mut fleet = fleet();
    add(&mut fleet, "e");
    fleet.listing_secrets();
    fleet.generated_observed(&key("d"), "uid-d", hashed("d", "secret"), Lifetime::default(), 0);
    fleet.generated_secrets_listed();
    assert!(matches!(fleet.step(&key("d"), false), Step::AwaitBroker));
    assert!(matches!(fleet.step(&key("e"), false), Step::CreateSecret { .. }));
}

#[test]
fn letting_a_device_in_is_less_pressing_than_keeping_one_out() {
    let mut fleet = fleet();
    fleet.take_changes();
    let pressing = |fleet: &mut Fleet| {
        let changes = fleet.take_changes();
        (changes.shards.contains(&gateway()), changes.arrivals.contains(&gateway()))
    };
    add(&mut fleet, "e");
    assert_eq!(pressing(&mut fleet), (false, true));
    flush(&mut fleet);
    fleet.device_applied(&device("e", &json!({"enabled": false})));
    assert_eq!(pressing(&mut fleet), (true, false));
    fleet.password_observed(&key("d"), "uid-d", hashed("d", "another"));
    assert_eq!(pressing(&mut fleet), (true, false));
    fleet.device_deleted(&device("d", &json!({})));
    assert_eq!(pressing(&mut fleet), (true, false));
}

#[test]
fn what_was_written_to_a_shard_is_no_news() {
    let mut fleet = fleet();
    let (number, plan) = fleet.plan(&gateway()).unwrap();
    let data = plan.writes[0].data.clone().unwrap();
    fleet.plan_carried_out(&gateway(), number, plan);
    fleet.take_changes();
    fleet.shard_observed(&gateway(), 0, Some(&data));
    assert!(fleet.take_changes().shards.is_empty());
    fleet.shard_observed(&gateway(), 0, None);
    assert!(fleet.take_changes().shards.contains(&gateway()));
    assert!(fleet.plan(&gateway()).is_some(), "somebody deleted it");
}

#[test]
fn after_a_restart_only_what_is_not_settled_is_looked_at() {
    let mut fleet = fleet();
    let revisions = flush(&mut fleet);
    fleet.proof_observed(&gateway(), revisions);
    assert_eq!(fleet.unsettled(), [key("d")]);
    let status = ready_status(&fleet, "d");
    write(&mut fleet, "d", status);
    assert!(fleet.unsettled().is_empty());
    add(&mut fleet, "e");
    assert_eq!(fleet.unsettled(), [key("e")]);
}
