//! Fuzz targets: one function for each parser that reads bytes of a device, of a broker or of a Secret.
//!
//! A target panics when the parser panics or returns a value that breaks its contract. `tests/seeded.rs` mutates inputs with a random
//! seed; `src/coverage.rs` lets libFuzzer search for inputs that reach new code. Both start from [`seeds`] and from `fuzz/corpus/`.

mod decode;
mod descriptor;
mod protocol;
mod seeds;

use std::path::PathBuf;

/// A parser under test.
#[derive(Clone, Copy)]
pub struct Target {
    /// Name of the target; also of its folder in `fuzz/corpus/`.
    pub name: &'static str,

    /// Runs the parser and checks what it returns. The result counts what the parser accepted; 0 if it refused the input.
    pub run: fn(&[u8]) -> usize,

    /// Inputs that the parser accepts.
    pub seeds: fn() -> Vec<Vec<u8>>,
}

/// All targets.
pub const TARGETS: [Target; 13] = [
    Target { name: "json", run: decode::json, seeds: seeds::json },
    Target { name: "cbor", run: decode::cbor, seeds: seeds::cbor },
    Target { name: "senml", run: decode::senml, seeds: seeds::senml },
    Target { name: "senml-cbor", run: decode::senml_cbor, seeds: seeds::senml_cbor },
    Target { name: "plain-text", run: decode::plain_text, seeds: seeds::plain_text },
    Target { name: "plain-number", run: decode::plain_number, seeds: seeds::plain_number },
    Target { name: "sparkplug", run: decode::sparkplug, seeds: seeds::sparkplug },
    Target { name: "protobuf", run: decode::protobuf, seeds: seeds::protobuf },
    Target { name: "topic", run: protocol::topic, seeds: seeds::topic },
    Target { name: "mqtt-frame", run: protocol::mqtt_frame, seeds: seeds::mqtt_frame },
    Target { name: "broker-log", run: protocol::broker_log, seeds: seeds::broker_log },
    Target { name: "password-hash", run: protocol::password_hash, seeds: seeds::password_hash },
    Target { name: "acl-line", run: protocol::acl_line, seeds: seeds::acl_line },
];

/// The target with this name.
#[must_use]
pub fn target(name: &str) -> Option<Target> {
    TARGETS.into_iter().find(|target| target.name == name)
}

/// The folder with the kept inputs of a target. It may not exist.
#[must_use]
pub fn corpus(target: &Target) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("corpus").join(target.name)
}
