//! The tables of a Pipeline: desired schema, the plan that leads to it, and its execution.

pub mod assignment;
pub mod connect;
pub mod dead_letter;
pub mod execute;
pub mod identifier;
pub mod observe;
pub mod plan;
pub mod retention;
pub mod schema;
pub mod system;
pub mod uri;
