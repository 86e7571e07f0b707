//! The tables of a Pipeline: desired schema, the plan that leads to it, and its execution.

pub mod connect;
pub mod identifier;
pub mod system;
pub mod uri;
