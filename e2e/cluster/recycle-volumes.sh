#!/usr/bin/env bash
# Empties every volume whose claim is gone, and makes it free again. `watch` goes on doing so; otherwise once.
# Runs inside the instance; cluster.sh sets BIN and STATE.
set -euo pipefail

kubectl() { "$BIN/kubectl" --kubeconfig "$STATE/pki/admin.kubeconfig" "$@"; }

recycle() {
  local name phase
  while read -r name phase; do
    # The line may be old, and the volume another claim's by now. Once it reads as released, only we can free it.
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
  # A watch ends with the API server, and after some minutes by itself.
  kubectl get persistentvolumes --watch "${columns[@]}" 2>/dev/null | recycle || true
  sleep 1
done
