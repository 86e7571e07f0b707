#!/usr/bin/env bash
# All tests. The last line counts them: `N passed, N failed`. docs/development.md says how long each part takes.
#
#   test.sh          everything         test.sh unit   unit and property tests: no cluster, broker or database
#   test.sh e2e      the end-to-end tests on a local Kubernetes
#
#   KEEP=1 keeps the cluster of the tests. E2E_THREADS=N: how many end-to-end tests run at the same time. TEST=name: only tests whose name
#   contains it (unit, e2e).
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

INSTANCE=${INSTANCE:-$(instance test)}; export INSTANCE
export FLEETWRIGHT_PARTS=$ROOT/e2e/parts.sh FLEETWRIGHT_BROKER=$ROOT/e2e/broker/broker.sh FLEETWRIGHT_HEALTH=$ROOT/e2e/health/health.sh FLEETWRIGHT_CLUSTER=$CLUSTER_SH
export CARGO_TERM_COLOR=${CARGO_TERM_COLOR:-never}
E2E_THREADS=${E2E_THREADS:-4}
LOGS=$(mktemp -d) STARTED=$EPOCHREALTIME BACKGROUND=() USES_CLUSTER=''
. "$ROOT/scripts/checks.sh"

# check WHAT COMMAND... : one test. It passes if COMMAND succeeds.
check() {
  local what=$1; shift
  attempt "$what" "$@"
  if [ "$STATUS" -eq 0 ]; then report 1 0; else report 0 1; show_end "$what"; fi
}

# cargo_tests WHAT COMMAND... : as many tests as cargo counts. A command that fails without a failed test counts as one.
cargo_tests() {
  local what=$1 passed failed; shift
  attempt "$what" "$@"
  passed=$(sum_of passed "$LOG"); failed=$(sum_of failed "$LOG")
  if [ "$STATUS" -ne 0 ] && [ "$failed" -eq 0 ]; then failed=1; fi
  say "$what: $passed passed, $failed failed"
  report "$passed" "$failed"
  [ "$failed" -eq 0 ] || show_end "$what"
}

# report PASSED FAILED : adds to the totals. In a file, because some tests run in the background.
report() { printf '%s %s\n' "$1" "$2" >>"$LOGS/counts"; }
total() { awk -v column="$1" '{n += $column} END {print n + 0}' "$LOGS/counts" 2>/dev/null || echo 0; }

# attempt WHAT COMMAND... : leaves the exit status in STATUS and the output in the file LOG. Do not call it as a condition: bash would
# ignore `set -e` inside COMMAND.
attempt() {
  local what=$1 started=$EPOCHREALTIME; shift
  LOG=$(mktemp "$LOGS/log.XXXXXX")
  say "$what ..."
  set +e; (set -e; "$@") >"$LOG" 2>&1 </dev/null; STATUS=$?; set -e
  say "$what: $([ "$STATUS" -eq 0 ] && echo ok || echo FAILED), $(since "$started") s"
}
sum_of() { sed -nE "s/^test result: .* ([0-9]+) $1;.*/\1/p" "$2" | awk '{n += $1} END {print n + 0}'; }
show_end() {
  say "  ---- $1: the end of the output"
  # The line after `panicked at` is the message of the panic.
  grep -E -A 1 '^(test .* FAILED|error|thread .* panicked|---- .* failed after)' "$LOG" | grep -v '^--$' | head -n 60 | sed 's/^/  | /' >&2 || true
  tail -n "${LOG_LINES:-80}" "$LOG" | sed 's/^/  | /' >&2
}

finish() {
  local status=$? passed failed group
  trap - EXIT INT TERM
  set +e
  [ ! -e "$LOGS/idle.pid" ] || BACKGROUND+=("$(cat "$LOGS/idle.pid")")
  for group in "${BACKGROUND[@]}"; do kill -- "-$group" 2>/dev/null; done
  [ ! -s "$LOGS/idle" ] || cat "$LOGS/idle" >&2
  if [ -n "$USES_CLUSTER" ]; then
    if [ -n "${KEEP:-}" ]; then say "KEEP: the cluster is still running: INSTANCE=$INSTANCE e2e/cluster/cluster.sh exec bash"; else cluster down; fi
  fi
  passed=$(total 1) failed=$(total 2)
  rm -rf "$LOGS"
  if [ "$status" -ne 0 ]; then failed=$((failed + 1)); say "the run was interrupted, or a command outside the tests failed"; fi
  say "in $(since "$STARTED") s"
  printf '%s passed, %s failed\n' "$passed" "$failed"
  exit $((failed > 0))
}

# background COMMAND... : in a process group of its own, so that `finish` can end all of its processes. The process id is in $!.
background() {
  set -m
  "$@" </dev/null &
  BACKGROUND+=($!)
  set +m
}

# What the end-to-end tests need besides Rust. At a low priority, because the compilation of the tests is on the critical path.
prepare() {
  set -e
  trap 'echo $? >"$LOGS/prepare.status"' EXIT
  exec >"$LOGS/prepare" 2>&1
  nice -n 10 "$FLEETWRIGHT_PARTS" prepare
  nice -n 10 "$ROOT/e2e/images.sh" archive mosquitto timescaledb
  nice -n 5 "$CLUSTER_SH" up
  nice -n 10 "$FLEETWRIGHT_HEALTH" --prepare
  nice -n 10 "$ROOT/e2e/clients/sparkplug.sh" --prepare
  nice -n 10 "$ROOT/e2e/clients/paho.sh" --prepare
  nice -n 10 "$CLUSTER_SH" cert-manager --prepare
}
prepared() {
  until [ -e "$LOGS/prepare.status" ]; do sleep 0.2; done
  cat "$LOGS/prepare"
  return "$(cat "$LOGS/prepare.status")"
}

# What later tests need, in the order in which they need it. A failure is reported where the result is needed.
build_ahead() {
  # A session of its own has none of the functions.
  # shellcheck source=/dev/null
  . "$ROOT/e2e/lib.sh"
  step "in the background: release binary" cargo build --quiet --locked --release --bin fleetwright --manifest-path "$ROOT/Cargo.toml"
  step "in the background: clustered broker" "$FLEETWRIGHT_BROKER" --prepare
  step "in the background: fuzz targets" "$ROOT/scripts/fuzz.sh" --prepare
}

# idle COMMAND... : runs a function or command in the background, with the processor time that nothing else uses. The kernel schedules each
# session as a group (sched(7), autogroup): `nice` has an effect within a group, so the command gets a session and a group of its own.
idle() {
  export -f build_ahead
  export ROOT
  setsid bash -c 'echo $$ >"$0"; echo 19 >/proc/self/autogroup; exec nice -n 19 bash -ec "$1"' "$LOGS/idle.pid" "$*" \
    </dev/null >"$LOGS/idle" 2>&1 &
}

trap finish EXIT
trap 'exit 130' INT TERM
case ${1:-all} in
  unit) unit_tests ;;
  e2e)
    USES_CLUSTER=1; background prepare
    end_to_end e2e ;;
  all)
    USES_CLUSTER=1; background prepare
    static_checks
    compile_tests
    idle build_ahead
    component_tests
    end_to_end all
    late_tests ;;
  *) fail "usage: test.sh [all|unit|e2e]" ;;
esac
