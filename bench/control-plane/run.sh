#!/usr/bin/env bash
# A fleet at scale on a local Kubernetes of its own, beside the floor and a naive controller, in one run.
#
#   run.sh [--devices N] [--gateways N] [--scenario NAME]...      --help lists them
#
# 15,000 Devices take some twenty minutes. Nothing else should run on the machine meanwhile. KEEP=1 leaves the cluster.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/../../scripts/lib.sh"
INSTANCE=${INSTANCE:-$(instance bench)}; export INSTANCE

case " $* " in *" --help "*) exec cargo run --quiet --release -p fleetwright-bench-control-plane -- "$@" ;; esac
finish() { [ -n "${KEEP:-}" ] || cluster down; }
trap finish EXIT
step "build" quietly cargo build --locked --release -p fleetwright -p fleetwright-bench-control-plane --manifest-path "$ROOT/Cargo.toml"
cluster up
load_images
install_charts
AUDIT_LOG=/var/lib/fleetwright/$INSTANCE/log/audit.json; export AUDIT_LOG
in_cluster "$(target_dir)/release/fleetwright-bench-control-plane" "$@"
