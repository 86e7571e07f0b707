#!/usr/bin/env bash
# A Python with one package of PyPI: `python.sh PACKAGE==VERSION SCRIPT ARGS...`.
# `python.sh PACKAGE==VERSION --prepare` only makes it, which needs a network that leads to PyPI (the local cluster's does not).
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/../lib.sh"

package=$1; shift
name=python-$package
# A virtual environment knows its own path, so that it is made at its place; the last step says that it is whole.
make() {
  python3 -m venv "$CACHE/$name.venv"
  "$CACHE/$name.venv/bin/pip" install -q --disable-pip-version-check "$package"
  touch "$1"
}

if [ ! -e "$CACHE/$name" ]; then
  need python3=python3
  # Debian keeps what fills a virtual environment in a package of its own, which brings no command.
  python3 -c 'import ensurepip' 2>/dev/null || need python3-venv=python3-venv
  cached "$name" "Python with $package" make
fi
[ "${1:-}" = --prepare ] || exec "$CACHE/$name.venv/bin/python" "$@"
