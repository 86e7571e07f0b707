//! The reconciler of Devices. Because there are many, there is no object cache: [`index`] keeps a few hundred bytes of each Device
//! and determines the next action, and [`driver`] executes it.

pub mod certificate;
pub mod certificate_request;
pub mod connection;
pub mod digest_key;
pub mod driver;
pub mod endpoint;
pub mod execute;
pub mod gateway;
pub mod index;
pub mod issue;
pub mod key;
pub mod last_written_status;
pub mod load;
pub mod metrics;
pub mod observe;
pub mod record;
pub mod report;
pub mod rotation;
pub mod secret;
pub mod status;
pub mod twin;
pub mod watch;
