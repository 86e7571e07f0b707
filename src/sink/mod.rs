//! The outputs of a Pipeline.

pub mod timescale;
