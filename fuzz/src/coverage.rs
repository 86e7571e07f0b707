//! libFuzzer with the target that `FLEETWRIGHT_FUZZ_TARGET` names. `scripts/fuzz.sh` builds and starts it.
//!
//! libFuzzer reads its inputs after `init`, which first writes the target's seeds to the folder `FLEETWRIGHT_FUZZ_SEEDS`, if it is set.

#![no_main]

use std::sync::OnceLock;

use fleetwright_fuzz::{Target, target};
use libfuzzer_sys::fuzz_target;

static TARGET: OnceLock<Target> = OnceLock::new();

fuzz_target!(
    init: {
        let name = std::env::var("FLEETWRIGHT_FUZZ_TARGET").expect("FLEETWRIGHT_FUZZ_TARGET is not set");
        let chosen = target(&name).unwrap_or_else(|| panic!("no target has the name {name}"));
        if let Some(folder) = std::env::var_os("FLEETWRIGHT_FUZZ_SEEDS") {
            for (index, seed) in (chosen.seeds)().iter().enumerate() {
                let file = std::path::Path::new(&folder).join(format!("seed-{index}"));
                std::fs::write(file, seed).expect("the folder FLEETWRIGHT_FUZZ_SEEDS is writable");
            }
        }
        TARGET.get_or_init(|| chosen);
    },
    |input: &[u8]| {
        let target = TARGET.get().expect("init runs first");
        (target.run)(input);
    }
);
