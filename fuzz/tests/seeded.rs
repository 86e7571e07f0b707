//! Random mutations of the seeds and of the kept corpus, for each target. Each run has another seed.
//!
//! `FLEETWRIGHT_FUZZ_SEED` repeats the run of a seed that a failure has printed. `FLEETWRIGHT_FUZZ_SECONDS` is the time for each target
//! (default 1).

#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "helpers of tests fail by panicking, and print what failed")]

use std::hash::{BuildHasher, RandomState};
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::time::{Duration, Instant};

use fleetwright_fuzz::{TARGETS, Target, corpus, target};

/// Inputs that each target runs at least, however slow the machine is.
const MIN_ROUNDS: u64 = 1_000;

/// SplitMix64 (Steele, Lea, Flood 2014).
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// A number below `bound`; 0 if `bound` is 0.
    fn below(&mut self, bound: usize) -> usize {
        usize::try_from(self.next() % u64::try_from(bound.max(1)).unwrap()).unwrap()
    }

    fn bytes(&mut self, bound: usize) -> Vec<u8> {
        (0..self.below(bound)).map(|_| self.next().to_le_bytes()[0]).collect()
    }

    /// A range of at most 20 within this length.
    fn range(&mut self, length: usize) -> std::ops::Range<usize> {
        let start = self.below(length + 1);
        start..start + self.below((length - start + 1).min(20))
    }
}

fn mutate(random: &mut Random, inputs: &[Vec<u8>]) -> Vec<u8> {
    let mut message = inputs[random.below(inputs.len())].clone();
    for _ in 0..random.below(6) {
        let at = random.below(message.len());
        match random.below(8) {
            0 if !message.is_empty() => message[at] ^= 1 << random.below(8),
            1 if !message.is_empty() => message[at] = [0, 1, 0x7f, 0x80, 0xff, b'"', b'\\', b'{'][random.below(8)],
            2 => message.truncate(at),
            3 => drop(message.drain(random.range(message.len()))),
            4 => {
                let part = message[random.range(message.len())].to_vec();
                message.splice(at..at, part);
            }
            5 => drop(message.splice(at..at, random.bytes(12))),
            6 => {
                let other = &inputs[random.below(inputs.len())];
                message.truncate(at);
                message.extend_from_slice(&other[random.below(other.len())..]);
            }
            _ => message = random.bytes(64),
        }
    }
    message
}

fn variable(name: &str) -> Option<u64> {
    std::env::var(name).ok().map(|text| text.parse().unwrap())
}

/// The inputs in `fuzz/corpus/`, in the order of their names.
fn kept(target: &Target) -> Vec<Vec<u8>> {
    let Ok(folder) = std::fs::read_dir(corpus(target)) else { return Vec::new() };
    let mut files: Vec<_> = folder.map(|entry| entry.unwrap().path()).collect();
    files.sort();
    files.iter().map(|file| std::fs::read(file).unwrap()).collect()
}

fn run(target: &Target, input: &[u8], origin: &str) {
    if let Err(panic) = catch_unwind(AssertUnwindSafe(|| (target.run)(input))) {
        println!("{}: {origin}, input {input:02x?}", target.name);
        resume_unwind(panic);
    }
}

fn fuzz(name: &str) {
    let target = target(name).unwrap();
    let seconds = variable("FLEETWRIGHT_FUZZ_SECONDS").unwrap_or(1);
    let seed = variable("FLEETWRIGHT_FUZZ_SEED").unwrap_or_else(|| RandomState::new().hash_one(name));
    println!("{name}: FLEETWRIGHT_FUZZ_SEED={seed}");
    let mut inputs = (target.seeds)();
    for (index, seed) in inputs.iter().enumerate() {
        // Mutations of an input that is refused would reach little code.
        assert_ne!((target.run)(seed), 0, "{name} refuses its input {index}");
    }
    for (index, input) in kept(&target).into_iter().enumerate() {
        run(&target, &input, &format!("file {index} of the corpus"));
        inputs.push(input);
    }
    let (mut random, mut rounds) = (Random(seed), 0_u64);
    let until = Instant::now() + Duration::from_secs(seconds);
    while Instant::now() < until || rounds < MIN_ROUNDS {
        let input = mutate(&mut random, &inputs);
        run(&target, &input, &format!("FLEETWRIGHT_FUZZ_SEED={seed}, round {rounds}"));
        rounds += 1;
    }
    println!("{name}: {rounds} inputs");
}

macro_rules! tests {
    ($($test:ident $name:literal)*) => {
        $(
            #[test]
            fn $test() {
                fuzz($name);
            }
        )*

        #[test]
        fn each_target_has_a_test() {
            let mut tested = [$($name),*];
            let mut targets = TARGETS.map(|target| target.name);
            tested.sort_unstable();
            targets.sort_unstable();
            assert_eq!(tested, targets);
        }
    };
}

tests! {
    json "json"
    cbor "cbor"
    senml "senml"
    senml_cbor "senml-cbor"
    plain_text "plain-text"
    plain_number "plain-number"
    sparkplug "sparkplug"
    protobuf "protobuf"
    topic "topic"
    mqtt_frame "mqtt-frame"
    broker_log "broker-log"
    password_hash "password-hash"
    acl_line "acl-line"
}
