#!/usr/bin/env bash
# A real single-node Kubernetes on this machine, from upstream's own binaries, without a container engine.
#
#   cluster.sh up                  starts it, or finds it running
#   cluster.sh down                ends it; no process, mount, cgroup or folder stays
#   cluster.sh load IMAGE...       builds those of our images (fleetwright mosquitto timescaledb) and makes them known to it;
#                                  prints the name of each as pods are to use it
#   cluster.sh exec COMMAND...     runs a command in its network and with its DNS; KUBECONFIG, kubectl, helm, psql and the
#                                  Mosquitto clients are set up; NAMESPACE=name makes that the default one
#   cluster.sh kubectl ARGS...
#   cluster.sh status              what runs, and what it takes
#   cluster.sh env                 prints its settings, to be sourced
#   cluster.sh cert-manager        starts cert-manager in it, or finds it running; with --prepare it is only built
#   cluster.sh stop|start|kill|restart COMPONENT   one of: etcd apiserver controller-manager scheduler containerd coredns
#                                  kubelet kube-proxy volumes cert-manager (kill: without asking)
#   cluster.sh logs [COMPONENT]    where the logs are, or one of them
#   cluster.sh recycle-volumes     empties the volumes whose claims are gone (it happens by itself as well)
#
#   INSTANCE=name     which one; they stand side by side. Default: demo-<hash of this clone's path>
#   CLUSTER=local     the above (default). `current` uses the current kubeconfig context, with images pushed to REGISTRY=host/path;
#                     `kind` a kind cluster of that name, where Docker or Podman is.
#
# Everything lives in one mount, process and network namespace whose first process is recorded in $STATE/init: when that
# ends, the kernel ends all the rest and takes every mount and network device with it.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/../lib.sh"
. "$ROOT/e2e/cluster/binaries.sh"
. "$ROOT/e2e/cluster/pki.sh"
. "$ROOT/e2e/cluster/components.sh"
. "$ROOT/e2e/cluster/cert-manager.sh"

INSTANCE=${INSTANCE:-demo-$(printf '%s' "$ROOT" | sha256sum | cut -c1-6)}
CLUSTER=${CLUSTER:-local}
STATE=/var/lib/fleetwright/$INSTANCE
CGROUP=fleetwright-$INSTANCE
SHADOWED=(/var/lib/kubelet /var/lib/cni)   # in the instance these are others; the machine has them only to be mounted upon
[[ $INSTANCE =~ ^[a-z0-9][a-z0-9-]{0,39}$ ]] || fail "INSTANCE: lower-case letters, digits and dashes, at most 40; got '$INSTANCE'"

# alive: whether the instance runs. The start time tells its first process from a later one with the same number.
alive() {
  [ -s "$STATE/init" ] || return 1
  local pid start; read -r pid start <"$STATE/init"
  [ "$(start_time "$pid")" = "$start" ] && INIT=$pid
}
start_time() { awk '{sub(/.*\) /, ""); print $20}' "/proc/$1/stat" 2>/dev/null || echo none; }

inside() { nsenter --target "$INIT" --mount --pid --net -- "$@"; }
kubectl() { nsenter --target "$INIT" --net -- "$BIN/kubectl" --kubeconfig "$STATE/pki/admin.kubeconfig" "$@"; }
known() { case " ${COMPONENTS[*]} " in *" ${1:-?} "*) ;; *) fail "no component is called '${1:-}'; there are: ${COMPONENTS[*]}" ;; esac; }
require_alive() { alive || fail "the cluster '$INSTANCE' does not run: cluster.sh up"; binaries; }

# await SECONDS WHAT COMMAND... : until COMMAND succeeds.
await() {
  local limit=$1 what=$2 i; shift 2
  for ((i = 0; i < limit * 10; i++)); do "$@" >/dev/null 2>&1 && return; sleep 0.1; done
  say "  still not there after $limit s: $what; the logs are in $STATE/log"
  tail -qn 3 "$STATE"/log/*.log >&2 || true
  return 1
}

up() {
  as_root "the local Kubernetes"
  local started=$EPOCHREALTIME
  need runc=runc catatonit=catatonit ip=iproute2 nft=nftables conntrack=conntrack openssl=openssl nsenter=util-linux \
    unshare=util-linux setsid=util-linux mount=mount pgrep=procps buildah=buildah debootstrap=debootstrap
  binaries
  if alive; then
    say "  cluster '$INSTANCE': runs already"
  else
    [ ! -e "$STATE" ] || step "remove what an earlier run of '$INSTANCE' left" remove
    step "namespaces and certificates" make_instance
    alive
  fi
  step "API server" control_plane
  step "node" node
  say "  cluster '$INSTANCE' is up: $(since "$started") s"
}

make_instance() {
  local pid controller
  mkdir -p "$STATE"/{log,pid,etcd,containerd,kubelet,volumes,pod-logs,varlog,cni-cache} "${SHADOWED[@]}"
  for controller in /sys/fs/cgroup/*/; do [ ! -e "$controller/tasks" ] || mkdir -p "$controller/$CGROUP"; done
  if [ -e /sys/fs/cgroup/cgroup.procs ]; then
    echo "+cpu +cpuset +memory +pids +io" >/sys/fs/cgroup/cgroup.subtree_control 2>/dev/null || true
    mkdir -p "/sys/fs/cgroup/$CGROUP"
  fi
  (make_pki "$STATE/pki" $NODE_IP $SERVICE_IP)
  # catatonit -P waits and reaps: the first process of the instance. These folders are its own, since containerd, the CNI
  # library and the kubelet write there whatever they are told.
  # shellcheck disable=SC2016
  setsid unshare --mount --pid --net --fork --mount-proc --propagation slave bash -c '
    set -e; mount --make-rshared /; mount -t tmpfs -o mode=755 run /run; mkdir /run/lock; mount --bind "$0/varlog" /var/log
    mount --bind "$0/kubelet" /var/lib/kubelet; mount --bind "$0/cni-cache" /var/lib/cni; exec catatonit -P' "$STATE" >"$STATE/log/init.log" 2>&1 </dev/null &
  local unshare=$! i
  for ((i = 0; i < 50; i++)); do
    pid=$(pgrep -P "$unshare" -x catatonit || true); [ -n "$pid" ] && break; sleep 0.1
  done
  [ -n "$pid" ] || { cat "$STATE/log/init.log" >&2; return 1; }
  echo "$pid $(start_time "$pid")" >"$STATE/init"
  alive
  make_network
}

make_network() {
  inside ip link set lo up
  inside ip link add node type bridge      # some kernels have no dummy device; a bridge without ports serves
  inside ip addr add $NODE_IP/24 dev node
  inside ip link set node up
  inside ip route replace default dev node
  inside sysctl -qw net.ipv4.ip_forward=1
}

control_plane() {
  start_etcd
  start_containerd
  start_apiserver
  await 60 "API server" kubectl get --raw /readyz
  start_controller_manager
  start_scheduler
  start_coredns
}

node() {
  if ! running kubelet; then
    local pause; pause=$("$ROOT/e2e/images.sh" archive pause)
    await 30 containerd inside "$BIN/ctr" version
    import "$pause"
  fi
  start_kubelet
  start_kube_proxy
  make_volumes
  start_volumes
  await 60 "node" kubectl get node node1
  kubectl wait --for=condition=Ready node/node1 --timeout=60s >/dev/null
  await 60 "default service account" kubectl get serviceaccount default
}

# Its output matters only when it fails; it warns of cgroup v1 each time.
ctr() { inside "$BIN/ctr" -n k8s.io "$@" 2>"$STATE/log/ctr.log" || { cat "$STATE/log/ctr.log" >&2; return 1; }; }
import() { ctr images import "$1" >/dev/null; }

# load IMAGE... : prints their names in the cluster.
load() {
  require_alive
  local image name archive
  for image in "$@"; do
    name=$("$ROOT/e2e/images.sh" name "$image")
    if [ -z "$(ctr images ls -q "name==$name")" ]; then
      archive=$("$ROOT/e2e/images.sh" archive "$image")
      step "load $name" import "$archive"
    fi
    printf '%s\n' "$name"
  done
}

# run_in COMMAND... : becomes COMMAND in the instance's network, with its DNS and its tools, but with the machine's files and
# processes. With NAMESPACE=name, that is where kubectl looks and where bare host names are.
run_in() {
  require_alive
  local kubeconfig=$STATE/pki/admin.kubeconfig resolv=$STATE/resolv${NAMESPACE:+-$NAMESPACE}.conf
  [ -z "${NAMESPACE:-}" ] || kubeconfig=$STATE/pki/admin-$NAMESPACE.kubeconfig
  # Whole or not at all, for several may come here at once.
  [ -e "$kubeconfig" ] || { sed "s/user: admin}/user: admin, namespace: $NAMESPACE}/" "$STATE/pki/admin.kubeconfig" >"$kubeconfig.$$"
    mv "$kubeconfig.$$" "$kubeconfig"; }
  [ -e "$resolv" ] || { printf 'nameserver %s\nsearch %ssvc.cluster.local cluster.local\noptions ndots:3\n' \
      "$NODE_IP" "${NAMESPACE:+$NAMESPACE.svc.cluster.local }" >"$resolv.$$"
    mv "$resolv.$$" "$resolv"; }
  export KUBECONFIG=$kubeconfig PATH=$BIN:$ROOT/e2e/tools:$PATH INSTANCE
  # shellcheck disable=SC2016
  exec nsenter --target "$INIT" --net -- unshare --mount --propagation slave bash -c \
    'mount --bind "$0" /etc/resolv.conf && exec "$@"' "$resolv" "$@"
}

down() {
  as_root "the local Kubernetes"
  if [ ! -e "$STATE" ]; then say "  cluster '$INSTANCE': not there"; return; fi
  step "remove cluster '$INSTANCE'" remove
}

remove() {
  local i pid net
  if alive; then
    net=$(readlink "/proc/$INIT/ns/net")
    kill -9 "$INIT"
    # Commands of `exec` that still run in its network.
    for pid in /proc/[0-9]*; do
      pid=${pid#/proc/}
      if [ "$pid" != $$ ] && [ "$(readlink "/proc/$pid/ns/net" 2>/dev/null)" = "$net" ]; then kill -9 "$pid" 2>/dev/null || true; fi
    done
    for ((i = 0; i < 100; i++)); do [ -e "/proc/$INIT" ] || break; sleep 0.1; done
  fi
  for ((i = 0; i < 50; i++)); do
    find /sys/fs/cgroup/*/"$CGROUP" "/sys/fs/cgroup/$CGROUP" -depth -type d -exec rmdir {} + 2>/dev/null || true
    compgen -G "/sys/fs/cgroup/*/$CGROUP" >/dev/null || [ -e "/sys/fs/cgroup/$CGROUP" ] || break
    sleep 0.1
  done
  rm -rf --one-file-system "$STATE"
  # Not while another instance is mounted upon them.
  if rmdir "$(dirname "$STATE")" 2>/dev/null; then rmdir "${SHADOWED[@]}" 2>/dev/null || true; fi
}

status() {
  if ! alive; then say "cluster '$INSTANCE': does not run"; return 1; fi
  binaries
  local name pid
  printf "cluster '%s', in %s\n" "$INSTANCE" "$STATE"
  for name in "${COMPONENTS[@]}"; do
    if running "$name"; then
      pid=$(cat "$STATE/pid/$name")
      printf '  %-20s %6d MB\n' "$name" "$(inside awk '/^VmRSS/ {print int($2 / 1024)}' "/proc/$pid/status")"
    else
      printf '  %-20s stopped\n' "$name"
    fi
  done
  kubectl get nodes,persistentvolumeclaims -A 2>&1 || true
}

settings() {
  require_alive
  printf 'export INSTANCE=%q STATE=%q BIN=%q KUBECONFIG=%q AUDIT_LOG=%q INIT_PID=%q\n' \
    "$INSTANCE" "$STATE" "$BIN" "$STATE/pki/admin.kubeconfig" "$STATE/log/audit.json" "$INIT"
}

logs() { if [ $# -eq 0 ]; then ls -1 "$STATE"/log/*; else cat "$STATE/log/$1.log"; fi; }

usage() { sed -n '2,/^set/p' "$0" | sed '$d; s/^# \{0,1\}//'; exit 2; }

if [ "$CLUSTER" != local ]; then . "$ROOT/e2e/cluster/foreign.sh"; foreign "$@"; exit; fi
# Two of these of one clone wait for each other. -o: what they start does not hold the lock.
case ${1:-} in up|down|cert-manager)
  if [ -z "${FLEETWRIGHT_LOCKED:-}" ]; then FLEETWRIGHT_LOCKED=1 exec flock -o "$ROOT/e2e/cluster" "$0" "$@"; fi ;;
esac
unset FLEETWRIGHT_LOCKED
command=${1:-}; [ $# -eq 0 ] || shift
case $command in
  up|down|load|status|logs) "$command" "$@" ;;
  cert-manager) cert_manager "$@" ;;
  kubectl) require_alive; kubectl "$@" ;;
  exec) run_in "$@" ;;
  env) settings ;;
  stop) known "$@"; require_alive; stop "$1" ;;
  start) known "$@"; require_alive; start_component "$1" ;;
  restart) known "$@"; require_alive; stop "$1"; start_component "$1" ;;
  kill) known "$@"; require_alive; inside kill -9 "$(cat "$STATE/pid/$1")" ;;
  recycle-volumes) require_alive; inside env "BIN=$BIN" "STATE=$STATE" bash "$CLUSTER_DIR/recycle-volumes.sh" ;;
  *) usage ;;
esac
