#!/usr/bin/env bash
# Benchmarks the ingest worker between a real Mosquitto and a real TimescaleDB, and compares it in the same run with Telegraf, a
# Python script and Node-RED, and with the limits of the broker and of the database. Prints tables in Markdown. A peer that cannot
# be built on this machine is skipped with a message.
#
#   run.sh                                         everything, about 25 minutes
#   run.sh --consumer worker --rounds 1            only the worker, in a short run
#   run.sh --scenario b --consumer worker          one part; --help lists all options
#
# Run nothing else on the machine at the same time.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
export FLEETWRIGHT_PARTS=${FLEETWRIGHT_PARTS:-$PWD/e2e/parts.sh}
cargo build --release --quiet -p fleetwright -p fleetwright-bench-ingest
bench=${CARGO_TARGET_DIR:-target}/release/fleetwright-bench-ingest
case " $* " in *" --help "* | *" -h "*) exec "$bench" "$@" ;; esac

"$FLEETWRIGHT_PARTS" prepare >/dev/null
arguments=" $* "
# peer NAME VARIABLE: builds a selected peer and exports its folder. A failure is not fatal.
peer() {
  local folder
  case $arguments in *" --consumer "* | *" --subscriber "*) [[ $arguments == *" $1"* ]] || return 0 ;; esac
  if folder=$(bench/ingest/peers/prepare.sh "$1"); then export "$2=$folder"; else echo "$1 is skipped: it could not be built" >&2; fi
}
peer telegraf FLEETWRIGHT_PEER_TELEGRAF
peer python FLEETWRIGHT_PEER_PYTHON
peer node-red FLEETWRIGHT_PEER_NODE_RED
exec "$bench" "$@"
