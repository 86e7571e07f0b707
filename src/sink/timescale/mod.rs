//! The table of a Pipeline: desired schema, the plan that leads to it, and its execution.

pub mod execute;
pub mod observe;
pub mod plan;
pub mod schema;
