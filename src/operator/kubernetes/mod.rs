//! Access to the API server: writes, comparisons and watches.

pub mod apply;
pub mod diff;
pub mod watch;
