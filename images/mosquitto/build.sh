#!/usr/bin/env bash
# Builds Mosquitto from Debian's source package with the patches of ../patches, and the plugins. Runs as root in the Debian of the
# images (a container or a chroot), for the image (Dockerfile) and for the component tests (e2e/lib.sh) alike.
#
#   build.sh broker OUT        OUT/broker: the broker with its persistence plugin; OUT/clients: mosquitto_pub and others, for tests
#   build.sh sanitized OUT     OUT/sanitized: the broker, instrumented with ASan and UBSan
#   build.sh plugins OUT       the plugins, into OUT/broker and, where it exists, OUT/sanitized
#   build.sh fuzzers OUT       OUT/fuzzers: fuzz targets of the plugins (libFuzzer)
#
# The order matters: `broker` comes first, since the others use its headers. Source and objects stay in $WORK.
set -euo pipefail

HERE=$(cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")" && pwd)
. "$HERE/source.sh"
WORK=${WORK:-/var/tmp/mosquitto}
SOURCE=$WORK/source
PACKAGES=(dpkg-dev gcc g++ make cmake libc6-dev libsqlite3-dev libssl-dev libcjson-dev libpicohttpparser-dev uthash-dev pkgconf)
# The hardening of Debian's own build.
HARDENING="-O2 -g -fstack-protector-strong -fstack-clash-protection -fcf-protection -D_FORTIFY_SOURCE=3 -Wformat -Werror=format-security"
# Frames stay whole, so that reports have complete traces.
SANITIZE="-fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer"

fail() { printf 'error: %s\n' "$*" >&2; exit 1; }

install_packages() {
  export DEBIAN_FRONTEND=noninteractive LC_ALL=C
  local list=/etc/apt/sources.list.d/fleetwright-source.list mirror suite=""
  if [ ! -e "$list" ]; then
    apt-get -q update
    read -r mirror suite < <(apt-get indextargets --format '$(REPO_URI) $(RELEASE)' 'Created-By: Packages' | head -n 1) || true
    [ -n "$suite" ] || fail "apt knows no Debian mirror"
    echo "deb-src $mirror $suite main" >"$list"
    apt-get -q update
  fi
  apt-get -qy --no-install-recommends install "$@"
}

# The source package, at the pinned version alone, with the patches applied.
fetch_source() {
  local found
  [ ! -e "$SOURCE/.patched" ] || return 0
  found=$(apt-cache showsrc --only-source mosquitto | sed -n 's/^Version: //p' | sort -V | tail -n 1)
  [ "$found" = "$MOSQUITTO_VERSION" ] || fail "Debian has Mosquitto ${found:-(none)}, and images/mosquitto/source.sh pins $MOSQUITTO_VERSION.
To move to $found: read its changes, run \`apt-get source mosquitto=$found\`, check that each of images/mosquitto/patches still applies and is
still needed, set the version and the checksums in images/mosquitto/source.sh and, for a new upstream version, the version in
images/mosquitto/plugins/version.h; then run the tests."
  rm -rf "$WORK/package" "$SOURCE"; mkdir -p "$WORK/package"
  ( cd "$WORK/package"
    apt-get -q source --download-only "mosquitto=$MOSQUITTO_VERSION"
    sha256sum --check --strict <<<"${MOSQUITTO_FILES//$'\n\n'/}" ||
      fail "the files of Mosquitto $MOSQUITTO_VERSION are not those whose checksums images/mosquitto/source.sh pins: do not build them"
    dpkg-source --no-check --extract "mosquitto_$MOSQUITTO_VERSION.dsc" "$SOURCE" )
  local patch
  for patch in "$HERE"/patches/*.patch; do
    patch --directory="$SOURCE" --strip=1 --forward --fuzz=0 --no-backup-if-mismatch <"$patch" ||
      fail "$(basename "$patch") does not apply to Mosquitto $MOSQUITTO_VERSION"
  done
  touch "$SOURCE/.patched"
}

# configure FOLDER CFLAGS LDFLAGS : what the Gateways use, and the plugin by which tests restrict the users of an external broker.
configure() {
  CFLAGS=$2 LDFLAGS=$3 cmake -S "$SOURCE" -B "$1" -Wno-dev -DCMAKE_BUILD_TYPE=None -DCMAKE_INSTALL_PREFIX=/usr -DCMAKE_SKIP_BUILD_RPATH=ON \
    -DWITH_BUNDLED_DEPS=OFF -DWITH_WEBSOCKETS=ON -DWITH_TESTS=OFF -DWITH_DOCS=OFF -DWITH_LIB_CPP=OFF -DWITH_HTTP_API=OFF -DWITH_CTRL_SHELL=OFF \
    -DWITH_LTO=OFF -DWITH_PLUGIN_DYNAMIC_SECURITY=ON -DWITH_PLUGIN_EXAMPLES=OFF -DWITH_PLUGIN_SPARKPLUG_AWARE=OFF \
    -DWITH_PLUGIN_ACL_FILE=OFF -DWITH_PLUGIN_PASSWORD_FILE=OFF
}

# install_broker OBJECTS FOLDER
install_broker() {
  mkdir -p "$2/usr/sbin" "$2/usr/lib/mosquitto"
  install -m 755 "$1/src/mosquitto" "$2/usr/sbin/mosquitto"
  install -m 644 "$1/plugins/persist-sqlite/mosquitto_persist_sqlite.so" "$2/usr/lib/mosquitto/persist_sqlite.so"
}

build_broker() {
  local out=$1 library
  install_packages "${PACKAGES[@]}"
  fetch_source
  configure "$WORK/objects" "$HARDENING" "-Wl,-z,relro,-z,now"
  make -C "$WORK/objects" -j"$(nproc)"
  rm -rf "$out/broker" "$out/clients" "$WORK/installed"
  make -C "$WORK/objects" install DESTDIR="$WORK/installed" >/dev/null
  install_broker "$WORK/objects" "$out/broker"
  mkdir -p "$out/clients/usr/bin"
  cp "$WORK"/installed/usr/bin/mosquitto_{pub,sub,rr,passwd,ctrl} "$out/clients/usr/bin/"
  library=$(cd "$WORK/installed" && find usr/lib -name 'libmosquitto.so.1')
  mkdir -p "$out/clients/$(dirname "$library")"
  cp --dereference "$WORK/installed/$library" "$out/clients/$library"
  mkdir -p "$out/clients/usr/lib/mosquitto"
  install -m 644 "$WORK/objects/plugins/dynamic-security/mosquitto_dynamic_security.so" "$out/clients/usr/lib/mosquitto/dynamic_security.so"
  find "$out/broker" "$out/clients" -type f -exec strip --strip-unneeded {} +
}

build_sanitized() {
  configure "$WORK/sanitized" "-O1 -g $SANITIZE" "$SANITIZE"
  make -C "$WORK/sanitized" -j"$(nproc)" mosquitto mosquitto_persist_sqlite
  rm -rf "$1/sanitized"
  install_broker "$WORK/sanitized" "$1/sanitized"
}

build_plugins() {
  local folder=$1/broker/usr/lib/mosquitto
  make -C "$HERE/plugins" -B OUT="$folder" MOSQUITTO="$WORK/installed/usr" CFLAGS="$HARDENING"
  strip --strip-unneeded "$folder"/*.so
  [ ! -e "$1/sanitized" ] ||
    make -C "$HERE/plugins" -B OUT="$1/sanitized/usr/lib/mosquitto" MOSQUITTO="$WORK/installed/usr" CFLAGS="-O1 -g" SANITIZE="$SANITIZE"
}

build_fuzzers() {
  install_packages clang libclang-rt-dev
  mkdir -p "$1/fuzzers"
  ar rcs "$WORK/libmosquitto_common.a" "$WORK"/objects/libcommon/CMakeFiles/libmosquitto_common.dir/*.o
  make -C "$HERE/plugins" -B fuzz CC=clang OUT="$1/fuzzers" MOSQUITTO="$WORK/installed/usr" MOSQUITTO_COMMON="$WORK/libmosquitto_common.a"
}

[ $# -eq 2 ] || { sed -n '2,/^set/p' "${BASH_SOURCE[0]}" | sed '$d; s/^# \{0,1\}//'; exit 2; }
[ "$(id -u)" -eq 0 ] || fail "build.sh installs packages: run it as root, in a container or a chroot"
mkdir -p "$2"
case $1 in
  broker|sanitized|plugins|fuzzers) "build_$1" "$(cd "$2" && pwd)" ;;
  *) fail "unknown: $1" ;;
esac
