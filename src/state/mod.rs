//! State that workers and the operator keep in the database, in the schema `fleetwright`. Independent of the sinks.

pub mod assignment;
pub mod dead_letter;
pub mod dead_letter_retention;
pub mod owner;
pub mod registry;
pub mod system;
