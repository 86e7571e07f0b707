//! The reconciler of Devices. Unlike the other kinds they are many: instead of an object cache and a reconciliation each,
//! [`fleet`] keeps what matters of each in a few hundred bytes, decides, and [`driver`] carries out.

pub mod certificate;
pub mod certificate_request;
pub mod connection;
pub mod driver;
pub mod endpoint;
pub mod execute;
pub mod gateway;
pub mod index;
pub mod issue;
pub mod key;
pub mod last_written_status;
pub mod observe;
pub mod record;
pub mod report;
pub mod rotation;
pub mod secret;
pub mod status;
pub mod twin;
pub mod watch;
