//! Everything about Mosquitto: the credentials and access control lists that it reads, and its log. Pure.

pub mod credential;
pub mod log;
