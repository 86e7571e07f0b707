#!/usr/bin/env bash
# Coverage-guided fuzzing with libFuzzer on stable Rust.
#
#   fuzz.sh                    each target for SECONDS_PER_TARGET seconds (default 60)
#   fuzz.sh TARGET             one target
#   fuzz.sh TARGET FILE        runs one input, for instance a failure that an earlier run has stored
#
# Inputs that reach new code are kept in fuzz/corpus/TARGET: commit them. KEEP_CORPUS=0 leaves fuzz/corpus as it is.
# A failing input is stored in target/fuzz/TARGET.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

SECONDS_PER_TARGET=${SECONDS_PER_TARGET:-60}
KEEP_CORPUS=${KEEP_CORPUS:-1}
MAX_INPUT_BYTES=1024           # larger inputs run slower and reach no other code in these parsers
TARGETS=(json cbor senml senml-cbor plain-text plain-number sparkplug protobuf topic mqtt-frame broker-log password-hash acl-line)

# All packages of the tests are selected, so that Cargo chooses the same features and reuses their dependencies.
build() {
  need g++=g++
  RUSTC_WORKSPACE_WRAPPER=$ROOT/fuzz/rustc.sh cargo build --locked --manifest-path "$ROOT/Cargo.toml" \
    --workspace --features fleetwright-fuzz/libfuzzer --bin coverage
}

# libfuzzer TARGET ARGS...
libfuzzer() {
  local target=$1; shift
  FLEETWRIGHT_FUZZ_TARGET=$target "$(target_dir)/debug/coverage" -artifact_prefix="$(target_dir)/fuzz/$target/" "$@"
}

# fuzz TARGET : new inputs go to a folder outside the clone; the smallest set with the same coverage goes to fuzz/corpus.
fuzz() {
  local target=$1 kept=$ROOT/fuzz/corpus/$1 found log; found=$(target_dir)/fuzz/$1/corpus; log=$(target_dir)/fuzz/$1/log
  mkdir -p "$kept" "$found"
  FLEETWRIGHT_FUZZ_SEEDS=$found libfuzzer "$target" -max_total_time="$SECONDS_PER_TARGET" -max_len="$MAX_INPUT_BYTES" -timeout=10 -rss_limit_mb=2048 \
    -print_final_stats=1 "$found" "$kept" >"$log" 2>&1 || { tail -n 40 "$log" >&2; return 1; }
  say "  $target: $(sed -nE 's/^stat::number_of_executed_units: *//p' "$log") inputs, coverage $(sed -nE 's/.*DONE.* cov: ([0-9]+).*/\1/p' "$log")"
  [ "$KEEP_CORPUS" = 0 ] || libfuzzer "$target" -merge=1 "$kept" "$found" >>"$log" 2>&1
}

step "build the fuzz targets" quietly build
if [ $# -eq 2 ]; then libfuzzer "$1" "$2"; exit; fi
[ $# -eq 0 ] || TARGETS=("$1")
for target in "${TARGETS[@]}"; do fuzz "$target"; done
