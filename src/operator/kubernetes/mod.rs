//! Access to the API server: writes, comparisons, Events and watches.

pub mod apply;
pub mod diff;
pub mod events;
pub mod watch;

#[cfg(test)]
mod api_server_tests;
