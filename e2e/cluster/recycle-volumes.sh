#!/usr/bin/env bash
# Empties every released volume and makes it available again, once or (`watch`) continuously.
# Runs inside the instance; cluster.sh sets BIN and STATE.
set -euo pipefail

kubectl() { "$BIN/kubectl" --kubeconfig "$STATE/pki/admin.kubeconfig" "$@"; }

recycle() {
  local name phase
  while read -r name phase; do
    # The line may be outdated and the volume bound to another claim. A released volume is changed only by this script.
    [ "$phase" = Released ] && [ "$(kubectl get persistentvolume "$name" -o 'jsonpath={.status.phase}')" = Released ] || continue
    echo "recycling $name"
    find "$STATE/volumes/${name#local-}" -mindepth 1 -delete
    chown 0:0 "$STATE/volumes/${name#local-}"; chmod 0777 "$STATE/volumes/${name#local-}"
    kubectl patch persistentvolume "$name" --type=json -p '[{"op": "remove", "path": "/spec/claimRef"}]' || true
  done
}

columns=(-o 'custom-columns=NAME:.metadata.name,PHASE:.status.phase' --no-headers)
if [ "${1:-}" != watch ]; then kubectl get persistentvolumes "${columns[@]}" | recycle; exit; fi
while :; do
  # A watch ends when the API server stops, and after some minutes.
  kubectl get persistentvolumes --watch "${columns[@]}" 2>/dev/null | recycle || true
  sleep 1
done
