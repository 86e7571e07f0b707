#!/usr/bin/env bash
# The ingest worker between a real Mosquitto and a real TimescaleDB, beside Telegraf, a Python script and Node-RED, and beside the
# limits of broker and database, in one run. Prints its tables as Markdown. A peer that cannot be built here is left out, which
# is said.
#
#   run.sh                                         all, about 25 minutes
#   run.sh --consumer worker --rounds 1            the worker alone, and quickly
#   run.sh --scenario b --consumer worker          part of it; --help tells all options
#
# Nothing else should run on the machine meanwhile.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
export FLEETWRIGHT_PARTS=${FLEETWRIGHT_PARTS:-$PWD/e2e/parts.sh}
cargo build --release --quiet -p fleetwright -p fleetwright-bench-ingest
bench=${CARGO_TARGET_DIR:-target}/release/fleetwright-bench-ingest
case " $* " in *" --help "* | *" -h "*) exec "$bench" "$@" ;; esac

"$FLEETWRIGHT_PARTS" prepare >/dev/null
arguments=" $* "
# peer NAME VARIABLE : builds a peer if it is wanted, and tells where it is; only a remark when that fails.
peer() {
  local folder
  case $arguments in *" --consumer "*) [[ $arguments == *" $1"* ]] || return 0 ;; esac
  if folder=$(bench/ingest/peers/prepare.sh "$1"); then export "$2=$folder"; else echo "without $1: it could not be built" >&2; fi
}
peer telegraf FLEETWRIGHT_PEER_TELEGRAF
peer python FLEETWRIGHT_PEER_PYTHON
peer node-red FLEETWRIGHT_PEER_NODE_RED
exec "$bench" "$@"
