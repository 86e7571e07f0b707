#!/usr/bin/env bash
# RUSTC_WORKSPACE_WRAPPER of the fuzz build: adds libFuzzer's coverage instrumentation to the crates of this workspace.
# Cargo shares the dependencies, which are not instrumented, with the build of the tests. These options work on stable Rust.
set -euo pipefail
# A build script is a program of its own, without libFuzzer.
case " $* " in *" --crate-name build_script_"*) exec "$@" ;; esac
exec "$@" --cfg fuzzing -C passes=sancov-module -C llvm-args=-sanitizer-coverage-level=4 \
  -C llvm-args=-sanitizer-coverage-inline-8bit-counters -C llvm-args=-sanitizer-coverage-pc-table \
  -C llvm-args=-sanitizer-coverage-trace-compares
