//! libFuzzer with the target that `FLEETWRIGHT_FUZZ_TARGET` names. `scripts/fuzz.sh` builds and starts it.

#![no_main]

use std::sync::OnceLock;

use fleetwright_fuzz::{Target, target};
use libfuzzer_sys::fuzz_target;

static TARGET: OnceLock<Target> = OnceLock::new();

fuzz_target!(
    init: {
        let name = std::env::var("FLEETWRIGHT_FUZZ_TARGET").expect("FLEETWRIGHT_FUZZ_TARGET is not set");
        let chosen = target(&name).unwrap_or_else(|| panic!("no target has the name {name}"));
        TARGET.get_or_init(|| chosen);
    },
    |input: &[u8]| {
        let target = TARGET.get().expect("init runs first");
        (target.run)(input);
    }
);
