# shellcheck shell=bash
# Functions of the scripts in this folder: messages with times, the cache, system packages, the Debian base.
# Source it. It sets ROOT (the clone) and CACHE (outside the clone, so that several clones share it).

shopt -s inherit_errexit

# shellcheck disable=SC2034  # used by the scripts that source this file
ROOT=$(cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/.." && pwd)
CACHE=${FLEETWRIGHT_CACHE:-${XDG_CACHE_HOME:-${HOME:-/root}/.cache}/fleetwright}
DEBIAN_SUITE=forky                     # the first Debian release with Mosquitto 2.1, whose SQLite persistence survives a kill

say()  { printf '%s\n' "$*" >&2; }
fail() { printf 'error: %s\n' "$*" >&2; exit 1; }

# step WHAT COMMAND... : runs COMMAND and prints how long it took.
# COMMAND runs in a subshell, so that `set -e` works inside it (it would not before `||`). Its variables are lost.
step() {
  local what=$1 started=$EPOCHREALTIME status; shift
  say "  $what ..."
  set +e
  (set -e; "$@")
  status=$?
  set -e
  if [ "$status" -eq 0 ]; then say "  $what: $(since "$started") s"; else say "  $what: FAILED after $(since "$started") s"; fi
  return "$status"
}

# since START : prints the seconds since START, a value of $EPOCHREALTIME.
since() { awk -v a="$1" -v b="$EPOCHREALTIME" 'BEGIN {printf "%.1f", b - a}'; }

# short_hash : prints the first twelve characters of the SHA-256 of standard input.
short_hash() { sha256sum | cut -c1-12; }

# cached NAME WHAT COMMAND... : creates $CACHE/NAME unless it exists. COMMAND gets the path to create as its last argument.
# A lock serializes concurrent builds. An interrupted build leaves a .partial, which the next build removes.
cached() {
  local name=$1 what=$2 target=$CACHE/$1; shift 2
  [ -e "$target" ] && return
  mkdir -p "$CACHE"
  (
    flock 9
    [ -e "$target" ] && exit
    rm -rf "$target.partial"
    step "$what" "$@" "$target.partial"
    mv "$target.partial" "$target"
  ) 9>"$CACHE/$name.lock"
}

as_root() { [ "$(id -u)" -eq 0 ] || fail "$1 needs root (namespaces and mounts): run it as root"; }

# need COMMAND=PACKAGE... or FILE=PACKAGE... : installs missing packages as root; otherwise prints their names and fails.
need() {
  local pair missing=()
  for pair in "$@"; do
    command -v "${pair%%=*}" >/dev/null || [ -e "${pair%%=*}" ] || [ -x "/usr/sbin/${pair%%=*}" ] || missing+=("${pair#*=}")
  done
  [ ${#missing[@]} -eq 0 ] && return
  if [ "$(id -u)" -ne 0 ] || ! command -v apt-get >/dev/null; then
    fail "missing on this machine, please install (names of Debian and Ubuntu packages): ${missing[*]}"
  fi
  mkdir -p "$CACHE"
  step "install system packages: ${missing[*]}" install_packages "${missing[@]}"
}

install_packages() {
  local log=$CACHE/apt.log
  # The timeout makes a concurrent run wait for apt's lock.
  { apt-get -o DPkg::Lock::Timeout=600 update -q &&
    DEBIAN_FRONTEND=noninteractive apt-get -o DPkg::Lock::Timeout=600 install -qy --no-install-recommends "$@"; } >"$log" 2>&1 ||
    { tail -n 20 "$log" >&2; return 1; }
}

# debian_mirror : prints the Debian mirror that apt uses on this machine, because it is reachable.
debian_mirror() {
  local mirror
  mirror=$(cat /etc/apt/sources.list /etc/apt/sources.list.d/*.list /etc/apt/sources.list.d/*.sources 2>/dev/null |
    grep -v '^ *#' | grep -oE 'https?://[^] ]+/debian/?( |$)' | head -n 1 | tr -d ' ') || true
  printf '%s\n' "${DEBIAN_MIRROR:-${mirror:-http://deb.debian.org/debian}}"
}

base_hash() { printf '%s\n' "base 2 $DEBIAN_SUITE $(uname -m)" | short_hash; }

# debian_base : creates a minimal Debian once and prints its folder.
debian_base() {
  local name; name=base-$(base_hash)
  need debootstrap=debootstrap /usr/share/keyrings/debian-archive-keyring.gpg=debian-archive-keyring 1>&2
  cached "$name" "Debian $DEBIAN_SUITE base ($(debian_mirror))" make_debian_base 1>&2
  printf '%s\n' "$CACHE/$name"
}

make_debian_base() {
  local log=$CACHE/debootstrap.log folder
  folder=$(mktemp -d /var/tmp/fleetwright-base.XXXXXX)     # debootstrap does not support spaces in this path
  chmod 755 "$folder"
  # The script `sid` serves every release; an older debootstrap has no script with the name of a newer release.
  debootstrap --variant=minbase --include=ca-certificates "$DEBIAN_SUITE" "$folder" "$(debian_mirror)" \
    /usr/share/debootstrap/scripts/sid >"$log" 2>&1 || { tail -n 20 "$log" >&2; rm -rf --one-file-system "$folder"; return 1; }
  mv "$folder" "$1"
  # The index of a frozen mirror has expired. policy-rc.d prevents packages from starting services in the chroot.
  echo 'Acquire::Check-Valid-Until "false";' >"$1/etc/apt/apt.conf.d/80frozen-mirror"
  printf '#!/bin/sh\nexit 101\n' >"$1/usr/sbin/policy-rc.d"; chmod 755 "$1/usr/sbin/policy-rc.d"
  rm -rf "$1"/var/cache/apt/archives/*.deb "$1"/var/lib/apt/lists/*
}

# in_root ROOT COMMAND... : runs it inside that root, with /proc and the machine's name resolution. `$ROOT/images/mosquitto` is at /mosquitto
# and OUT, where it is set, at /out.
in_root() {
  local root=$1; shift
  cp /etc/resolv.conf /etc/hosts "$root/etc/"
  mkdir -p "$root/mosquitto" "$root/out"
  # shellcheck disable=SC2016
  unshare --mount --propagation private bash -c '
    set -eu
    root=$1 sources=$2 out=$3; shift 3
    mount -t proc proc "$root/proc"
    mount --bind "$sources" "$root/mosquitto"
    [ -z "$out" ] || mount --bind "$out" "$root/out"
    exec chroot "$root" env DEBIAN_FRONTEND=noninteractive LC_ALL=C "$@"' in_root "$root" "$ROOT/images/mosquitto" "${OUT:-}" "$@"
}

# What the broker is compiled from, and what its plugins are built from as well.
mosquitto_compiled_name() {
  printf 'mosquitto-compiled-%s\n' "$({ base_hash; cat "$ROOT"/images/mosquitto/{build.sh,source.sh} "$ROOT"/images/mosquitto/patches/*; } | short_hash)"
}
mosquitto_name() {
  printf 'mosquitto-%s\n' "$({ mosquitto_compiled_name; find "$ROOT/images/mosquitto/plugins" -type f -name '*.[ch]' -o -name Makefile |
    LC_ALL=C sort | xargs cat; } | short_hash)"
}

# mosquitto_build: prints the folder of the broker, built once a machine for image and tests alike: broker, clients, sanitized and fuzzers, as
# images/mosquitto/build.sh says.
mosquitto_build() {
  local compiled name base
  compiled=$(mosquitto_compiled_name) name=$(mosquitto_name)
  if [ ! -e "$CACHE/$name" ]; then
    as_root "building the broker"
    need unshare=util-linux flock=util-linux 1>&2
    base=$(debian_base)
    cached "$compiled" "Mosquitto from Debian's source package, with our patches" compile_mosquitto "$base" 1>&2
    cached "$name" "plugins of the broker" build_mosquitto_plugins "$CACHE/$compiled" 1>&2
  fi
  printf '%s\n' "$CACHE/$name"
}

compile_mosquitto() {
  local log=$CACHE/mosquitto-compiled.log
  cp -a "$1" "$2"
  { in_root "$2" /mosquitto/build.sh broker /built && in_root "$2" /mosquitto/build.sh sanitized /built; } >"$log" 2>&1 ||
    { grep -A8 '^error: ' "$log" >&2 || tail -n 20 "$log" >&2; return 1; }
}

# In the root that compiled the broker, which keeps its packages and headers.
build_mosquitto_plugins() {
  local root=$1 out=$2 log=$CACHE/mosquitto-plugins.log
  mkdir -p "$out"
  cp -a "$root"/built/. "$out/"
  ( flock 8
    OUT=$out
    { in_root "$root" /mosquitto/build.sh plugins /out && in_root "$root" /mosquitto/build.sh fuzzers /out; } >"$log" 2>&1 ) 8>"$root.plugins.lock" ||
    { tail -n 20 "$log" >&2; return 1; }
}
