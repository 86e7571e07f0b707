#!/usr/bin/env bash
# Builds one of the peers that the worker is compared with, once per machine, and prints its folder.
#
#   prepare.sh telegraf|python|node-red
set -euo pipefail
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
. "$HERE/../../../e2e/lib.sh"

TELEGRAF=github.com/influxdata/telegraf/cmd/telegraf@v1.37.2
# The plugins in the configuration. Telegraf with all plugins takes many times as long to build.
PLUGINS=custom,aggregators.merge,inputs.mqtt_consumer,outputs.postgresql,parsers.json

make_telegraf() {
  mkdir -p "$1"
  GOBIN=$1 CGO_ENABLED=0 nice -n 5 go install -trimpath -ldflags '-s -w' -tags "$PLUGINS" "$TELEGRAF" >&2
}

make_python() {
  # The folder is renamed after the build. The scripts in it would contain the old name, so only the interpreter is used.
  python3 -m venv "$1" >&2
  "$1/bin/python" -m pip install --quiet -r "$HERE/requirements.txt" >&2
}

make_node_red() {
  mkdir -p "$1"
  cp "$HERE/package.json" "$1/"
  npm install --prefix "$1" --no-audit --no-fund --loglevel=error >&2
}

has() { command -v "$1" >/dev/null || fail "missing on this machine: $1"; }

case ${1:-} in
  telegraf) has go; recipe="1 $TELEGRAF $PLUGINS $(go version)" what="build Telegraf (a few minutes)" make=make_telegraf ;;
  python) has python3; recipe="1 $(cat "$HERE/requirements.txt") $(python3 --version)" what="install the Python consumer's libraries" make=make_python ;;
  node-red) has npm; recipe="1 $(cat "$HERE/package.json")" what="install Node-RED" make=make_node_red ;;
  *) sed -n '2,/^set/p' "$0" | sed '$d; s/^# \{0,1\}//' >&2; exit 2 ;;
esac
name=peer-$1-$(printf '%s\n' "$recipe" | short_hash)
cached "$name" "$what" "$make" 1>&2
printf '%s\n' "$CACHE/$name"
