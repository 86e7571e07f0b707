# shellcheck shell=bash
# cert-manager for tests that need an issuer: its CRDs, and its controllers as one process (e2e/cert-manager). It runs without
# its webhook. The CRDs have one version each, so no conversion is needed, and their schemas reject malformed objects. Two
# functions of the webhook are missing: the check of who may approve a request, and the name of its creator (spec.username).

CERT_MANAGER_SOURCE=$ROOT/e2e/cert-manager

# The number in the hash is the version of build_cert_manager: increment it when build_cert_manager changes.
cert_manager_name() {
  printf 'cert-manager-%s\n' "$({ echo "1 $(uname -m)"; cat "$CERT_MANAGER_SOURCE"/{main.go,go.mod,go.sum}; } | short_hash)"
}

# cert_manager_binary: sets CERT_MANAGER to the folder of the binary and the CRDs, and builds them if they are missing.
cert_manager_binary() {
  CERT_MANAGER=$CACHE/$(cert_manager_name)
  [ -e "$CERT_MANAGER" ] || cached "$(cert_manager_name)" "build cert-manager from Go modules (about 3 minutes the first time)" build_cert_manager
}

build_cert_manager() {
  local out=$1 module
  mkdir -p "$out/crds"
  CGO_ENABLED=0 nice -n 5 go build -C "$CERT_MANAGER_SOURCE" -mod=readonly -trimpath -ldflags "-s -w" -o "$out/cert-manager" . >&2
  module=$(go list -C "$CERT_MANAGER_SOURCE" -m -f '{{.Dir}}' github.com/cert-manager/cert-manager)
  cp "$module"/deploy/crds/*.yaml "$out/crds/"
}

# cert_manager [--prepare] : builds cert-manager and, without --prepare, starts it.
cert_manager() {
  cert_manager_binary
  [ "${1:-}" != --prepare ] || return 0
  require_alive
  kubectl apply --server-side -f "$CERT_MANAGER/crds" >/dev/null
  kubectl wait --for=condition=Established --timeout=30s -f "$CERT_MANAGER/crds" >/dev/null
  start_cert_manager
}

start_cert_manager() {
  cert_manager_binary
  start cert-manager "$CERT_MANAGER/cert-manager" --kubeconfig "$STATE/pki/admin.kubeconfig"
}
