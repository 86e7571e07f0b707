//! Keys of Gateways and Devices.

use std::sync::Arc;

use crate::api::Device;

/// A Gateway by namespace and name. It need not exist.
#[derive(Clone, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct GatewayKey {
    /// Namespace.
    pub namespace: Arc<str>,
    /// Name.
    pub name: Arc<str>,
}

impl GatewayKey {
    /// A Gateway by namespace and name.
    #[must_use]
    pub fn new(namespace: &str, name: &str) -> Self {
        Self { namespace: namespace.into(), name: name.into() }
    }
}

/// A Device by name, with its Gateway.
#[derive(Clone, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct DeviceKey {
    /// The Gateway.
    pub gateway: GatewayKey,
    /// Name of the Device.
    pub name: Arc<str>,
}

/// The key of a Device.
#[must_use]
pub fn key_of(device: &Device) -> Option<DeviceKey> {
    let namespace = device.metadata.namespace.as_deref()?;
    let name = device.metadata.name.as_deref()?;
    Some(DeviceKey { gateway: GatewayKey::new(namespace, &device.spec.gateway_ref.name), name: name.into() })
}
