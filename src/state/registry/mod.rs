//! The device registry in the database: the operator fills it, workers follow it.

pub mod fill;
pub mod follow;

use std::collections::BTreeMap;

/// A Device as the registry knows it.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct DeviceRow {
    /// Name of the Device.
    pub name: String,
    /// Name of its Gateway.
    pub gateway: String,
    /// Whether it may connect.
    pub enabled: bool,
    /// Its attributes.
    pub attributes: BTreeMap<String, String>,
}
