# shellcheck shell=bash
# Creates the certificates of a cluster, and a kubeconfig for each component. Each cluster gets new ones.

# make_pki DIR NODE_IP SERVICE_IP
make_pki() {
  local dir=$1 node_ip=$2 service_ip=$3 user
  mkdir -p "$dir"; cd "$dir" || return
  ec_key ca
  openssl req -x509 -key ca.key -days 3650 -subj /CN=local-ca -out ca.crt 2>/dev/null
  issue apiserver /CN=kube-apiserver \
    "IP:$node_ip,IP:$service_ip,IP:127.0.0.1,DNS:kubernetes,DNS:kubernetes.default,DNS:kubernetes.default.svc,DNS:localhost"
  issue kubelet-client /O=system:masters/CN=apiserver-kubelet-client
  issue admin /O=system:masters/CN=admin
  issue controller-manager /CN=system:kube-controller-manager
  issue scheduler /CN=system:kube-scheduler
  issue proxy /CN=system:kube-proxy
  issue node /O=system:nodes/CN=system:node:node1 "DNS:node1,IP:$node_ip"
  ec_key sa
  openssl pkey -in sa.key -pubout -out sa.pub
  for user in admin controller-manager scheduler proxy node; do kubeconfig "$dir" "$user" "$node_ip" >"$user.kubeconfig"; done
}

ec_key() { openssl genpkey -algorithm EC -pkeyopt ec_paramgen_curve:P-256 -out "$1.key" 2>/dev/null; }

# issue NAME SUBJECT [ALTERNATIVE-NAMES]
issue() {
  ec_key "$1"
  openssl req -new -key "$1.key" -subj "$2" -out "$1.csr" 2>/dev/null
  printf 'subjectAltName=%s\nextendedKeyUsage=serverAuth,clientAuth\n' "${3:-DNS:$1}" >"$1.ext"
  openssl x509 -req -in "$1.csr" -CA ca.crt -CAkey ca.key -CAcreateserial -days 3650 -extfile "$1.ext" -out "$1.crt" 2>/dev/null
  rm "$1.csr" "$1.ext"
}

kubeconfig() {
  cat <<YAML
apiVersion: v1
kind: Config
clusters: [{name: local, cluster: {server: "https://$3:6443", certificate-authority: $1/ca.crt}}]
users: [{name: $2, user: {client-certificate: $1/$2.crt, client-key: $1/$2.key}}]
contexts: [{name: local, context: {cluster: local, user: $2}}]
current-context: local
YAML
}
