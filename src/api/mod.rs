//! The custom resources of `fleetwright.io/v1alpha1`: types, their schema and the names that derive from them.
//!
//! This crate does no I/O. The doc comments of fields are the user's manual: `kubectl explain` prints them.

pub mod client_authority;
pub mod client_limits;
pub mod condition;
pub mod crd;
pub mod credentials_secret;
pub mod dead_letter;
pub mod decode;
pub mod descriptor;
pub mod device;
pub mod duration;
pub mod external;
pub mod gateway;
pub mod listener;
pub mod manual;
pub mod name;
pub mod pipeline;
pub mod reason;
pub mod reference;
pub mod resources;
pub mod topic;

pub use device::{Device, DeviceSpec, DeviceStatus};
pub use gateway::{Gateway, GatewaySpec, GatewayStatus};
pub use pipeline::{Pipeline, PipelineSpec, PipelineStatus};

/// API group of all three kinds.
pub const GROUP: &str = "fleetwright.io";

/// Served and stored version of all three kinds.
pub const VERSION: &str = "v1alpha1";

/// While this annotation is `"true"` on an object, the operator leaves the object and everything it owns as they are.
pub const PAUSE_ANNOTATION: &str = "fleetwright.io/pause-reconciliation";

/// The value of `status.observedGeneration` before the first reconciliation of an object.
///
/// It is the schema's default, so that a new object never counts as healthy: kstatus compares it with
/// `metadata.generation`, which starts at 1.
#[must_use]
pub const fn unobserved() -> i64 {
    -1
}

/// Whether the object carries [`PAUSE_ANNOTATION`].
pub fn is_reconciliation_paused(object: &impl kube::ResourceExt) -> bool {
    object.annotations().get(PAUSE_ANNOTATION).is_some_and(|value| value == "true")
}
