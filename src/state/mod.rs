//! State that workers and the operator keep in a database, in the schema `fleetwright`: sessions and their generations, redelivery,
//! assignment, replay progress, the registry of devices, dead letters.
//!
//! The database is a dependency of its own: nothing here depends on a sink or a role.

pub mod acknowledgement;
pub mod assignment;
pub mod dead_letter;
pub mod dead_letter_retention;
pub mod owner;
pub mod redelivery;
pub mod registry;
pub mod replay_progress;
pub mod session;
pub mod system;
