//! Lists, late events and the urgency of changes.

use super::*;

#[test]
fn totals_are_unknown_until_the_list_is_complete() {
    let mut index = DeviceIndex::default();
    index.listing_devices();
    add(&mut index, "e");
    assert_eq!(index.totals(&gateway()), None);
    index.devices_listed();
    index.completed();
    assert_eq!(index.totals(&gateway()), Some((1, 0)));
}

#[test]
fn devices_missing_from_a_list_are_deleted() {
    let mut index = index();
    index.listing_devices();
    add(&mut index, "e");
    index.devices_listed();
    assert_eq!(index.totals(&gateway()).unwrap().0, 1);
    assert_eq!(index.registry("n")[0].name, "e");
}

#[test]
fn a_generated_secret_missing_from_a_list_is_created_again() {
    let mut index = index();
    add(&mut index, "e");
    index.listing_secrets();
    index.generated_observed(&key("d"), "uid-d", hashed("d", "secret"), Lifetime::default(), 0);
    index.generated_secrets_listed();
    assert!(matches!(index.next_action(&key("d"), false), DeviceAction::AwaitBroker));
    assert!(matches!(index.next_action(&key("e"), false), DeviceAction::CreateSecret { .. }));
}

#[test]
fn granting_access_is_less_urgent_than_revoking_it() {
    let mut index = index();
    index.take_changes();
    let pressing = |index: &mut DeviceIndex| {
        let changes = index.take_changes();
        (changes.shards.contains(&gateway()), changes.arrivals.contains(&gateway()))
    };
    add(&mut index, "e");
    assert_eq!(pressing(&mut index), (false, true));
    flush(&mut index);
    index.device_applied(&device("e", &json!({"enabled": false})));
    assert_eq!(pressing(&mut index), (true, false));
    index.password_observed(&key("d"), "uid-d", hashed("d", "another"));
    assert_eq!(pressing(&mut index), (true, false));
    index.device_deleted(&device("d", &json!({})));
    assert_eq!(pressing(&mut index), (true, false));
}

#[test]
fn the_event_of_an_own_shard_write_changes_nothing() {
    let mut index = index();
    let (number, plan) = index.plan(&gateway()).unwrap();
    let data = plan.writes[0].data.clone().unwrap();
    index.plan_applied(&gateway(), number, plan);
    index.take_changes();
    index.shard_observed(&gateway(), 0, Some(&data));
    assert!(index.take_changes().shards.is_empty());
    index.shard_observed(&gateway(), 0, None);
    assert!(index.take_changes().shards.contains(&gateway()));
    assert!(index.plan(&gateway()).is_some(), "somebody deleted it");
}

#[test]
fn only_unsettled_devices_are_queued_after_a_restart() {
    let mut index = index();
    let revisions = flush(&mut index);
    index.proof_observed(&gateway(), revisions);
    assert_eq!(index.unsettled(), [key("d")]);
    let status = ready_status(&index, "d");
    write(&mut index, "d", status);
    assert!(index.unsettled().is_empty());
    add(&mut index, "e");
    assert_eq!(index.unsettled(), [key("e")]);
}
