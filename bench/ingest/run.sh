#!/usr/bin/env bash
# The ingest worker between a real Mosquitto and a real TimescaleDB, beside the limits of both, in one run.
#
#   run.sh [--messages N] [--rounds N] [--scenario NAME]...      --help tells them
#
# Nothing else should run on the machine meanwhile.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
export FLEETWRIGHT_PARTS=${FLEETWRIGHT_PARTS:-$PWD/e2e/parts.sh}
cargo build --release --quiet -p fleetwright -p fleetwright-bench-ingest
"$FLEETWRIGHT_PARTS" prepare >/dev/null
exec "${CARGO_TARGET_DIR:-target}/release/fleetwright-bench-ingest" "$@"
