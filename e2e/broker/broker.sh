#!/usr/bin/env bash
# Runs a node of the clustered broker in the foreground; src/main.rs documents the arguments.
# Builds the program once on each machine. `broker.sh --prepare` only builds it.
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

[ -e "$CACHE/$name" ] || cached "$name" "build the clustered broker, once" build
[ "${1:-}" = --prepare ] || exec "$CACHE/$name" "$@"
