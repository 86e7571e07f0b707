#!/usr/bin/env bash
# Benchmarks a large fleet on a separate local Kubernetes, and compares it in the same run with the floor and a naive controller.
#
#   run.sh [--devices N] [--gateways N] [--scenario NAME]...      --help lists all options
#
# 15,000 Devices take about twenty minutes. Run nothing else on the machine at the same time. KEEP=1 keeps the cluster.
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
