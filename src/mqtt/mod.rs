//! MQTT 5 as a worker needs it: one subscription, QoS 1, acknowledgements by hand and in order.
//!
//! A client of its own, and a small one, because of its speed: it reads 64 KiB at a time, finds the messages in place, and
//! writes the acknowledgements of a whole transaction at once. The codec of all packets but PUBLISH and PUBACK is `rumqttc`'s.

pub mod connection;
pub mod frame;
pub mod login;
pub mod stream;
pub mod window;
