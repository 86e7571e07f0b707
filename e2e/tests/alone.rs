//! Tests that break, or measure, what all others need: one at a time.

mod control_plane;
mod presence;
mod rotation;
mod steady;
