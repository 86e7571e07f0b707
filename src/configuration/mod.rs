//! The formats that the operator writes for the other roles, and the agent for the operator. Writer and reader share these types, so
//! that they always agree.

pub mod agent;
pub mod ingest;
pub mod pipeline;
