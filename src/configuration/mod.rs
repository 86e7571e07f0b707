//! What the operator writes for the other roles to read, and the agent for the operator: shared by both sides, so that a
//! configuration and its reader never disagree.

pub mod agent;
pub mod ingest;
pub mod pipeline;
