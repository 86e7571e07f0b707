#!/usr/bin/env bash
# Runs a single-node Kubernetes on this machine from upstream components, without a container engine.
#
#   cluster.sh up                  starts the cluster unless it runs
#   cluster.sh down                removes the cluster with all processes, mounts, cgroups and folders
#   cluster.sh load IMAGE...       builds images (fleetwright mosquitto timescaledb) and imports them into the cluster;
#                                  prints the image names for pods
#   cluster.sh exec COMMAND...     runs a command in the cluster's network and with its DNS, with KUBECONFIG, kubectl, helm, psql
#                                  and the Mosquitto clients; NAMESPACE=name sets the default namespace
#   cluster.sh kubectl ARGS...
#   cluster.sh status              prints the components and their memory
#   cluster.sh env                 prints the settings as shell code
#   cluster.sh cert-manager        starts cert-manager unless it runs; --prepare only builds it
#   cluster.sh stop|start|kill|restart COMPONENT   COMPONENT: etcd apiserver controller-manager scheduler containerd coredns
#                                  kubelet kube-proxy volumes cert-manager (kill: SIGKILL)
#   cluster.sh logs [COMPONENT]    lists the log files, or prints one log
#   cluster.sh recycle-volumes     empties released volumes (the component volumes does this continuously)
#
#   INSTANCE=name     name of the cluster; several can run concurrently. Default: demo-<hash of this clone's path>
#   CLUSTER=local     a cluster as above (default). `current` uses the current kubeconfig context and pushes images to
#                     REGISTRY=host/path; `kind` uses a kind cluster with the name INSTANCE and needs Docker or Podman.
#
# The cluster runs in its own mount, process and network namespace. $STATE/init records the first process: when it ends, the
# kernel ends all other processes and removes the mounts and network devices.
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
SHADOWED=(/var/lib/kubelet /var/lib/cni)   # mount points: the instance mounts its own folders there
[[ $INSTANCE =~ ^[a-z0-9][a-z0-9-]{0,39}$ ]] || fail "INSTANCE: lower-case letters, digits and dashes, at most 40; got '$INSTANCE'"

# alive: whether the instance runs. The start time distinguishes its first process from a later one with the same PID.
alive() {
  [ -s "$STATE/init" ] || return 1
  local pid start; read -r pid start <"$STATE/init"
  [ "$(start_time "$pid")" = "$start" ] && INIT=$pid
}
start_time() { awk '{sub(/.*\) /, ""); print $20}' "/proc/$1/stat" 2>/dev/null || echo none; }

inside() { nsenter --target "$INIT" --mount --pid --net -- "$@"; }
kubectl() { nsenter --target "$INIT" --net -- "$BIN/kubectl" --kubeconfig "$STATE/pki/admin.kubeconfig" "$@"; }
known() { case " ${COMPONENTS[*]} " in *" ${1:-?} "*) ;; *) fail "unknown component '${1:-}'; known: ${COMPONENTS[*]}" ;; esac; }
require_alive() { alive || fail "the cluster '$INSTANCE' does not run; start it with: cluster.sh up"; binaries; }

# await SECONDS WHAT COMMAND... : waits until COMMAND succeeds.
await() {
  local limit=$1 what=$2 i; shift 2
  for ((i = 0; i < limit * 10; i++)); do "$@" >/dev/null 2>&1 && return; sleep 0.1; done
  say "  not ready after $limit s: $what; the logs are in $STATE/log"
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
    say "  cluster '$INSTANCE' already runs"
  else
    [ ! -e "$STATE" ] || step "remove the remains of an earlier run of '$INSTANCE'" remove
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
  # catatonit -P is the first process of the instance and reaps the others. The instance needs these folders for itself,
  # because containerd, the CNI library and the kubelet write to fixed paths in them.
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
  inside ip link add node type bridge      # a bridge without ports, because some kernels have no dummy device
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

# Prints the output only on failure, because ctr warns about cgroup v1 on each call.
ctr() { inside "$BIN/ctr" -n k8s.io "$@" 2>"$STATE/log/ctr.log" || { cat "$STATE/log/ctr.log" >&2; return 1; }; }
import() { ctr images import "$1" >/dev/null; }

# load IMAGE... : imports the images and prints their names in the cluster.
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

# run_in COMMAND... : executes COMMAND in the instance's network with its DNS and tools, but with the machine's files and
# processes. NAMESPACE=name sets the default namespace of kubectl and the search domain of host names.
run_in() {
  require_alive
  local kubeconfig=$STATE/pki/admin.kubeconfig resolv=$STATE/resolv${NAMESPACE:+-$NAMESPACE}.conf
  [ -z "${NAMESPACE:-}" ] || kubeconfig=$STATE/pki/admin-$NAMESPACE.kubeconfig
  # Written atomically, because several commands may run concurrently.
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
  if [ ! -e "$STATE" ]; then say "  cluster '$INSTANCE' does not exist"; return; fi
  step "remove cluster '$INSTANCE'" remove
}

remove() {
  local i pid net
  if alive; then
    net=$(readlink "/proc/$INIT/ns/net")
    kill -9 "$INIT"
    # Kills commands of `exec` that still run in the instance's network.
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
  # Another instance may still use the mount points.
  if rmdir "$(dirname "$STATE")" 2>/dev/null; then rmdir "${SHADOWED[@]}" 2>/dev/null || true; fi
}

status() {
  if ! alive; then say "cluster '$INSTANCE' does not run"; return 1; fi
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
# Only one of these commands runs at a time in a clone. -o: processes that the command starts do not inherit the lock.
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
