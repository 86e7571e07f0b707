#!/usr/bin/env bash
# The real parts without a cluster: the Mosquitto of the image and TimescaleDB of the same Debian, as plain processes on loopback, for
# component tests and benchmarks. Needs root (a mount namespace and a chroot).
#
#   parts.sh prepare                          builds the folder they run from, once a machine; prints its path
#   parts.sh mosquitto -c CONF [-v]           the broker in the foreground; it runs as the caller, sees the caller's files
#   parts.sh postgres DATADIR PORT [ARGS...]  PostgreSQL with TimescaleDB on 127.0.0.1:PORT; makes DATADIR if it is empty;
#                                             superuser postgres, no password; ARGS as in `-c shared_buffers=1GB`
#   parts.sh fuzz NAME ARGS...                a fuzz target of the broker's plugins (images/mosquitto/plugins/fuzz)
#   parts.sh psql|pg_isready|mosquitto_passwd|mosquitto_pub|mosquitto_sub|mosquitto_rr|mosquitto_ctrl ARGS...
#
# Each becomes the program it names (exec all the way): its process is the one that the caller started, and gets its signals.
# The broker's plugins are in /usr/lib/mosquitto, here and in the image. PARTS_SANITIZED=1 runs the broker and the plugins that are
# instrumented with ASan and UBSan.
set -euo pipefail
. "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/lib.sh"

# libasan8 and libubsan1 are for the instrumented broker.
PACKAGES=(libssl3t64 libcjson1 libsqlite3-0 libpicohttpparser1 libasan8 libubsan1 postgresql-18 postgresql-18-timescaledb)
POSTGRES=/usr/lib/postgresql/18/bin
DATA=/var/lib/postgresql/data        # where DATADIR appears inside: the folders above it need not be open to other users

parts_name() { printf 'parts-%s\n' "$(printf '%s\n' "4 $(base_hash) ${PACKAGES[*]}" | short_hash)"; }

prepare() {
  as_root "parts.sh"
  need unshare=util-linux setpriv=util-linux flock=util-linux
  local base name; name=$(parts_name)
  mosquitto_build >/dev/null
  if [ ! -e "$CACHE/$name" ]; then
    base=$(debian_base)
    cached "$name" "TimescaleDB from Debian packages" make_parts "$base"
  fi
}

make_parts() {
  local base=$1 root=$2 log=$CACHE/parts.log
  cp -a "$base" "$root"
  mkdir -p "$root/etc/postgresql-common" "$root$DATA"
  echo 'create_main_cluster = false' >"$root/etc/postgresql-common/createcluster.conf"
  in_root "$root" sh -c 'apt-get -q update && apt-get -qy --no-install-recommends install "$@"' install "${PACKAGES[@]}" >"$log" 2>&1 ||
    { tail -n 20 "$log" >&2; return 1; }
  # Started by root, Mosquitto becomes the user mosquitto and then reads none of the caller's files. Here that user is root.
  echo 'mosquitto:x:0:0::/nonexistent:/usr/sbin/nologin' >>"$root/etc/passwd"
  mkdir -p "$root/usr/lib/mosquitto" "$root/usr/lib/mosquitto-build"
  rm -rf "$root"/var/cache/apt/archives/*.deb "$root"/var/lib/apt/lists/*
}

# run PROGRAM ARGS... : becomes PROGRAM inside the parts' root, with the caller's folders at their own paths.
# PARTS_DATA, when set, is the folder to show at $DATA; PARTS_USER the user to become.
run() {
  local root build; root=$CACHE/$(parts_name) build=$CACHE/$(mosquitto_name)
  [ -e "$root" ] && [ -e "$build" ] || prepare
  [ "$(id -u)" -eq 0 ] || as_root "parts.sh"
  # shellcheck disable=SC2016
  exec unshare --mount --propagation private bash -c '
    set -eu
    root=$1 data=$2 user=$3 build=$4 variant=$5; shift 5
    for folder in /*; do
      name=${folder#/}
      case $name in bin|sbin|lib*|usr|etc|var|boot|lost+found) continue ;; esac
      [ -d "$folder" ] && [ ! -L "$folder" ] || continue
      [ -d "$root/$name" ] || mkdir -p "$root/$name"
      mount --rbind "$folder" "$root/$name"
    done
    mount --rbind /var/tmp "$root/var/tmp"
    for file in resolv.conf hosts; do [ -e "/etc/$file" ] && mount --bind "/etc/$file" "$root/etc/$file"; done
    mount --bind "$build" "$root/usr/lib/mosquitto-build"
    mount --bind "$build/$variant/usr/lib/mosquitto" "$root/usr/lib/mosquitto"
    [ -z "$data" ] || mount --bind "$data" "$root'"$DATA"'"
    here=$PWD; [ -d "$root$here" ] || here=/
    if [ -n "$user" ]; then exec chroot "$root" setpriv --reuid="$user" --regid="$user" --init-groups "$@"; fi
    exec chroot "$root" env --chdir="$here" "$@"
  ' parts "$root" "${PARTS_DATA:-}" "${PARTS_USER:-}" "$build" "$(variant)" "$@"
}

# The build of the broker that runs.
variant() { [ -n "${PARTS_SANITIZED:-}" ] && echo sanitized || echo broker; }

postgres() {
  [ $# -ge 2 ] || fail "usage: parts.sh postgres DATADIR PORT [ARGS...]"
  local port=$2 uid data; mkdir -p "$1"; data=$(cd "$1" && pwd); shift 2
  prepare
  uid=$(awk -F: '$1 == "postgres" {print $3 ":" $4}' "$CACHE/$(parts_name)/etc/passwd")
  export PARTS_DATA=$data PARTS_USER=postgres
  if [ ! -e "$data/PG_VERSION" ]; then
    chown "$uid" "$data"; chmod 700 "$data"
    # Not synced to disk: a half-made folder is made again, and tests make many.
    (run "$POSTGRES/initdb" -D "$DATA" --username=postgres --auth=trust --encoding=UTF8 --locale=C.UTF-8 --no-sync) >"$data.initdb.log" 2>&1 ||
      { cat "$data.initdb.log" >&2; fail "initdb failed in $data"; }
    rm -f "$data.initdb.log"
  fi
  run "$POSTGRES/postgres" -D "$DATA" -c listen_addresses=127.0.0.1 -c port="$port" -c unix_socket_directories= \
    -c shared_preload_libraries=timescaledb -c timescaledb.telemetry_level=off -c fsync=on -c max_connections=200 \
    -c shared_buffers=256MB -c log_timezone=UTC -c timezone=UTC "$@"
}

# Called by the name of a program (the links in e2e/tools), it is that program.
[ "$(basename "$0")" = parts.sh ] || set -- "$(basename "$0")" "$@"
case ${1:-} in
  prepare) prepare; printf '%s\n' "$CACHE/$(parts_name)" ;;
  # Broker and persistence plugin contain the same library, which is no fault.
  mosquitto) shift; run env ASAN_OPTIONS=detect_odr_violation=0 "/usr/lib/mosquitto-build/$(variant)/usr/sbin/mosquitto" "$@" ;;
  postgres) shift; postgres "$@" ;;
  psql|pg_isready|pg_dump|pgbench) program=$1; shift; run "$POSTGRES/$program" "$@" ;;
  mosquitto_passwd|mosquitto_pub|mosquitto_sub|mosquitto_rr|mosquitto_ctrl)
    program=$1; shift
    library=$(cd "$CACHE/$(mosquitto_name)/clients" && find usr/lib -name 'libmosquitto.so.*' -printf '%h\n')
    run env LD_LIBRARY_PATH="/usr/lib/mosquitto-build/clients/$library" "/usr/lib/mosquitto-build/clients/usr/bin/$program" "$@" ;;
  fuzz) program=$2; shift 2; run "/usr/lib/mosquitto-build/fuzzers/fuzz_$program" "$@" ;;
  *) sed -n '2,/^set/p' "$ROOT/e2e/parts.sh" | sed '$d; s/^# \{0,1\}//'; exit 2 ;;
esac
