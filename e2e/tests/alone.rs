//! Tests that disturb or measure shared components. They run one at a time.

mod control_plane;
mod namespaces;
mod presence;
mod rotation;
mod steady;
