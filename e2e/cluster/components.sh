# shellcheck shell=bash
# One function for each component writes its configuration and starts it in the instance. All functions are idempotent.

# shellcheck disable=SC2034  # for cluster.sh
COMPONENTS=(etcd apiserver controller-manager scheduler containerd coredns kubelet kube-proxy volumes cert-manager)
# shellcheck disable=SC2034  # for cluster.sh
NODE_IP=10.77.0.1 PODS=10.244.0.0/24 SERVICE_IP=10.96.0.1 SERVICES=10.96.0.0/16
VOLUMES=40

# start NAME COMMAND... : starts COMMAND in the instance unless it runs. Its output goes to log/NAME.log, and its PID (in the
# instance's PID namespace) to pid/NAME.
start() {
  local name=$1; shift
  running "$name" && return
  # shellcheck disable=SC2016
  inside setsid --fork bash -c 'echo $$ >"$1"; log=$2; shift 2; exec "$@" >>"$log" 2>&1 </dev/null' \
    "$name" "$STATE/pid/$name" "$STATE/log/$name.log" "$@"
}

running() { [ -s "$STATE/pid/$1" ] && inside kill -0 "$(cat "$STATE/pid/$1")" 2>/dev/null; }

# stop NAME : sends SIGTERM, and SIGKILL after five seconds.
stop() {
  local pid i; running "$1" || return 0
  pid=$(cat "$STATE/pid/$1")
  inside kill "$pid"
  for ((i = 0; i < 50; i++)); do inside kill -0 "$pid" 2>/dev/null || return 0; sleep 0.1; done
  inside kill -9 "$pid" 2>/dev/null || true
}

start_component() {
  case $1 in
    controller-manager) start_controller_manager ;;
    kube-proxy) start_kube_proxy ;;
    cert-manager) start_cert_manager ;;
    *) "start_$1" ;;
  esac
}

start_etcd() {
  # The data need not survive a power failure, so fsync is not needed.
  start etcd "$BIN/etcd" --data-dir "$STATE/etcd" --unsafe-no-fsync --log-level warn \
    --listen-client-urls http://127.0.0.1:2379 --advertise-client-urls http://127.0.0.1:2379 --listen-peer-urls http://127.0.0.1:2380
}

start_apiserver() {
  local p=$STATE/pki
  start apiserver "$BIN/kube-apiserver" --etcd-servers=http://127.0.0.1:2379 --advertise-address=$NODE_IP --secure-port=6443 \
    --tls-cert-file="$p/apiserver.crt" --tls-private-key-file="$p/apiserver.key" --client-ca-file="$p/ca.crt" \
    --kubelet-client-certificate="$p/kubelet-client.crt" --kubelet-client-key="$p/kubelet-client.key" \
    --kubelet-certificate-authority="$p/ca.crt" --kubelet-preferred-address-types=InternalIP \
    --service-account-key-file="$p/sa.pub" --service-account-signing-key-file="$p/sa.key" \
    --service-account-issuer=https://kubernetes.default.svc --service-cluster-ip-range=$SERVICES \
    --authorization-mode=Node,RBAC --enable-admission-plugins=NodeRestriction --profiling=false \
    --audit-policy-file="$CLUSTER_DIR/audit-policy.yaml" --audit-log-path="$STATE/log/audit.json" --audit-log-maxsize=1000 \
    --delete-collection-workers=8
}

start_controller_manager() {
  local p=$STATE/pki
  start controller-manager "$BIN/kube-controller-manager" --kubeconfig="$p/controller-manager.kubeconfig" --leader-elect=false \
    --use-service-account-credentials --service-account-private-key-file="$p/sa.key" --root-ca-file="$p/ca.crt" \
    --cluster-signing-cert-file="$p/ca.crt" --cluster-signing-key-file="$p/ca.key"
}

start_scheduler() { start scheduler "$BIN/kube-scheduler" --kubeconfig="$STATE/pki/scheduler.kubeconfig" --leader-elect=false; }

start_containerd() {
  cat >"$STATE/containerd.toml" <<TOML
version = 3
root = "$STATE/containerd"
disabled_plugins = ["io.containerd.internal.v1.opt"]   # it would create a folder in /opt
[plugins.'io.containerd.cri.v1.images'.pinned_images]
  sandbox = "localhost/fleetwright/pause:local"
[plugins.'io.containerd.cri.v1.runtime']
  restrict_oom_score_adj = true   # runc fails without a message if root without CAP_SYS_RESOURCE lowers it
[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.runc]
  runtime_type = "io.containerd.runc.v2"
[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.runc.options]
  SystemdCgroup = false
[plugins.'io.containerd.cri.v1.runtime'.cni]
  bin_dirs = ["$BIN"]
  conf_dir = "$STATE/cni"
TOML
  mkdir -p "$STATE/cni"
  cat >"$STATE/cni/10-bridge.conflist" <<JSON
{"cniVersion": "1.0.0", "name": "local", "plugins": [{"type": "bridge", "bridge": "pods", "isGateway": true, "hairpinMode": true,
 "ipam": {"type": "host-local", "dataDir": "/run/ipam", "ranges": [[{"subnet": "$PODS"}]], "routes": [{"dst": "0.0.0.0/0"}]}}]}
JSON
  start containerd env "PATH=$BIN:$PATH" "$BIN/containerd" --config "$STATE/containerd.toml"
}

start_coredns() {
  cat >"$STATE/Corefile" <<COREFILE
.:53 {
  bind $NODE_IP
  kubernetes cluster.local in-addr.arpa {
    kubeconfig $STATE/pki/admin.kubeconfig local
  }
  errors
  cache 5
}
COREFILE
  start coredns "$BIN/coredns" -conf "$STATE/Corefile"
}

start_kubelet() {
  local p=$STATE/pki
  echo "nameserver $NODE_IP" >"$STATE/kubelet-resolv.conf"
  cat >"$STATE/kubelet.yaml" <<YAML
apiVersion: kubelet.config.k8s.io/v1beta1
kind: KubeletConfiguration
failCgroupV1: false        # hosts that have only cgroup v1 are supported
cgroupDriver: cgroupfs
cgroupRoot: /$CGROUP       # separates the instances of a machine, as does podLogsDir
podLogsDir: $STATE/pod-logs
enforceNodeAllocatable: []
containerRuntimeEndpoint: unix:///run/containerd/containerd.sock
authentication: {anonymous: {enabled: false}, webhook: {enabled: true}, x509: {clientCAFile: $p/ca.crt}}
authorization: {mode: Webhook}
tlsCertFile: $p/node.crt
tlsPrivateKeyFile: $p/node.key
clusterDNS: [$NODE_IP]
clusterDomain: cluster.local
resolvConf: $STATE/kubelet-resolv.conf
failSwapOn: false
makeIPTablesUtilChains: false
podCIDR: $PODS
maxPods: 250
serializeImagePulls: false
# Other programs use disk and memory of the machine too: no eviction, no image garbage collection.
evictionHard: {memory.available: "0%", nodefs.available: "0%", imagefs.available: "0%", nodefs.inodesFree: "0%"}
imageGCHighThresholdPercent: 100
imageGCLowThresholdPercent: 99
YAML
  start kubelet "$BIN/kubelet" --config "$STATE/kubelet.yaml" --kubeconfig "$p/node.kubeconfig" \
    --hostname-override=node1 --node-ip=$NODE_IP --root-dir="$STATE/kubelet"
}

start_kube_proxy() {
  # The conntrack limits apply to the whole machine; zero keeps them unchanged.
  start kube-proxy "$BIN/kube-proxy" --kubeconfig "$STATE/pki/proxy.kubeconfig" --hostname-override=node1 --proxy-mode=nftables \
    --cluster-cidr=$PODS --conntrack-max-per-core=0 --conntrack-tcp-timeout-established=0 --conntrack-tcp-timeout-close-wait=0
}

# The default StorageClass has `local` volumes, which support fsGroup (hostPath does not). They are bound on first use by a pod.
make_volumes() {
  local i
  {
    cat <<YAML
apiVersion: storage.k8s.io/v1
kind: StorageClass
metadata: {name: local, annotations: {storageclass.kubernetes.io/is-default-class: "true"}}
provisioner: kubernetes.io/no-provisioner
volumeBindingMode: WaitForFirstConsumer
YAML
    for ((i = 1; i <= VOLUMES; i++)); do
      mkdir -p "$STATE/volumes/$i"; chmod 0777 "$STATE/volumes/$i"
      cat <<YAML
---
apiVersion: v1
kind: PersistentVolume
metadata: {name: local-$i}
spec:
  capacity: {storage: 20Gi}
  accessModes: [ReadWriteOnce]
  storageClassName: local
  persistentVolumeReclaimPolicy: Retain
  local: {path: $STATE/volumes/$i}
  nodeAffinity: {required: {nodeSelectorTerms: [{matchExpressions: [{key: kubernetes.io/hostname, operator: In, values: [node1]}]}]}}
YAML
    done
  } | kubectl apply --server-side -f - >/dev/null
}

# Replaces a provisioner: released volumes are emptied and become available again.
start_volumes() { start volumes env "BIN=$BIN" "STATE=$STATE" bash "$CLUSTER_DIR/recycle-volumes.sh" watch; }
