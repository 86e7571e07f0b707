#!/usr/bin/env bash
# Starts a demonstration fleet. `demo.sh down` removes it. `demo.sh shell [COMMAND]` opens a shell with access to it.
# `demo.sh logs` prints the operator logs.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

INSTANCE=${INSTANCE:-$(instance demo)}; export INSTANCE
NAMESPACE=fleet-demo

demo() {
  local started=$EPOCHREALTIME
  say "Fleetwright demonstration"
  build_and_start
  load_images
  step "namespace $NAMESPACE" make_namespace "$NAMESPACE"
  install_charts --set timescaledb.enabled=true --set "timescaledb.namespace=$NAMESPACE"
  step "apply config/demo" apply_fleet
  step "the database is ready" kubectl --namespace "$NAMESPACE" rollout status statefulset/timescaledb --timeout=180s
  step "gateways, devices and pipelines are Ready" wait_ready
  step "the first rows are stored" await_rows
  step "all devices are connected" await_connected
  show
  say ""
  say "Done in $(since "$started") s."
}

# Compiles Rust, and at the same time builds the cluster's programs and images, which mostly wait for the network.
build_and_start() {
  local failed=0 background
  { cluster up && clients; } & background=$!
  step "build fleetwright" release_binary || failed=1
  wait "$background" || failed=1
  return "$failed"
}

# clients : installs psql and the Mosquitto clients for `make shell`. With another cluster the machine's own clients are used.
clients() { [ "${CLUSTER:-local}" != local ] || "$ROOT/e2e/parts.sh" prepare >/dev/null; }

# The simulator uses the image that was built before.
apply_fleet() {
  in_cluster kubectl kustomize "$ROOT/config/demo" | sed "s#image: fleetwright\$#image: $FLEETWRIGHT_IMAGE#" |
    kubectl apply --server-side --field-manager=demo --force-conflicts -f - >/dev/null
}

wait_ready() {
  local kind
  for kind in gateways devices pipelines; do
    quietly kubectl wait --namespace "$NAMESPACE" --for=condition=Ready "$kind.fleetwright.io" --all --timeout=180s || {
      kubectl get fleet,pods --namespace "$NAMESPACE" >&2; return 1; }
  done
}

# sql STATEMENT [PSQL-ARGS...] : runs psql in the database pod, which works with every kind of cluster.
sql() {
  local statement=$1 uri; shift
  uri=$(kubectl get secret timescale --namespace "$NAMESPACE" -o 'jsonpath={.data.uri}' | base64 -d)
  kubectl exec --namespace "$NAMESPACE" statefulset/timescaledb -- psql "$uri" -X -q "$@" -c "$statement"
}

table() { kubectl get pipelines.fleetwright.io --namespace "$NAMESPACE" -o 'jsonpath={.items[0].spec.sink.timescale.table}'; }
rows_of() { sql "SELECT count(*) FROM \"$1\" WHERE time > now() - interval '$2 seconds'" -At; }

await_rows() {
  local table i; table=$(table)
  for ((i = 0; i < 120; i++)); do [ "$(rows_of "$table" 60)" -eq 0 ] || return 0; sleep 0.5; done
  return 1
}

# The totals in the status of a Gateway are one or two seconds old.
await_connected() {
  local totals='{range .items[*]}{.status.devices.connected} {.status.devices.declared}{"\n"}{end}' i
  for ((i = 0; i < 120; i++)); do
    kubectl get gateways.fleetwright.io --namespace "$NAMESPACE" -o "jsonpath=$totals" | awk '$1 != $2 {exit 1}' && return; sleep 0.5
  done
  return 1
}

show() {
  local table; table=$(table)
  say ""
  kubectl get fleet --namespace "$NAMESPACE"
  printf '\nNewest rows of %s:\n' "$table"
  sql "SELECT * FROM \"$table\" ORDER BY time DESC LIMIT 5"
  sleep 5
  printf '%s rows per second over the last five seconds\n' "$(sql "SELECT round(count(*) / 5.0) FROM \"$table\" WHERE time > now() - interval '5 seconds'" -At)"
  cat <<TEXT

Try next:
  make shell CMD='kubectl get devices'              all devices and their state
  make shell CMD='kubectl describe pipeline'        conditions and events of the Pipeline
  make shell CMD='psql -c "SELECT count(*) FROM $table"'
Remove the demonstration with: make down
TEXT
}

down() {
  if [ "${CLUSTER:-local}" != current ]; then cluster down; return; fi
  # Keep the cluster: remove only the objects of the demonstration.
  step "namespace $NAMESPACE" kubectl delete namespace "$NAMESPACE" --ignore-not-found
  step "chart fleetwright" helm uninstall fleetwright --namespace "$SYSTEM_NAMESPACE" --ignore-not-found --wait
  step "chart fleetwright-crds" helm uninstall fleetwright-crds --namespace "$SYSTEM_NAMESPACE" --ignore-not-found
}

# shell [COMMAND] : psql connects to the demonstration's database; kubectl and short host names use its namespace.
shell() {
  local uri
  uri=$(kubectl get secret timescale --namespace "$NAMESPACE" -o 'jsonpath={.data.uri}' 2>/dev/null | base64 -d) || true
  if [[ $uri =~ ^postgres(ql)?://([^:@]+):([^@]+)@([^:/]+)(:([0-9]+))?/([^?]+) ]]; then
    export PGUSER=${BASH_REMATCH[2]} PGPASSWORD=${BASH_REMATCH[3]} PGHOST=${BASH_REMATCH[4]} PGPORT=${BASH_REMATCH[6]:-5432} PGDATABASE=${BASH_REMATCH[7]}
  fi
  clients
  export NAMESPACE
  if [ -n "${1:-}" ]; then exec "$CLUSTER_SH" exec bash -c "$1"; fi
  say "kubectl, helm, psql, mosquitto_pub and mosquitto_sub have access to the fleet in the namespace $NAMESPACE. Close the shell with exit."
  exec "$CLUSTER_SH" exec bash -i
}

logs() { kubectl logs --namespace "$SYSTEM_NAMESPACE" deployment/fleetwright --all-containers --tail=200 "$@"; }

command=${1:-demo}; [ $# -eq 0 ] || shift
case $command in demo|down|shell|logs|show) "$command" "$@" ;; *) fail "usage: demo.sh [demo|down|shell|logs|show]" ;; esac
