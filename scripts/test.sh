#!/usr/bin/env bash
# Everything that must hold. The last line counts the tests: `N passed, N failed`.
#
#   test.sh          all of it          test.sh unit   the quick ones: no cluster, no real parts
#   test.sh e2e      those on the local Kubernetes alone
#
#   KEEP=1 leaves the cluster of the test run for a look; E2E_THREADS=N says how many of its tests run at once; TEST=name
#   runs those whose names contain that.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

INSTANCE=${INSTANCE:-$(instance test)}; export INSTANCE
export FLEETWRIGHT_PARTS=$ROOT/e2e/parts.sh FLEETWRIGHT_BROKER=$ROOT/e2e/broker/broker.sh FLEETWRIGHT_HEALTH=$ROOT/e2e/health/health.sh FLEETWRIGHT_CLUSTER=$CLUSTER_SH
export CARGO_TERM_COLOR=${CARGO_TERM_COLOR:-never}
E2E_THREADS=${E2E_THREADS:-4}
CARGO_DENY_VERSION=0.20.2
WORKSPACE=(--locked --manifest-path "$ROOT/Cargo.toml")
LOGS=$(mktemp -d) PASSED=0 FAILED=0 STARTED=$EPOCHREALTIME PREPARING='' USES_CLUSTER='' NUMBER=0

# check WHAT COMMAND... : one test, which holds when COMMAND succeeds.
check() {
  local what=$1; shift
  attempt "$what" "$@"
  if [ "$STATUS" -eq 0 ]; then PASSED=$((PASSED + 1)); else FAILED=$((FAILED + 1)); show_end "$what"; fi
}

# cargo_tests WHAT COMMAND... : as many tests as cargo counts; a command that fails without a failed test is one.
cargo_tests() {
  local what=$1 passed failed; shift
  attempt "$what" "$@"
  passed=$(sum_of passed "$LOG"); failed=$(sum_of failed "$LOG")
  if [ "$STATUS" -ne 0 ] && [ "$failed" -eq 0 ]; then failed=1; fi
  say "  $passed passed, $failed failed"
  PASSED=$((PASSED + passed)) FAILED=$((FAILED + failed))
  [ "$failed" -eq 0 ] || show_end "$what"
}

# attempt WHAT COMMAND... : leaves the exit status in STATUS and the output in LOG. It is not to be called as a condition: there
# bash would ignore `set -e` inside COMMAND.
attempt() {
  local what=$1 started=$EPOCHREALTIME; shift
  NUMBER=$((NUMBER + 1)) LOG=$LOGS/$NUMBER
  say "$what"
  set +e; (set -e; "$@") >"$LOG" 2>&1; STATUS=$?; set -e
  say "  $([ "$STATUS" -eq 0 ] && echo ok || echo FAILED), $(since "$started") s"
}
sum_of() { sed -nE "s/^test result: .* ([0-9]+) $1;.*/\1/p" "$2" | awk '{n += $1} END {print n + 0}'; }
show_end() {
  say "  ---- $1: the end of its output"
  grep -E '^(test .* FAILED|error|thread .* panicked)' "$LOG" | sort -u | head -n 40 | sed 's/^/  | /' >&2 || true
  tail -n "${LOG_LINES:-80}" "$LOG" | sed 's/^/  | /' >&2
}

finish() {
  local status=$?
  trap - EXIT INT TERM
  set +e
  [ -z "$PREPARING" ] || [ -e "$LOGS/prepare.status" ] || kill -- "-$PREPARING" 2>/dev/null
  if [ -n "$USES_CLUSTER" ]; then
    if [ -n "${KEEP:-}" ]; then say "KEEP: the cluster stays: INSTANCE=$INSTANCE e2e/cluster/cluster.sh exec bash"; else cluster down; fi
  fi
  rm -rf "$LOGS"
  if [ "$status" -ne 0 ]; then FAILED=$((FAILED + 1)); say "interrupted, or failed outside a test"; fi
  say "in $(since "$STARTED") s"
  printf '%s passed, %s failed\n' "$PASSED" "$FAILED"
  exit $((FAILED > 0))
}

# In the background, at low priority: what the later tests need and what costs no Rust. In a process group of its own, so that
# it can be ended as a whole.
prepare() {
  set -m
  ( trap 'echo $? >"$LOGS/prepare.status"' EXIT
    nice -n 10 "$FLEETWRIGHT_PARTS" prepare
    nice -n 10 "$ROOT/e2e/images.sh" archive mosquitto timescaledb
    cluster up
    nice -n 10 "$FLEETWRIGHT_HEALTH" --prepare
    nice -n 10 "$ROOT/e2e/clients/sparkplug.sh" --prepare
    nice -n 10 "$ROOT/e2e/clients/paho.sh" --prepare
    nice -n 10 "$FLEETWRIGHT_CLUSTER" cert-manager --prepare ) >"$LOGS/prepare" 2>&1 </dev/null &
  PREPARING=$!
  set +m
}
prepared() {
  until [ -e "$LOGS/prepare.status" ]; do sleep 0.2; done
  cat "$LOGS/prepare"
  return "$(cat "$LOGS/prepare.status")"
}

install_deny() {
  CARGO_TARGET_DIR=$CACHE/cargo-deny-target cargo install --quiet --locked --root "$1" --version "$CARGO_DENY_VERSION" cargo-deny
  rm -rf "$CACHE/cargo-deny-target"
}
cargo_deny() {
  local home=$CACHE/cargo-deny-$CARGO_DENY_VERSION
  [ -e "$home" ] || cached "cargo-deny-$CARGO_DENY_VERSION" "build cargo-deny" install_deny
  "$home/bin/cargo-deny" --manifest-path "$ROOT/Cargo.toml" check bans licenses sources
}

scripts_hold() {
  need shellcheck=shellcheck
  cd "$ROOT"; shellcheck -x -P SCRIPTDIR -S warning e2e/*.sh e2e/*/*.sh scripts/*.sh images/*.sh images/*/*.sh .ci/run
}

static_checks() {
  check "format" cargo fmt --manifest-path "$ROOT/Cargo.toml" --all --check
  check "shell scripts" scripts_hold
  check "clippy" cargo clippy "${WORKSPACE[@]}" --workspace --all-targets -- -D warnings
  check "dependencies: bans, licences, sources" cargo_deny
}

unit_tests() { cargo_tests "unit and property tests" cargo test "${WORKSPACE[@]}" --workspace --exclude fleetwright-e2e --lib --bins ${TEST:+"$TEST"}; }
all_tests() { cargo_tests "unit, property and component tests, on real brokers and TimescaleDB" cargo test "${WORKSPACE[@]}" --workspace --exclude fleetwright-e2e --no-fail-fast; }
health_tests() { check "health as Flux and Argo CD read it" go test -C "$ROOT/e2e/health" ./...; }

chart_checks() {
  local chart
  for chart in fleetwright-crds fleetwright; do check "chart $chart: lint" in_cluster helm lint --strict "$ROOT/charts/$chart"; done
  check "chart fleetwright-crds: rendered, as the API server sees it" rendered fleetwright-crds
  check "chart fleetwright: rendered, as the API server sees it" rendered fleetwright
  check "chart fleetwright with a database: rendered, as the API server sees it" rendered fleetwright --set timescaledb.enabled=true
}

# rendered CHART [HELM-ARGS...] : strictly validated by the API server, nothing stored.
rendered() {
  local chart=$1 values; shift
  mapfile -t values < <(chart_values)
  [ "$chart" = fleetwright ] || values=()
  make_namespace "$SYSTEM_NAMESPACE"
  # Not --namespace: kubectl refuses objects that name another.
  helm template "$chart" "$ROOT/charts/$chart" --namespace "$SYSTEM_NAMESPACE" "${values[@]}" "$@" |
    NAMESPACE=$SYSTEM_NAMESPACE in_cluster kubectl apply --dry-run=server --validate=strict -f -
}

demo_manifests() {
  make_namespace fleet-demo
  in_cluster kubectl kustomize "$ROOT/config/demo" | kubectl apply --dry-run=server --validate=strict -f -
}

# end_to_end : charts and tests on the cluster, whose name and images are in the environment.
end_to_end() {
  check "release binary" release_binary
  check "local Kubernetes, images and parts" prepared
  if ! load_images; then FAILED=$((FAILED + 1)); return; fi
  [ "$1" = e2e ] || chart_checks
  check "charts install" install_charts
  [ "$1" = e2e ] || check "config/demo, as the API server sees it" demo_manifests
  check "end-to-end tests compile" cargo test "${WORKSPACE[@]}" -p fleetwright-e2e --no-run
  AUDIT_LOG=/var/lib/fleetwright/$INSTANCE/log/audit.json; export AUDIT_LOG
  # Offline, because the cluster's network leads nowhere else.
  cargo_tests "end-to-end tests" in_cluster cargo test "${WORKSPACE[@]}" --offline -p fleetwright-e2e --no-fail-fast -- \
    --test-threads="$E2E_THREADS" ${TEST:+"$TEST"}
}

trap finish EXIT
trap 'exit 130' INT TERM
case ${1:-all} in
  unit) unit_tests ;;
  e2e) USES_CLUSTER=1; prepare; end_to_end e2e ;;
  all)
    USES_CLUSTER=1; prepare
    static_checks
    health_tests
    "$FLEETWRIGHT_PARTS" prepare >/dev/null
    "$FLEETWRIGHT_BROKER" --prepare
    all_tests
    end_to_end all ;;
  *) fail "usage: test.sh [all|unit|e2e]" ;;
esac
