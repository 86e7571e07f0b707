//! Minimal resources for tests, which tests change as needed.

use serde_json::{Value, json};

/// Secret with the connection URI of the test's database.
pub const CONNECTION_SECRET: &str = "timescale";

/// A Gateway with one listener without TLS on port 1883.
#[must_use]
pub fn gateway(name: &str) -> Value {
    json!({"apiVersion": "fleetwright.io/v1alpha1", "kind": "Gateway", "metadata": {"name": name}, "spec": {}})
}

/// A Device with a generated password.
#[must_use]
pub fn device(name: &str, gateway: &str) -> Value {
    json!({"apiVersion": "fleetwright.io/v1alpha1", "kind": "Device", "metadata": {"name": name}, "spec": {"gatewayRef": {"name": gateway}}})
}

/// A Device with a certificate and without a password.
#[must_use]
pub fn device_with_request(name: &str, gateway: &str, request: &str) -> Value {
    with(device(name, gateway), "/spec/authentication", json!({"x509": {"certificateSigningRequest": request}}))
}

/// A Pipeline from all Gateways to the table `reading`: time in milliseconds at `/ts`, and a required number at `/value`.
#[must_use]
pub fn pipeline(name: &str) -> Value {
    json!({
        "apiVersion": "fleetwright.io/v1alpha1", "kind": "Pipeline", "metadata": {"name": name},
        "spec": {
            "source": {"topic": "devices/{device}/telemetry"},
            "decode": {"time": {"pointer": "/ts", "maxAge": "9999d"}, "fields": [{"name": "value", "type": "Float64", "required": true}]},
            "sink": {"timescale": {"connectionSecret": {"name": CONNECTION_SECRET}, "table": "reading"}},
        },
    })
}

/// A Secret with text values that may be used as credentials.
#[must_use]
pub fn secret(name: &str, data: &Value) -> Value {
    json!({"apiVersion": "v1", "kind": "Secret", "metadata": {"name": name, "labels": {"fleetwright.io/credentials": "true"}}, "stringData": data})
}

/// Returns `value` with the element at the JSON pointer replaced, or added to the parent object of the pointer.
///
/// # Panics
/// Panics when the parent does not exist.
#[must_use]
pub fn with(mut value: Value, pointer: &str, part: Value) -> Value {
    let (parent, key) = pointer.rsplit_once('/').expect("a JSON pointer starts with /");
    let mut place = &mut value;
    for step in parent.split('/').skip(1) {
        place = match step.parse::<usize>() {
            Ok(index) => &mut place[index],
            Err(_) => &mut place[step],
        };
        if place.is_null() {
            *place = json!({});
        }
    }
    match key.parse::<usize>() {
        Ok(index) => place[index] = part,
        Err(_) => place[key] = part,
    }
    value
}
