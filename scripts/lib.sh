# shellcheck shell=bash
# Functions of the demonstration and of the tests. Source it.
. "$(dirname "${BASH_SOURCE[0]}")/../e2e/lib.sh"

SYSTEM_NAMESPACE=fleetwright-system
CLUSTER_SH=$ROOT/e2e/cluster/cluster.sh

# instance KIND : prints a cluster name that is unique for this clone and KIND.
instance() { printf '%s-%s\n' "$1" "$(printf '%s' "$ROOT" | sha256sum | cut -c1-6)"; }

cluster() { "$CLUSTER_SH" "$@"; }
in_cluster() { "$CLUSTER_SH" exec "$@"; }
kubectl() { "$CLUSTER_SH" kubectl "$@"; }
helm() { in_cluster helm "$@"; }

release_binary() {
  command -v cargo >/dev/null || fail "missing on this machine: Rust (https://rustup.rs)"
  cargo build --locked --release --bin fleetwright --manifest-path "$ROOT/Cargo.toml"
}
target_dir() { printf '%s\n' "${CARGO_TARGET_DIR:-$ROOT/target}"; }

# load_images : loads the images into the cluster; sets FLEETWRIGHT_IMAGE, MOSQUITTO_IMAGE and TIMESCALEDB_IMAGE to their names there.
load_images() {
  local names
  BINARY=$(target_dir)/release/fleetwright; export BINARY
  mapfile -t names < <(cluster load fleetwright mosquitto timescaledb)
  [ ${#names[@]} -eq 3 ] || fail "the images could not be loaded"
  export FLEETWRIGHT_IMAGE=${names[0]} MOSQUITTO_IMAGE=${names[1]} TIMESCALEDB_IMAGE=${names[2]}
}

# chart_values : prints the helm arguments that select the loaded images.
chart_values() {
  printf -- '--set\n%s\n' "image.repository=${FLEETWRIGHT_IMAGE%:*}" "image.tag=${FLEETWRIGHT_IMAGE##*:}" \
    "mosquitto.image=$MOSQUITTO_IMAGE" "timescaledb.image=$TIMESCALEDB_IMAGE"
}

# install_charts [HELM-ARGS...]
install_charts() {
  local values; mapfile -t values < <(chart_values)
  # --take-ownership: helm adopts CRDs that kubectl applied before.
  step "chart fleetwright-crds" quietly helm upgrade --install fleetwright-crds "$ROOT/charts/fleetwright-crds" \
    --namespace "$SYSTEM_NAMESPACE" --create-namespace --take-ownership
  step "chart fleetwright" quietly helm upgrade --install fleetwright "$ROOT/charts/fleetwright" --namespace "$SYSTEM_NAMESPACE" \
    --wait --timeout 5m "${values[@]}" "$@"
}

# quietly COMMAND... : prints the output only if COMMAND fails.
quietly() {
  local log status=0; log=$(mktemp)
  "$@" >"$log" 2>&1 || { status=$?; cat "$log" >&2; }
  rm -f "$log"
  return "$status"
}

make_namespace() { kubectl get namespace "$1" >/dev/null 2>&1 || kubectl create namespace "$1" >/dev/null; }
