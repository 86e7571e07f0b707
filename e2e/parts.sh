#!/usr/bin/env bash
# The real parts without a cluster: Mosquitto and TimescaleDB of the same Debian as the images, as plain processes on
# loopback, for component tests and benchmarks. Needs root (a mount namespace and a chroot).
#
#   parts.sh prepare                          builds the folder they run from, once a machine; prints its path
#   parts.sh mosquitto -c CONF [-v]           the broker in the foreground; it runs as the caller, sees the caller's files
#   parts.sh postgres DATADIR PORT [ARGS...]  PostgreSQL with TimescaleDB on 127.0.0.1:PORT; makes DATADIR if it is empty;
#                                             superuser postgres, no password; ARGS as in `-c shared_buffers=1GB`
#   parts.sh psql|pg_isready|mosquitto_passwd|mosquitto_pub|mosquitto_sub|mosquitto_rr|mosquitto_ctrl ARGS...
#
# Each becomes the program it names (exec all the way): its process is the one that the caller started, and gets its signals.
# The SQLite persistence plugin of the broker is /usr/lib/mosquitto/persist_sqlite.so, here and in the image; our own plugins
# (images/mosquitto-*.c) stand beside it. PARTS_PRELOAD, where it is set, is what the broker has in LD_PRELOAD instead of
# /usr/lib/mosquitto/acknowledge.so, which does nothing unless it is loaded as a plugin too.
set -euo pipefail
. "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/lib.sh"

PACKAGES=(mosquitto mosquitto-clients postgresql-18 postgresql-18-timescaledb gcc libc6-dev libmosquitto-dev libssl-dev libsqlite3-dev)
PLUGINS=(previous-password certificate bounds acknowledge)   # images/mosquitto-NAME.c -> NAME.so, with _ for -
POSTGRES=/usr/lib/postgresql/18/bin
DATA=/var/lib/postgresql/data        # where DATADIR appears inside: the folders above it need not be open to other users

parts_name() { printf 'parts-%s\n' "$(printf '%s\n' "3 $(base_hash) ${PACKAGES[*]} $(cat "$ROOT"/images/mosquitto-*.[ch])" | short_hash)"; }

prepare() {
  as_root "parts.sh"
  need unshare=util-linux setpriv=util-linux flock=util-linux
  local base name; name=$(parts_name)
  if [ ! -e "$CACHE/$name" ]; then
    base=$(debian_base)
    cached "$name" "Mosquitto and TimescaleDB from Debian packages" make_parts "$base"
  fi
}

make_parts() {
  local base=$1 root=$2 log=$CACHE/parts.log
  cp -a "$base" "$root"
  mkdir -p "$root/etc/postgresql-common"
  echo 'create_main_cluster = false' >"$root/etc/postgresql-common/createcluster.conf"
  cp /etc/resolv.conf /etc/hosts "$root/etc/"
  unshare --mount bash -c 'mount -t proc proc "$0/proc" && exec chroot "$0" sh -c "
      export DEBIAN_FRONTEND=noninteractive LC_ALL=C
      apt-get -q update && apt-get -qy --no-install-recommends install $*"' "$root" "${PACKAGES[@]}" >"$log" 2>&1 ||
    { tail -n 20 "$log" >&2; return 1; }
  # Started by root, Mosquitto becomes the user mosquitto and then reads none of the caller's files. Here that user is root.
  sed -i -E 's/^(mosquitto:[^:]*):[0-9]+:[0-9]+:/\1:0:0:/' "$root/etc/passwd"
  # Debian keeps the plugin in a folder named after the processor.
  mkdir -p "$root/usr/lib/mosquitto" "$root$DATA"
  local plugin; plugin=$(cd "$root" && find usr/lib -name mosquitto_persist_sqlite.so | head -n 1)
  [ -n "$plugin" ] || { say "no mosquitto_persist_sqlite.so in the Debian package"; return 1; }
  ln -s "/$plugin" "$root/usr/lib/mosquitto/persist_sqlite.so"
  cp "$ROOT"/images/mosquitto-*.[ch] "$root/tmp/"
  local name
  for name in "${PLUGINS[@]}"; do
    chroot "$root" gcc -std=gnu17 -O2 -Wall -Wextra -Werror -fPIC -shared -o "/usr/lib/mosquitto/${name//-/_}.so" "/tmp/mosquitto-$name.c" -Wl,--as-needed -lcrypto -lsqlite3 \
      >>"$log" 2>&1 || { tail -n 20 "$log" >&2; return 1; }
  done
  rm -rf "$root"/var/cache/apt/archives/*.deb "$root"/var/lib/apt/lists/*
}

# run PROGRAM ARGS... : becomes PROGRAM inside the parts' root, with the caller's folders at their own paths.
# PARTS_DATA, when set, is the folder to show at $DATA; PARTS_USER the user to become.
run() {
  local root; root=$CACHE/$(parts_name)
  [ -e "$root" ] || prepare
  [ "$(id -u)" -eq 0 ] || as_root "parts.sh"
  # shellcheck disable=SC2016
  exec unshare --mount --propagation private bash -c '
    set -eu
    root=$1 data=$2 user=$3; shift 3
    for folder in /*; do
      name=${folder#/}
      case $name in bin|sbin|lib*|usr|etc|var|boot|lost+found) continue ;; esac
      [ -d "$folder" ] && [ ! -L "$folder" ] || continue
      [ -d "$root/$name" ] || mkdir -p "$root/$name"
      mount --rbind "$folder" "$root/$name"
    done
    mount --rbind /var/tmp "$root/var/tmp"
    for file in resolv.conf hosts; do [ -e "/etc/$file" ] && mount --bind "/etc/$file" "$root/etc/$file"; done
    [ -z "$data" ] || mount --bind "$data" "$root'"$DATA"'"
    here=$PWD; [ -d "$root$here" ] || here=/
    if [ -n "$user" ]; then exec chroot "$root" setpriv --reuid="$user" --regid="$user" --init-groups "$@"; fi
    exec chroot "$root" env --chdir="$here" "$@"
  ' parts "$root" "${PARTS_DATA:-}" "${PARTS_USER:-}" "$@"
}

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
  mosquitto) shift; run env LD_PRELOAD="${PARTS_PRELOAD-/usr/lib/mosquitto/acknowledge.so}" /usr/sbin/mosquitto "$@" ;;
  postgres) shift; postgres "$@" ;;
  psql|pg_isready|pg_dump|pgbench) program=$1; shift; run "$POSTGRES/$program" "$@" ;;
  mosquitto_passwd|mosquitto_pub|mosquitto_sub|mosquitto_rr|mosquitto_ctrl) program=$1; shift; run "/usr/bin/$program" "$@" ;;
  *) sed -n '2,/^set/p' "$ROOT/e2e/parts.sh" | sed '$d; s/^# \{0,1\}//'; exit 2 ;;
esac
