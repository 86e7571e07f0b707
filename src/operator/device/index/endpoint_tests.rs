//! The address of the broker in the Secrets of Devices.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::OwnerReference;
use serde_json::json;

use crate::api::Device;
use crate::operator::device::endpoint::Endpoint;
use crate::operator::device::index::DeviceIndex;
use crate::operator::device::index::action::DeviceAction;
use crate::operator::device::key::{DeviceKey, GatewayKey};
use crate::operator::device::record::PasswordState;
use crate::operator::device::rotation::Lifetime;

fn gateway() -> GatewayKey {
    GatewayKey::new("n", "g")
}

fn key() -> DeviceKey {
    DeviceKey { gateway: gateway(), name: "d".into() }
}

fn index() -> DeviceIndex {
    let mut index = DeviceIndex::default();
    let device = json!({
        "apiVersion": "fleetwright.io/v1alpha1", "kind": "Device",
        "metadata": {"name": "d", "namespace": "n", "uid": "uid-d", "generation": 1, "resourceVersion": "1"},
        "spec": {"gatewayRef": {"name": "g"}}
    });
    index.device_applied(&serde_json::from_value::<Device>(device).unwrap());
    index
}

fn gateway_is(index: &mut DeviceIndex, uid: Option<&str>) {
    index.gateway_observed(&gateway(), uid.map(|uid| OwnerReference { uid: uid.to_owned(), ..OwnerReference::default() }));
}

fn endpoint(port: i32) -> Endpoint {
    Endpoint::new("g.n.svc", port, false, None)
}

/// The Secret was read and contains this port.
fn secret_says(index: &mut DeviceIndex, port: i32) {
    let lifetime = Lifetime { endpoint: Some(endpoint(port).digest()), ..Lifetime::default() };
    index.generated_observed(&key(), "uid-d", PasswordState::Hashed("hash".into()), lifetime, 0);
}

fn written(index: &DeviceIndex) -> Option<Endpoint> {
    match index.next_action(&key(), false) {
        DeviceAction::CreateSecret { endpoint, .. } | DeviceAction::WriteEndpoint { endpoint, .. } => Some(endpoint.as_ref().clone()),
        _ => None,
    }
}

#[test]
fn a_secret_is_created_once_the_gateway_reports_its_address() {
    let mut index = index();
    assert!(matches!(index.next_action(&key(), false), DeviceAction::WriteStatus(_)), "there is no Gateway");
    gateway_is(&mut index, Some("1"));
    assert!(matches!(index.next_action(&key(), false), DeviceAction::AwaitBroker), "the Gateway has not been looked at");
    index.take_changes();
    index.endpoint_observed(&gateway(), "1", endpoint(1883));
    assert!(index.take_changes().devices.contains(&key()));
    assert_eq!(written(&index), Some(endpoint(1883)));
}

#[test]
fn only_a_secret_with_another_address_is_written() {
    let mut index = index();
    secret_says(&mut index, 1883);
    gateway_is(&mut index, Some("1"));
    assert_eq!(written(&index), None, "nobody knows better yet");
    index.take_changes();
    index.endpoint_observed(&gateway(), "1", endpoint(1883));
    assert!(index.take_changes().devices.is_empty());
    assert_eq!(written(&index), None);
    index.endpoint_observed(&gateway(), "1", endpoint(8883));
    assert!(index.take_changes().devices.contains(&key()));
    assert_eq!(written(&index), Some(endpoint(8883)));
    secret_says(&mut index, 8883);
    assert_eq!(written(&index), None);
    secret_says(&mut index, 1);
    assert_eq!(written(&index), Some(endpoint(8883)), "somebody changed it by hand");
}

/// The two watches of Gateways are not synchronized.
#[test]
fn the_address_of_a_recreated_gateway_counts_in_any_event_order() {
    let mut index = index();
    secret_says(&mut index, 1883);
    gateway_is(&mut index, Some("1"));
    index.endpoint_observed(&gateway(), "1", endpoint(1883));
    index.endpoint_observed(&gateway(), "2", endpoint(8883));
    assert_eq!(written(&index), None, "the Gateway that says this is not there yet");
    gateway_is(&mut index, None);
    gateway_is(&mut index, Some("2"));
    assert_eq!(written(&index), Some(endpoint(8883)));
    gateway_is(&mut index, None);
    gateway_is(&mut index, Some("3"));
    assert_eq!(written(&index), None, "it has not said anything");
    index.endpoint_observed(&gateway(), "3", endpoint(9883));
    assert_eq!(written(&index), Some(endpoint(9883)));
}
