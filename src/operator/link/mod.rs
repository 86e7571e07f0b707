//! The operator's links to brokers: what they are to keep at `devices/<name>/desired`, and how often what devices report may
//! become a write.

pub mod pace;
pub mod retained;
