//! In the place of the crate that builds protoc from its C++ sources, which takes minutes: here it is the system's.

use std::path::PathBuf;

/// The program.
#[must_use]
pub fn protoc() -> PathBuf {
    PathBuf::from("protoc")
}
