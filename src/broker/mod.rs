//! Everything about Mosquitto: its configuration, the credentials and access control lists that it reads, and its log. Pure.

pub mod configuration;
pub mod credential;
pub mod log;
