//! Access to the API server (writes, comparisons, Events, watches), and the common parts of the pods that the operator creates.

pub mod apply;
pub mod diff;
pub mod events;
pub mod namespaces;
pub mod pod;
pub mod secret;
pub mod watch;

#[cfg(test)]
mod api_server_tests;
