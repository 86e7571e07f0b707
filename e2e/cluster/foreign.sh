# shellcheck shell=bash
# The commands of cluster.sh for an existing cluster (CLUSTER=current) or a kind cluster (CLUSTER=kind).

foreign() {
  local command=${1:-}; [ $# -eq 0 ] || shift
  unset -f kubectl      # use the program, not the function
  foreign_tools
  case $command in
    up) foreign_up ;;
    down) foreign_down ;;
    load) foreign_load "$@" ;;
    cert-manager) foreign_cert_manager "$@" ;;
    kubectl) exec kubectl "$@" ;;
    exec) foreign_exec "$@" ;;
    env) printf 'export KUBECONFIG=%q\n' "${KUBECONFIG:-$HOME/.kube/config}" ;;
    status) kubectl get nodes -o wide ;;
    *) fail "'$command' requires CLUSTER=local" ;;
  esac
}

# Uses kubectl and helm of the machine, or builds them. The clients in e2e/tools are used if the machine has none.
foreign_tools() {
  case $CLUSTER in
    current) ;;
    kind)
      command -v kind >/dev/null || fail "CLUSTER=kind: missing on this machine: kind (https://kind.sigs.k8s.io)"
      mkdir -p "$CACHE"
      export KUBECONFIG=$CACHE/kind-$INSTANCE.kubeconfig ;;
    *) fail "CLUSTER must be local, current or kind; got '$CLUSTER'" ;;
  esac
  if ! command -v kubectl >/dev/null || ! command -v helm >/dev/null; then
    binaries
    PATH=$PATH:$BIN
  fi
  export PATH=$PATH:$ROOT/e2e/tools
}

foreign_up() {
  if [ "$CLUSTER" = kind ] && ! kind get clusters 2>/dev/null | grep -qx "$INSTANCE"; then
    step "kind cluster '$INSTANCE'" kind create cluster --name "$INSTANCE" --kubeconfig "$KUBECONFIG" --wait 120s
  fi
  kubectl get --raw /readyz >/dev/null || fail "the context '$(kubectl config current-context 2>/dev/null)' does not answer"
  say "  cluster: context '$(kubectl config current-context)'"
}

foreign_down() {
  if [ "$CLUSTER" = current ]; then say "  the current cluster is not removed"; return; fi
  step "remove kind cluster '$INSTANCE'" kind delete cluster --name "$INSTANCE" --kubeconfig "$KUBECONFIG"
  rm -f "$KUBECONFIG"
}

foreign_load() {
  local image archive context; context=$(kubectl config current-context)
  if [ -n "${REGISTRY:-}" ]; then "$ROOT/e2e/images.sh" push "$REGISTRY" "$@"; return; fi
  [[ $context == kind-* ]] || fail "CLUSTER=current: set REGISTRY=host/path to a registry from which the nodes of '$context' can pull images"
  for image in "$@"; do
    archive=$("$ROOT/e2e/images.sh" archive "$image")
    step "load $image" kind load image-archive --name "${context#kind-}" "$archive"
    "$ROOT/e2e/images.sh" name "$image"
  done
}

foreign_cert_manager() {
  [ "${1:-}" != --prepare ] || return 0
  kubectl get crd certificaterequests.cert-manager.io >/dev/null ||
    fail "the cluster has no cert-manager: install it (https://cert-manager.io/docs/installation)"
}

foreign_exec() {
  if [ -n "${NAMESPACE:-}" ]; then
    local kubeconfig; kubeconfig=$CACHE/context-$(printf '%s %s' "$(kubectl config current-context)" "$NAMESPACE" | short_hash).kubeconfig
    mkdir -p "$CACHE"
    (umask 077; kubectl config view --raw --minify --flatten >"$kubeconfig")
    export KUBECONFIG=$kubeconfig
    kubectl config set-context --current --namespace "$NAMESPACE" >/dev/null
  fi
  exec "$@"
}
