//! Where to connect to reaches the Secrets of Devices, and nothing else of them.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::OwnerReference;
use serde_json::json;

use super::Step;
use crate::api::Device;
use crate::operator::device::endpoint::Endpoint;
use crate::operator::device::fleet::Fleet;
use crate::operator::device::key::{DeviceKey, GatewayKey};
use crate::operator::device::record::PasswordState;
use crate::operator::device::rotation::Lifetime;

fn gateway() -> GatewayKey {
    GatewayKey::new("n", "g")
}

fn key() -> DeviceKey {
    DeviceKey { gateway: gateway(), name: "d".into() }
}

fn fleet() -> Fleet {
    let mut fleet = Fleet::default();
    let device = json!({
        "apiVersion": "fleetwright.io/v1alpha1", "kind": "Device",
        "metadata": {"name": "d", "namespace": "n", "uid": "uid-d", "generation": 1, "resourceVersion": "1"},
        "spec": {"gatewayRef": {"name": "g"}}
    });
    fleet.device_applied(&serde_json::from_value::<Device>(device).unwrap());
    fleet
}

fn gateway_is(fleet: &mut Fleet, uid: Option<&str>) {
    fleet.gateway_observed(&gateway(), uid.map(|uid| OwnerReference { uid: uid.to_owned(), ..OwnerReference::default() }));
}

fn endpoint(port: i32) -> Endpoint {
    Endpoint::new("g.n.svc", port, false, None)
}

/// The Secret has been read, and says this port.
fn secret_says(fleet: &mut Fleet, port: i32) {
    let lifetime = Lifetime { endpoint: Some(endpoint(port).digest()), ..Lifetime::default() };
    fleet.generated_observed(&key(), "uid-d", PasswordState::Hashed("hash".into()), lifetime, 0);
}

fn written(fleet: &Fleet) -> Option<Endpoint> {
    match fleet.step(&key(), false) {
        Step::CreateSecret { endpoint, .. } | Step::WriteEndpoint { endpoint, .. } => Some(endpoint.as_ref().clone()),
        _ => None,
    }
}

#[test]
fn a_secret_is_created_once_its_gateway_says_where_to_connect_to() {
    let mut fleet = fleet();
    assert!(matches!(fleet.step(&key(), false), Step::WriteStatus(_)), "there is no Gateway");
    gateway_is(&mut fleet, Some("1"));
    assert!(matches!(fleet.step(&key(), false), Step::AwaitBroker), "the Gateway has not been looked at");
    fleet.take_changes();
    fleet.endpoint_observed(&gateway(), "1", endpoint(1883));
    assert!(fleet.take_changes().devices.contains(&key()));
    assert_eq!(written(&fleet), Some(endpoint(1883)));
}

#[test]
fn only_a_secret_that_says_otherwise_is_written() {
    let mut fleet = fleet();
    secret_says(&mut fleet, 1883);
    gateway_is(&mut fleet, Some("1"));
    assert_eq!(written(&fleet), None, "nobody knows better yet");
    fleet.take_changes();
    fleet.endpoint_observed(&gateway(), "1", endpoint(1883));
    assert!(fleet.take_changes().devices.is_empty());
    assert_eq!(written(&fleet), None);
    fleet.endpoint_observed(&gateway(), "1", endpoint(8883));
    assert!(fleet.take_changes().devices.contains(&key()));
    assert_eq!(written(&fleet), Some(endpoint(8883)));
    secret_says(&mut fleet, 8883);
    assert_eq!(written(&fleet), None);
    secret_says(&mut fleet, 1);
    assert_eq!(written(&fleet), Some(endpoint(8883)), "somebody changed it by hand");
}

/// The two watches of Gateways are not in step.
#[test]
fn what_a_gateway_created_again_says_counts_whichever_comes_first() {
    let mut fleet = fleet();
    secret_says(&mut fleet, 1883);
    gateway_is(&mut fleet, Some("1"));
    fleet.endpoint_observed(&gateway(), "1", endpoint(1883));
    fleet.endpoint_observed(&gateway(), "2", endpoint(8883));
    assert_eq!(written(&fleet), None, "the Gateway that says this is not there yet");
    gateway_is(&mut fleet, None);
    gateway_is(&mut fleet, Some("2"));
    assert_eq!(written(&fleet), Some(endpoint(8883)));
    gateway_is(&mut fleet, None);
    gateway_is(&mut fleet, Some("3"));
    assert_eq!(written(&fleet), None, "it has not said anything");
    fleet.endpoint_observed(&gateway(), "3", endpoint(9883));
    assert_eq!(written(&fleet), Some(endpoint(9883)));
}
