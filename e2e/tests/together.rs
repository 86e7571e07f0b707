//! Tests that run concurrently, each with its own namespace and database.

mod apply;
mod certificate;
mod dead_letter;
mod deletion;
mod desired;
mod device_certificate;
mod drift;
mod external;
mod faults;
mod fleets;
mod full;
mod given;
mod growth;
mod health;
mod issuer;
mod refusal;
mod validation;
