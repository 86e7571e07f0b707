#!/usr/bin/env bash
# A node of a clustered broker in the foreground; see src/main.rs for its arguments.
# Builds the program once a machine. `broker.sh --prepare` only builds it.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/../lib.sh"

folder=$ROOT/e2e/broker
name=broker-$({ uname -m; cat "$folder"/Cargo.* "$folder"/src/*.rs "$folder"/protoc/Cargo.toml "$folder"/protoc/src/*.rs; } | short_hash)

build() {
  local target=$CACHE/broker-target
  need protoc=protobuf-compiler
  cargo build --quiet --locked --release --manifest-path "$folder/Cargo.toml" --target-dir "$target"
  mv "$target/release/fleetwright-e2e-broker" "$1"
  rm -rf "$target"
}

[ -e "$CACHE/$name" ] || cached "$name" "the clustered broker (about 4 minutes the first time)" build
[ "${1:-}" = --prepare ] || exec "$CACHE/$name" "$@"
