#!/usr/bin/env bash
# Reads one object as JSON from standard input and prints its health according to Flux, Helm and Argo CD; see main.go.
# Builds the program once a machine. `health.sh --prepare` only builds it.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/../lib.sh"

folder=$ROOT/e2e/health
name=health-$({ uname -m; cat "$folder"/*.go "$folder/go.mod" "$folder/go.sum"; } | short_hash)
build() { go build -C "$folder" -mod=readonly -trimpath -o "$1" .; }

[ -e "$CACHE/$name" ] || cached "$name" "the health reader" build
[ "${1:-}" = --prepare ] || exec "$CACHE/$name" --argocd-script "$ROOT/config/argocd/health.lua" "$@"
