# shellcheck shell=bash
# Builds Kubernetes, etcd, containerd, CoreDNS, the CNI plugins and Helm from the Go modules that go.mod pins.

CLUSTER_DIR=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

# The number in the hash is the version of go_build: increment it when go_build changes.
binaries_name() { printf 'kubernetes-%s\n' "$({ echo "1 $(uname -m)"; cat "$CLUSTER_DIR/go.mod" "$CLUSTER_DIR/go.sum"; } | short_hash)"; }

# binaries: sets BIN to the folder of the binaries, and builds them if they are missing.
binaries() {
  BIN=$CACHE/$(binaries_name)
  [ -e "$BIN" ] && return
  command -v go >/dev/null || fail "missing on this machine: Go, $(sed -n 's/^go //p' "$CLUSTER_DIR/go.mod") or newer (https://go.dev/dl)"
  cached "$(binaries_name)" "build Kubernetes and its components from Go modules (about 8 minutes the first time)" go_build
}

go_build() {
  local out=$1 version major minor
  version=$(cd "$CLUSTER_DIR" && go list -m -f '{{.Version}}' k8s.io/kubernetes)
  major=${version#v}; major=${major%%.*}
  minor=${version#v*.}; minor=${minor%%.*}
  mkdir -p "$out"
  # At low priority, because a test run compiles Rust at the same time.
  (cd "$CLUSTER_DIR" && CGO_ENABLED=0 nice -n 5 go build -mod=readonly -trimpath -o "$out/" -ldflags "-s -w \
      -X k8s.io/component-base/version.gitVersion=$version \
      -X k8s.io/component-base/version.gitMajor=$major -X k8s.io/component-base/version.gitMinor=$minor" tool) >&2
  mv "$out/server" "$out/etcd"      # Go names the command after its folder
}
