//! The reconciler of Pipelines.
