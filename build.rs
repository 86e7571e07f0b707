//! Sets linker options for the program.

#![allow(clippy::print_stdout, reason = "this is how a build script speaks to Cargo")]

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    // The addresses that the loader has to adjust take 14 KiB like this, and 1.5 MiB without, all of which every process reads into its
    // memory when it starts. Needs glibc 2.36.
    if std::env::var("CARGO_CFG_TARGET_OS").is_ok_and(|system| system == "linux") {
        println!("cargo:rustc-link-arg-bin=fleetwright=-Wl,-z,pack-relative-relocs");
    }
}
